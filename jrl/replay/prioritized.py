"""Proportional prioritised replay (Schaul et al., 2016, https://arxiv.org/abs/1511.05952)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jrl.replay import sum_tree, uniform
from jrl.types import Array, Key, Transition


class PrioritizedState(NamedTuple):
    """A ring of transitions, the tree of its priorities ``p^α``, and the largest priority seen."""

    ring: uniform.UniformState
    tree: sum_tree.Tree
    max_priority: Array


def init(
    spec: Transition, rows: int, num_envs: int, gap: int = 1, *, obs_dtype: Any = None
) -> PrioritizedState:
    """Return an empty ring, see :func:`jrl.replay.uniform.init`."""
    return PrioritizedState(
        ring=uniform.init(spec, rows, num_envs, gap, obs_dtype=obs_dtype),
        tree=sum_tree.init((rows + 1) * num_envs),
        max_priority=jnp.float32(1.0),
    )


def add(state: PrioritizedState, transitions: Transition) -> PrioritizedState:
    """Write a block ``[T, B, ...]`` with the largest priority seen, so that each item is likely drawn once."""
    length, num_envs = uniform.block_shape(state.ring.layout, transitions)
    # The row under way, behind the block, can not be drawn.
    priority = jnp.append(
        jnp.full((length * num_envs,), state.max_priority), jnp.zeros((num_envs,), jnp.float32)
    )
    tree = sum_tree.update_block(state.tree, state.ring.row * num_envs, priority)
    return state._replace(ring=uniform.add(state.ring, transitions), tree=tree)


def sample(
    key: Key, state: PrioritizedState, batch_size: int, num_envs: int, n: int = 1, *, beta: Array | float
) -> uniform.Sample:
    """Draw windows whose starts have ``P(i) = p_i^α / Σ p^α``, with importance weights.

    ``w_i = (M P(i))^-β / max_j w_j`` over those of the batch whose successor is not lost, ``M`` the items held.

    Raises:
        ValueError: the replay was made for another number of environments.
    """
    uniform.check_num_envs(state.ring.layout, num_envs)
    index, priority = sum_tree.sample(key, state.tree, batch_size)
    held = (state.ring.filled * num_envs).astype(jnp.float32)
    probability = priority / sum_tree.total(state.tree)
    log_weight = -beta * jnp.log(held * probability)
    return uniform.window(state.ring, index, num_envs, n, log_weight)


def update_priorities(
    state: PrioritizedState, index: Array, td_error: Array, *, alpha: Array | float, eps: float = 1e-6
) -> PrioritizedState:
    """Set ``p_i = (|δ_i| + ε)^α`` for the items drawn.

    Args:
        state: the replay.
        index: int32 ``[N]``, from the sample.
        td_error: δ, float32 ``[N]``.
        alpha: how much priorities matter; 0 is uniform.
        eps: keeps every item drawable, above 0.
    """
    priority = from_error(td_error, alpha, eps)
    return state._replace(
        tree=sum_tree.update(state.tree, index, priority),
        max_priority=jnp.maximum(state.max_priority, priority.max()),
    )


def from_error(error: Array, alpha: Array | float, eps: float) -> Array:
    """Return ``(|error| + ε)^α``."""
    # Not a power, which XLA's CPU computes one element at a time.
    size = jnp.maximum(jnp.abs(error) + eps, jnp.finfo(jnp.float32).tiny)
    return jnp.exp(alpha * jnp.log(size))
