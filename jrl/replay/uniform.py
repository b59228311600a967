"""A ring of transitions with uniform sampling, which keeps each observation once.

The ring is flat, ``[rows · B, words]``, a row being one time step of all ``B`` environments and an item one
packed step and where it started, so that the successor of item ``i`` in its own environment is item ``i + B``. Behind
the newest row lies a row under way, of which only the observations count: where the newest steps led.

Where an episode ends, the next item starts anew. What a terminated step led to has no value and is not kept; what a
truncated step led to is kept in a slot beside the ring, one for each ``gap`` steps of an environment. That is exact
unless an environment is truncated twice within ``gap`` steps; then the slot may have been lost to the other, its tag
says so, and the window gets no weight.

Adding writes one contiguous block at a position that never wraps, and slots: in a donated or scanned state XLA
does it in place. Sampling reads O(batch) items, each from two places.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.replay import packing
from jrl.types import Array, Key, PyTree, Transition


class Layout(NamedTuple):
    """What a ring is made of: the words of an item, its rows of ``B`` items, and the steps that share a slot."""

    step: packing.Layout
    obs: packing.Layout
    rows: int
    num_envs: int
    gap: int

    @property
    def words(self) -> int:
        """32-bit words of an item."""
        return self.step.words + self.obs.words


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("storage", "row", "filled"), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True)
class UniformState:
    """The ring.

    Attributes:
        storage: uint32 ``[items, words]``: the rows, one more for what the last row led to, and the slots.
        row: int32 ``[]``, the row under way, which is written next.
        filled: int32 ``[]``, the rows held, those before ``row``.
        layout: static. :func:`read` gives back transitions.
    """

    storage: Array
    row: Array
    filled: Array
    layout: Layout


class Sample(NamedTuple):
    """Windows of up to ``n`` steps, ``N`` of them.

    Attributes:
        obs, action: at the window's start, ``[N, ...]``.
        rewards: float32 ``[n, N]``; 0 beyond the window's end.
        length: int32 ``[N]``, the steps ``k`` really taken: the window stops at either flag, and at the
            newest item.
        terminated: bool ``[N]``, whether the window's last step terminated.
        next_obs: the true successor of the window's last step, ``[N, ...]``; where that terminated, a state of
            no meaning, since its value is 0.
        weight: importance weight, float32 ``[N]`` (1 for uniform sampling); 0 where ``next_obs`` was lost, see
            the module.
        position: int32 ``[N]``, where in the ring the window starts.
    """

    obs: PyTree
    action: Array
    rewards: Array
    length: Array
    terminated: Array
    next_obs: PyTree
    weight: Array
    position: Array


def num_rows(capacity: int, num_envs: int, block_length: int) -> int:
    """Return the rows of a ring that holds ``capacity`` items beside the row under way; its blocks never wrap."""
    block = num_envs * block_length
    return -(-(capacity + num_envs) // block) * block_length


def init(spec: Transition, rows: int, num_envs: int, gap: int = 1, *, obs_dtype: Any = None) -> UniformState:
    """Return an empty ring.

    Args:
        spec: shapes and dtypes of one transition (leaves ShapeDtypeStruct); the ring keeps these dtypes, those of
            ``obs`` for ``next_obs`` too.
        rows: time steps, of which one is under way: ``rows - 1`` are held.
        num_envs: ``B``.
        gap: steps of an environment that share a slot for what a truncated step led to; 1 is exact whatever
            comes, and needs twice the memory for observations.
        obs_dtype: what floats of ``obs`` are kept in, where that takes fewer bits; read, they have their own dtype
            again, rounded. None keeps them exactly.

    Raises:
        TypeError: a leaf is neither a bool, an integer nor a float of 8 to 64 bits.
        ValueError: there are not two rows, or ``gap`` is below 1.
    """
    if rows < 2:
        raise ValueError(
            f"a replay of rows={rows} holds nothing, as one row is under way: give it at least 2."
        )
    if gap < 1:
        raise ValueError(f"a replay with gap={gap}: a slot is shared by at least 1 step.")
    layout = Layout(
        step=packing.layout(spec._replace(obs=(), next_obs=())),
        obs=packing.layout(spec.obs, obs_dtype),
        rows=rows,
        num_envs=num_envs,
        gap=gap,
    )
    items = (rows + 1 + -(-rows // gap)) * num_envs
    return UniformState(jnp.zeros((items, layout.words), jnp.uint32), jnp.int32(0), jnp.int32(0), layout)


def add(state: UniformState, transitions: Transition) -> UniformState:
    """Write a block of transitions ``[T, B, ...]`` over the oldest ones.

    Blocks follow each other: each begins where the one before it led to, or with a new episode. Every add has the
    same ``T``, which divides the rows: then no block wraps.

    Raises:
        ValueError: it is no block, of other environments than the ring's, or its ``T`` does not divide the rows.
    """
    layout = state.layout
    length, num_envs = block_shape(layout, transitions)
    items = jax.tree.map(lambda leaf: leaf.reshape(length * num_envs, *leaf.shape[2:]), transitions)
    obs, next_obs = layout.obs.pack(items.obs), layout.obs.pack(items.next_obs)
    step = layout.step.pack(items._replace(obs=(), next_obs=()))
    ahead = jnp.zeros((num_envs, layout.step.words), jnp.uint32)
    block = jnp.concatenate(
        [jnp.concatenate([step, ahead]), jnp.concatenate([obs, next_obs[-num_envs:]])], axis=1
    )
    start = state.row * num_envs
    storage = jax.lax.dynamic_update_slice(state.storage, block, (start, jnp.int32(0)))
    index = start + jnp.arange(length * num_envs)
    tag = jnp.zeros_like(step).at[:, 0].set(index.astype(jnp.uint32))
    cut = (items.truncated & ~items.terminated).reshape(-1)
    slot = jnp.where(cut, _slot(layout, index), state.storage.shape[0])
    storage = storage.at[slot].set(jnp.concatenate([tag, next_obs], axis=1), mode="drop")
    return dataclasses.replace(
        state,
        storage=storage,
        row=(state.row + length) % layout.rows,
        filled=jnp.minimum(state.filled + length, layout.rows - 1),
    )


def block_shape(layout: Layout, transitions: Transition) -> tuple[int, int]:
    """Return ``T`` and ``B`` of a block; raises ValueError where it does not fit the ring."""
    shape = transitions.reward.shape
    if len(shape) != 2:
        raise ValueError(
            f"a block whose rewards have shape {shape}: expected [T, B]; give one step of {layout.num_envs} "
            "environments a leading axis of 1."
        )
    length, num_envs = shape
    check_num_envs(layout, num_envs)
    if layout.rows % length:
        raise ValueError(
            f"a block of {length} rows in a replay of {layout.rows}: blocks must divide the rows, or one would wrap; "
            f"jrl.replay.num_rows(capacity, {num_envs}, {length}) gives rows that fit."
        )
    return length, num_envs


def check_num_envs(layout: Layout, num_envs: int) -> None:
    """Raise ValueError unless the replay was made for so many environments."""
    if num_envs != layout.num_envs:
        raise ValueError(f"num_envs={num_envs} in a replay that was made for {layout.num_envs} environments.")


def sample(key: Key, state: UniformState, batch_size: int, num_envs: int, n: int = 1) -> Sample:
    """Draw ``batch_size`` windows, with replacement, their starts uniform over all items held.

    Uniform to ``items / 2^32``: a random word modulo the items, at half the cost of ``jax.random.randint``.

    Args:
        key: consumed.
        state: the ring, with at least one row filled.
        batch_size: ``N``, static.
        num_envs: ``B``, static.
        n: steps of a window at most, static.

    Raises:
        ValueError: the replay was made for another number of environments.
    """
    check_num_envs(state.layout, num_envs)
    held = (state.filled * num_envs).astype(jnp.uint32)
    age = (jax.random.bits(key, (batch_size,), jnp.uint32) % held).astype(jnp.int32)
    oldest = (state.row - state.filled) % state.layout.rows * num_envs
    index = (oldest + age) % (state.layout.rows * num_envs)
    return window(state, index, num_envs, n, jnp.zeros((batch_size,), jnp.float32))


def read(state: UniformState, index: Array) -> Transition:
    """Return the transitions at ``index`` (int32 ``[N]``, held), leaves ``[N, ...]``, see :class:`Sample`."""
    return steps(state, index)[0]


def steps(state: UniformState, index: Array) -> tuple[Transition, Array]:
    """Return what :func:`read` does, and whether a truncated step's ``next_obs`` was lost, bool ``[N]``."""
    step, obs = _unpack(state.layout, _gather(state.storage, index, state.layout.words))
    next_obs, lost = _successor(state, index, step.truncated & ~step.terminated)
    return step._replace(obs=obs, next_obs=next_obs), lost


def window(state: UniformState, index: Array, num_envs: int, n: int, log_weight: Array) -> Sample:
    """Gather the windows that start at ``index`` (int32 ``[N]``), of weights ``exp(log_weight)`` over their largest."""
    layout = state.layout
    items = layout.rows * num_envs
    start, obs = _unpack(layout, _gather(state.storage, index, layout.words))
    # Steps from the window's start to the newest row: a window must not run into the oldest ones behind it.
    available = (state.row - 1 - index // num_envs) % layout.rows
    rewards = [start.reward]
    terminated, truncated, last = start.terminated, start.truncated, index
    ongoing = ~(terminated | truncated)
    length = jnp.ones_like(index)
    for k in range(1, n):
        ongoing &= k <= available
        position = (index + k * num_envs) % items
        step = layout.step.unpack(_gather(state.storage, position, layout.step.words))
        rewards.append(jnp.where(ongoing, step.reward, 0.0))
        terminated = jnp.where(ongoing, step.terminated, terminated)
        truncated = jnp.where(ongoing, step.truncated, truncated)
        last = jnp.where(ongoing, position, last)
        length += ongoing
        ongoing &= ~(step.terminated | step.truncated)
    next_obs, lost = _successor(state, last, truncated & ~terminated)
    log_weight = jnp.where(lost, -jnp.inf, log_weight)
    # The largest of those that are learned from; where none is, a number from which −inf is as far.
    largest = jnp.maximum(log_weight.max(), jnp.finfo(log_weight.dtype).min)
    return Sample(
        obs=obs,
        action=start.action,
        rewards=jnp.stack(rewards),
        length=length,
        terminated=terminated,
        next_obs=next_obs,
        # The exponential last: XLA then computes it once, and not again for each of the head's outputs, as it would
        # where the record is unpacked.
        weight=jnp.exp(log_weight - largest),
        position=index,
    )


def _unpack(layout: Layout, items: Array) -> tuple[Transition, PyTree]:
    """Return what items ``[N, words]`` hold: the step, without observations, and where it started."""
    step, obs = jnp.split(items, (layout.step.words,), axis=1)
    return layout.step.unpack(step), layout.obs.unpack(obs)


def _successor(state: UniformState, index: Array, cut: Array) -> tuple[PyTree, Array]:
    """Return what the items at ``index`` led to, from the slots where ``cut``, and whether the slot was lost."""
    layout = state.layout
    at = jnp.where(cut, _slot(layout, index), index + layout.num_envs)
    ahead = _gather(state.storage, at, layout.words)
    return layout.obs.unpack(ahead[:, layout.step.words :]), cut & (ahead[:, 0] != index.astype(jnp.uint32))


def _slot(layout: Layout, index: Array) -> Array:
    """Return where in the storage lies what a truncated item led to; its tag, the first word, is the item."""
    row, env = index // layout.num_envs, index % layout.num_envs
    return (layout.rows + 1 + row // layout.gap) * layout.num_envs + env


def _gather(storage: Array, index: Array, words: int) -> Array:
    """Return ``storage[index, :words]``, reading no other word; ``index`` is within bounds."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return jax.lax.gather(storage, index[:, None], numbers, slice_sizes=(1, words), mode="promise_in_bounds")
