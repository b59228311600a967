"""Two small environments on which plausible algorithms fail: divergence, and an optimistic maximum.

Both factories take ``params`` (the record, or a mapping of fields to change) and ``raw`` (observe the state as an
int32 index, instead of one-hot float32 ``[S]``), and raise ValueError for a parameter that does not exist.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.batched import from_batched_functions, uniform
from jrl.envs.finite import Outcomes, Start, check_count, from_outcomes, replace_params
from jrl.envs.registry import register
from jrl.types import Array, Discrete, Environment, FiniteObservation


class BairdParams(NamedTuple):
    """``max_steps``: int32, time limit; no episode terminates."""

    max_steps: Any = 1_000_000


def baird(*, params: Any = None, raw: bool = False) -> Environment:
    """Baird's star: action k leads to state k of seven, whatever the state; no rewards.

    Random actions lead to one of the six upper states with 6/7, as the book's behaviour policy does, whose dashed
    action is here six. With :data:`BAIRD_FEATURES` every value is representable and all are 0, yet semi-gradient
    off-policy learning diverges. Baird 1995, "Residual Algorithms"; Sutton and Barto 2018, section 11.2.
    """
    name = "Baird-jrl"

    def outcomes(state: Array, action: Array, params: BairdParams) -> Outcomes:
        return Outcomes(jnp.ones(1), action[None], jnp.zeros(1), jnp.zeros(1, bool))

    def first(params: BairdParams) -> Start:
        return Start(jnp.full((7,), 1 / 7), jnp.arange(7))

    params = replace_params(BairdParams(), params, name)
    return from_outcomes(outcomes, first, 7, params, Discrete(7), name, raw=raw)


BAIRD_FEATURES = np.concatenate([2 * np.eye(7), np.ones((7, 1))], axis=1).astype(np.float32)
BAIRD_FEATURES[6, 6:] = 1.0, 2.0


class BiasParams(NamedTuple):
    """``mean``, ``spread``: float32, of the normal reward in state 1; ``max_steps``: int32, time limit."""

    mean: Any = -0.1
    spread: Any = 1.0
    max_steps: Any = 100


def maximization_bias(*, num_actions: int = 10, params: Any = None, raw: bool = False) -> Environment:
    """In state 0 action 0 ends the episode with 0, action 1 leads to state 1, where all rewards are −0.1 ± 1.

    The maximum over the noisy actions of state 1 lures Q-learning there. Sutton and Barto 2018, example 6.7. In
    state 0 actions above 1 are like action 0; :data:`BIAS_MASK` leaves them out, as the book does.
    """
    name = "MaximizationBias-jrl"

    def reset(words: Array, params: BiasParams) -> tuple[Array, Array]:
        zero = jnp.zeros(words.shape[1], jnp.int32)
        return zero, zero

    def transition(words: Array, state: tuple, action: Array, params: BiasParams) -> tuple[Any, ...]:
        place, time = state
        normal = jnp.sqrt(2.0) * jax.scipy.special.erfinv(uniform(words[0] | 512, -1.0, 1.0))
        goes = (place == 0) & (action == 1)
        reward = jnp.where(place == 1, params.mean + params.spread * normal, 0.0)
        return (jnp.where(goes, 1, place), time + 1), reward, ~goes, time + 1 >= params.max_steps

    def observe(state: tuple) -> Array:
        return state[0] if raw else jax.nn.one_hot(state[0], 2, dtype=jnp.float32)

    params = replace_params(BiasParams(), params, name)
    check_count(name, max_steps=params.max_steps)
    env = from_batched_functions(
        reset, transition, observe, params, Discrete(num_actions), name, step_words=1
    )
    return env._replace(observation=FiniteObservation(2, one_hot=not raw))


BIAS_MASK = np.arange(10) < np.array([[2], [10]])

register("Baird-jrl", baird)
register("MaximizationBias-jrl", maximization_bias)
