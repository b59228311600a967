"""The model of Dyna-Q: what followed each state and action the last time (Sutton 1990)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from jrl.types import Array


@struct.dataclass
class Model:
    """What was seen of a deterministic environment.

    Attributes:
        reward: float32 ``[S, A]``.
        discount: float32 ``[S, A]``, 0 where the episode terminated, else 1; -1 where nothing was seen.
        next_state: int32 ``[S, A]``.
        pairs: int32 ``[S·A]``, the pairs seen, ``state · A + action``, in the order of their first visit.
        num_pairs: int32 ``[]``.
    """

    reward: Array
    discount: Array
    next_state: Array
    pairs: Array
    num_pairs: Array


def empty(num_states: int, num_actions: int) -> Model:
    """Return a model that has seen nothing."""
    table, pairs = (num_states, num_actions), num_states * num_actions
    return Model(
        reward=jnp.zeros(table, jnp.float32),
        discount=jnp.full(table, -1.0, jnp.float32),
        next_state=jnp.zeros(table, jnp.int32),
        pairs=jnp.zeros((pairs,), jnp.int32),
        num_pairs=jnp.int32(0),
    )


def remember(
    model: Model, state: Array, action: Array, reward: Array, terminated: Array, next_state: Array
) -> Model:
    """Store what followed a pair; the last observation of it counts."""
    new = model.discount[state, action] < 0.0
    pair = (state * model.reward.shape[1] + action).astype(jnp.int32)
    # A pair that is known writes to the slot behind the last, where the next new one goes; a full list has none.
    slot = jnp.minimum(model.num_pairs, len(model.pairs) - 1)
    return Model(
        reward=model.reward.at[state, action].set(reward),
        discount=model.discount.at[state, action].set(1.0 - terminated),
        next_state=model.next_state.at[state, action].set(next_state),
        pairs=model.pairs.at[slot].set(jnp.where(new, pair, model.pairs[slot])),
        num_pairs=model.num_pairs + new,
    )


def sample(model: Model, uniform: Array) -> Array:
    """Return pairs drawn evenly among those seen, int32 of the shape of ``uniform`` (in [0, 1))."""
    return model.pairs[jnp.floor(uniform * model.num_pairs).astype(jnp.int32)]
