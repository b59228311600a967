"""The small environments of the textbooks: a cliff, a river, a deep sea, and processes drawn at random.

Each factory takes ``params`` (its record, or a mapping of fields to change) and ``raw`` (observe the state as an
int32 index, instead of one-hot float32 ``[S]``), and raises ValueError for a parameter that does not exist and
for a size that is no whole number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.build import check_whole
from jrl.envs.finite import Outcomes, Start, check_probability, from_mdp, from_outcomes, replace_params
from jrl.envs.registry import register
from jrl.ops.mdp import random_mdp
from jrl.types import Array, Discrete, Environment


def _at(state: int) -> Start:
    return Start(jnp.ones(1), jnp.full((1,), state))


def _certain(next_state: Array, reward: Array, terminated: Array) -> Outcomes:
    return Outcomes(jnp.ones(1), next_state[None], reward[None], terminated[None])


# ------------------------------------------------------------------------------------------ CliffWalking


class CliffParams(NamedTuple):
    """``step_reward``, ``cliff_reward``: float32; ``max_steps``: int32, time limit."""

    step_reward: Any = -1.0
    cliff_reward: Any = -100.0
    max_steps: Any = 1_000


def cliff_walking(*, params: Any = None, raw: bool = False) -> Environment:
    """Walk along a cliff, 4 × 12 cells, from the lower left (36) to the lower right corner (47).

    A step off the cliff (37 to 46) costs 100 and leads back to the start; every other one costs 1. Actions 0
    up, 1 right, 2 down, 3 left. Sutton and Barto 2018, example 6.6: the shortest way takes 13 steps, the one
    furthest from the cliff 17.
    """
    name = "CliffWalking-jrl"

    def outcomes(state: Array, action: Array, params: CliffParams) -> Outcomes:
        row = jnp.clip(state // 12 + (action == 2) - (action == 0), 0, 3)
        column = jnp.clip(state % 12 + (action == 1) - (action == 3), 0, 11)
        to = row * 12 + column
        fell = (to > 36) & (to < 47)
        over = state == 47
        reward = jnp.where(fell, params.cliff_reward, params.step_reward)
        to = jnp.where(fell, 36, jnp.where(over, state, to))
        return _certain(to, jnp.where(over, 0.0, reward), over | (to == 47))

    params = replace_params(CliffParams(), params, name)
    return from_outcomes(outcomes, lambda params: _at(36), 48, params, Discrete(4), name, raw=raw)


# --------------------------------------------------------------------------------------------- RiverSwim


class RiverParams(NamedTuple):
    """Parameters, all traced.

    Attributes:
        left_reward: float32, for staying at the left bank.
        right_reward: float32, for staying at the right bank.
        advance: float32, the chance to get ahead against the current.
        retreat: float32, the chance to be washed back.
        max_steps: int32, time limit; no episode terminates.
    """

    left_reward: Any = 0.005
    right_reward: Any = 1.0
    advance: Any = 0.35
    retreat: Any = 0.05
    max_steps: Any = 200


def river_swim(*, num_states: int = 6, params: Any = None, raw: bool = False) -> Environment:
    """Swim against a current: little to gain on the left at once, much on the right after a long effort.

    Action 0 drifts left, action 1 swims right. From the left bank a stroke succeeds with 0.6, and at the right
    bank it holds with 0.6. Strehl and Littman 2008, https://doi.org/10.1016/j.jcss.2007.08.009, with the
    numbers of Osband, Russo and Van Roy 2013, arXiv:1306.0940.
    """
    name = "RiverSwim-jrl"
    check_whole(name, num_states=num_states)
    if num_states < 3:
        raise ValueError(f"{name}: num_states={num_states}; a river has at least 3 states.")
    last = num_states - 1

    def outcomes(state: Array, action: Array, params: RiverParams) -> Outcomes:
        swims = action == 1
        left, right = jnp.maximum(state - 1, 0), jnp.minimum(state + 1, last)
        ahead, back = params.advance, params.retreat
        middle = jnp.stack([back, 1.0 - ahead - back, ahead])
        banks = jnp.where(state == 0, jnp.array([0.0, 0.4, 0.6]), jnp.array([0.4, 0.6, 0.0]))
        swimming = jnp.where((state == 0) | (state == last), banks, middle)
        stays = jnp.where((state == last) & swims, params.right_reward, 0.0)
        drifts = jnp.where((state == 0) & ~swims, params.left_reward, 0.0)
        return Outcomes(
            probability=jnp.where(swims, swimming, jnp.array([1.0, 0.0, 0.0])),
            next_state=jnp.stack([left, state, right]),
            reward=jnp.stack([drifts, stays, jnp.zeros_like(stays)]),
            terminated=jnp.zeros((3,), bool),
        )

    params = replace_params(RiverParams(), params, name)
    strokes = {"advance": params.advance, "retreat": params.retreat}
    check_probability(name, **strokes, **{"advance + retreat": params.advance + params.retreat})
    return from_outcomes(outcomes, lambda params: _at(0), num_states, params, Discrete(2), name, raw=raw)


# ----------------------------------------------------------------------------------------------- DeepSea


class SeaParams(NamedTuple):
    """Parameters, all traced.

    Attributes:
        right: int32 ``[size, size]``, which action leads to the right in each cell.
        treasure: float32, reward in the lower right corner.
        move_cost: float32, cost of all ``size`` moves to the right together.
        max_steps: int32, time limit; an episode ends after ``size`` steps by itself.
    """

    right: Any
    treasure: Any = 1.0
    move_cost: Any = 0.01
    max_steps: Any = 1_000_000


def deep_sea(
    *, size: int = 10, seed: int | None = None, params: Any = None, raw: bool = False
) -> Environment:
    """Sink through ``size`` rows, one a step, and move right each time: only that finds the treasure.

    Cell ``row × size + column``. Which of the two actions leads right is drawn for each cell from ``seed``;
    None takes action 1 everywhere. Osband et al. 2020 ("Behaviour Suite"), arXiv:1908.03568: random actions
    find the treasure with chance ``2^-size``.
    """
    name = "DeepSea-jrl"
    check_whole(name, size=size, seed=0 if seed is None else seed)
    if size < 2:
        raise ValueError(f"{name}: size={size}; a sea has at least 2 rows.")
    drawn = 1 if seed is None else np.random.default_rng(seed).integers(0, 2, (size, size))
    mapping = np.broadcast_to(np.asarray(drawn, np.int32), (size, size))

    def outcomes(state: Array, action: Array, params: SeaParams) -> Outcomes:
        row, column = state // size, state % size
        goes_right = action == params.right[row, column]
        to_column = jnp.clip(jnp.where(goes_right, column + 1, column - 1), 0, size - 1)
        found = goes_right & (column == size - 1) & (row == size - 1)
        reward = jnp.where(found, params.treasure, 0.0) - jnp.where(goes_right, params.move_cost / size, 0.0)
        # The bottom is observed last; there is no row below it.
        return _certain(jnp.minimum(row + 1, size - 1) * size + to_column, reward, row == size - 1)

    params = replace_params(SeaParams(mapping), params, name)
    return from_outcomes(outcomes, lambda params: _at(0), size * size, params, Discrete(2), name, raw=raw)


# ------------------------------------------------------------------------------------------- random MDPs


def random_process(
    *,
    num_states: int = 50,
    num_actions: int = 5,
    seed: int = 0,
    branching: int | None = None,
    params: Any = None,
    raw: bool = False,
) -> Environment:
    """One process drawn by :func:`jrl.ops.mdp.random_mdp` from ``seed``; it never terminates."""
    name = "RandomMDP-jrl"
    check_whole(name, num_states=num_states, num_actions=num_actions, seed=seed)
    mdp = random_mdp(jax.random.key(seed), num_states, num_actions, 0.9, branching=branching)
    params = replace_params(from_mdp(mdp, name=name).params, params, name)
    return from_mdp(params.mdp, start=params.start, max_steps=params.max_steps, raw=raw, name=name)


for _id, _factory in {
    "CliffWalking-jrl": cliff_walking,
    "RiverSwim-jrl": river_swim,
    "DeepSea-jrl": deep_sea,
    "RandomMDP-jrl": random_process,
}.items():
    register(_id, _factory)
