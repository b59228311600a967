"""A ring of transitions with uniform sampling.

The ring is flat, ``[rows · B, words]``, a row being one time step of all ``B`` environments and an item one
packed transition, so that the successor of item ``i`` in its own environment is item ``i + B``. Adding writes
one contiguous block at a position that never wraps: in a donated or scanned state XLA does it in place.
Sampling reads O(batch) items, each from one place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.replay import packing
from jrl.types import Array, Key, PyTree, Transition


class Layout(NamedTuple):
    """How one item's words divide: the numbers and flags of its step, where it started, where it led."""

    step: packing.Layout
    obs: packing.Layout
    next_obs: packing.Layout

    @property
    def words(self) -> int:
        """32-bit words of an item."""
        return self.step.words + self.obs.words + self.next_obs.words


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("storage", "row", "filled"), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True)
class UniformState:
    """The ring: ``storage`` uint32 ``[rows · B, words]``, the ``row`` written next, ``filled`` rows.

    ``layout`` is static. :func:`read` gives back transitions.
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
        next_obs: the true successor of the window's last step, ``[N, ...]``.
        weight: importance weight, float32 ``[N]`` (1 for uniform sampling).
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
    """Return the rows of a ring of at least ``capacity`` items whose blocks of rows never wrap."""
    block = num_envs * block_length
    return -(-capacity // block) * block_length


def init(spec: Transition, rows: int, num_envs: int) -> UniformState:
    """Return an empty ring.

    Args:
        spec: shapes and dtypes of one transition (leaves ShapeDtypeStruct); the ring keeps these dtypes.
        rows: time steps kept.
        num_envs: ``B``.

    Raises:
        TypeError: a leaf is neither a bool, an integer nor a float of 8 to 64 bits.
    """
    layout = Layout(
        packing.layout(spec._replace(obs=(), next_obs=())),
        packing.layout(spec.obs),
        packing.layout(spec.next_obs),
    )
    storage = jnp.zeros((rows * num_envs, layout.words), jnp.uint32)
    return UniformState(storage, jnp.int32(0), jnp.int32(0), layout)


def add(state: UniformState, transitions: Transition) -> UniformState:
    """Write a block of transitions ``[T, B, ...]`` over the oldest ones.

    ``T`` must divide the rows, and every add the same ``T`` (or a multiple): then no block wraps.

    Raises:
        ValueError: the block is larger than the ring, or its rows do not divide the ring's.
    """
    length, num_envs = transitions.reward.shape
    rows = state.storage.shape[0] // num_envs
    if length > rows:
        raise ValueError(f"a block of {length} rows does not fit a replay of {rows}: raise the capacity.")
    items = jax.tree.map(lambda leaf: leaf.reshape(length * num_envs, *leaf.shape[2:]), transitions)
    block = jnp.concatenate(
        [
            state.layout.step.pack(items._replace(obs=(), next_obs=())),
            state.layout.obs.pack(items.obs),
            state.layout.next_obs.pack(items.next_obs),
        ],
        axis=1,
    )
    return dataclasses.replace(
        state,
        storage=jax.lax.dynamic_update_slice(state.storage, block, (state.row * num_envs, 0)),
        row=(state.row + length) % rows,
        filled=jnp.minimum(state.filled + length, rows),
    )


def sample(key: Key, state: UniformState, batch_size: int, num_envs: int, n: int = 1) -> Sample:
    """Draw ``batch_size`` windows, with replacement, their starts uniform over all items held.

    Uniform to ``items / 2^32``: a random word modulo the items, at half the cost of ``jax.random.randint``.

    Args:
        key: consumed.
        state: the ring, with at least one row filled.
        batch_size: ``N``, static.
        num_envs: ``B``, static.
        n: steps of a window at most, static.
    """
    held = (state.filled * num_envs).astype(jnp.uint32)
    index = (jax.random.bits(key, (batch_size,), jnp.uint32) % held).astype(jnp.int32)
    return window(state, index, num_envs, n, jnp.ones((batch_size,), jnp.float32))


def read(state: UniformState, index: Array) -> Transition:
    """Return the transitions at ``index`` (int32 ``[N]``, within the ring), leaves ``[N, ...]``."""
    layout = state.layout
    step, obs, next_obs = jnp.split(
        _gather(state.storage, index, 0, layout.words),
        (layout.step.words, layout.step.words + layout.obs.words),
        axis=1,
    )
    return layout.step.unpack(step)._replace(
        obs=layout.obs.unpack(obs), next_obs=layout.next_obs.unpack(next_obs)
    )


def window(state: UniformState, index: Array, num_envs: int, n: int, weight: Array) -> Sample:
    """Gather the windows that start at ``index`` (int32 ``[N]``), see :class:`Sample`."""
    items, words = state.storage.shape
    rows = items // num_envs
    first = read(state, index)
    # Steps from the window's start to the newest row: a window must not run into the oldest ones behind it.
    available = (state.row - 1 - index // num_envs) % rows
    rewards = [first.reward]
    terminated, last = first.terminated, index
    ongoing = ~(terminated | first.truncated)
    length = jnp.ones_like(index)
    for k in range(1, n):
        ongoing &= k <= available
        position = (index + k * num_envs) % items
        step = state.layout.step.unpack(_gather(state.storage, position, 0, state.layout.step.words))
        rewards.append(jnp.where(ongoing, step.reward, 0.0))
        terminated = jnp.where(ongoing, step.terminated, terminated)
        last = jnp.where(ongoing, position, last)
        length += ongoing
        ongoing &= ~(step.terminated | step.truncated)
    next_obs = first.next_obs
    if n > 1:
        start = words - state.layout.next_obs.words
        next_obs = state.layout.next_obs.unpack(_gather(state.storage, last, start, words))
    return Sample(
        obs=first.obs,
        action=first.action,
        rewards=jnp.stack(rewards),
        length=length,
        terminated=terminated,
        next_obs=next_obs,
        weight=weight,
        position=index,
    )


def _gather(storage: Array, index: Array, start: int, stop: int) -> Array:
    """Return ``storage[index, start:stop]``, reading no other word; ``index`` is within bounds."""
    starts = jnp.stack([index, jnp.full_like(index, start)], axis=-1)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )
    return jax.lax.gather(storage, starts, numbers, slice_sizes=(1, stop - start), mode="promise_in_bounds")
