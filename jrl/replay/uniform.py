"""A ring of transitions with uniform sampling.

The ring is flat, ``[rows · B, ...]``, a row being one time step of all ``B`` environments, so that the
successor of item ``i`` in its own environment is item ``i + B``. Adding writes one contiguous block at a
position that never wraps: in a donated or scanned state XLA does it in place. Sampling reads O(batch) items.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.types import Array, Key, PyTree, Transition


class UniformState(NamedTuple):
    """The ring: ``storage`` with leaves ``[rows · B, ...]``, the ``row`` written next, ``filled`` rows."""

    storage: Transition
    row: Array
    filled: Array


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
    """
    storage = jax.tree.map(lambda leaf: jnp.zeros((rows * num_envs, *leaf.shape), leaf.dtype), spec)
    return UniformState(storage, jnp.int32(0), jnp.int32(0))


def add(state: UniformState, transitions: Transition) -> UniformState:
    """Write a block of transitions ``[T, B, ...]`` over the oldest ones.

    ``T`` must divide the rows, and every add the same ``T`` (or a multiple): then no block wraps.

    Raises:
        ValueError: the block is larger than the ring, or its rows do not divide the ring's.
    """
    length, num_envs = transitions.reward.shape
    rows = state.storage.reward.shape[0] // num_envs
    if length > rows:
        raise ValueError(f"a block of {length} rows does not fit a replay of {rows}: raise the capacity.")

    def write(ring: Array, block: Array) -> Array:
        block = block.reshape(length * num_envs, *block.shape[2:]).astype(ring.dtype)
        start = (state.row * num_envs,) + (0,) * (ring.ndim - 1)
        return jax.lax.dynamic_update_slice(ring, block, start)

    return UniformState(
        jax.tree.map(write, state.storage, transitions),
        (state.row + length) % rows,
        jnp.minimum(state.filled + length, rows),
    )


def sample(key: Key, state: UniformState, batch_size: int, num_envs: int, n: int = 1) -> Sample:
    """Draw ``batch_size`` windows, with replacement, their starts uniform over all items held.

    Args:
        key: consumed.
        state: the ring, with at least one row filled.
        batch_size: ``N``, static.
        num_envs: ``B``, static.
        n: steps of a window at most, static.
    """
    index = jax.random.randint(key, (batch_size,), 0, state.filled * num_envs)
    return window(state, index, num_envs, n, jnp.ones((batch_size,), jnp.float32))


def window(state: UniformState, index: Array, num_envs: int, n: int, weight: Array) -> Sample:
    """Gather the windows that start at ``index`` (int32 ``[N]``), see :class:`Sample`."""
    storage = state.storage
    items = storage.reward.shape[0]
    rows = items // num_envs
    # Steps from the window's start to the newest row: a window must not run into the oldest ones behind it.
    available = (state.row - 1 - index // num_envs) % rows
    rewards = [storage.reward[index]]
    terminated, last = storage.terminated[index], index
    ongoing = ~(terminated | storage.truncated[index])
    length = jnp.ones_like(index)
    for k in range(1, n):
        ongoing &= k <= available
        position = (index + k * num_envs) % items
        rewards.append(jnp.where(ongoing, storage.reward[position], 0.0))
        terminated = jnp.where(ongoing, storage.terminated[position], terminated)
        last = jnp.where(ongoing, position, last)
        length += ongoing
        ongoing &= ~(storage.terminated[position] | storage.truncated[position])
    return Sample(
        obs=jax.tree.map(lambda leaf: leaf[index], storage.obs),
        action=storage.action[index],
        rewards=jnp.stack(rewards),
        length=length,
        terminated=terminated,
        next_obs=jax.tree.map(lambda leaf: leaf[last], storage.next_obs),
        weight=weight,
        position=index,
    )
