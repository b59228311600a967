"""Two states, two actions: a traffic light, with the two rewards that introductions give it.

``TrafficLight-jrl``: states 0 red, 1 green; actions 0 stop, 1 forward. The light switches by itself, whatever
is done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jrl.envs.finite import Outcomes, Start, check_probability, from_outcomes, replace_params
from jrl.envs.registry import register
from jrl.types import Array, Discrete, Environment

REWARDS = {"right_action": 1.0, "forward_at_green": 0.0}


class TrafficParams(NamedTuple):
    """Parameters, all traced.

    Attributes:
        stop_at_red: float32, reward for stopping at red.
        forward_at_green: float32, reward for going at green; everything else gives 0.
        switch: float32 in [0, 1], the chance that the light changes in a step.
        max_steps: int32, time limit; no episode terminates.
    """

    stop_at_red: Any = 1.0
    forward_at_green: Any = 1.0
    switch: Any = 0.5
    max_steps: Any = 100


def make(*, reward: str = "right_action", params: Any = None, raw: bool = False) -> Environment:
    """Build the light with one of the rewards.

    ``"right_action"`` gives 1 for stopping at red and for going at green: with γ = 0.9 ``Q*(red) = [10, 9]``,
    ``Q*(green) = [9, 10]`` (in the order stop, forward), for every ``switch``. ``"forward_at_green"`` gives 1
    for going at green only: ``V*(green) = 5.5``, ``V*(red) = 4.5``, and both actions tie at red.

    Args:
        reward: ``"right_action"`` or ``"forward_at_green"``.
        params: :class:`TrafficParams`, or a mapping of fields to change.
        raw: observe the state as an int32 index, instead of one-hot float32 ``[2]``.

    Raises:
        ValueError: another reward, or a parameter that does not exist.
    """
    name = "TrafficLight-jrl"
    if reward not in REWARDS:
        raise ValueError(f"{name}: reward={reward!r}; it is one of {', '.join(REWARDS)}.")

    def outcomes(state: Array, action: Array, params: TrafficParams) -> Outcomes:
        gain = jnp.where(state == 1, params.forward_at_green, params.stop_at_red)
        return Outcomes(
            probability=jnp.stack([1.0 - params.switch, params.switch]),
            next_state=jnp.stack([state, 1 - state]),
            reward=jnp.full((2,), jnp.where(state == action, gain, 0.0)),
            terminated=jnp.zeros((2,), bool),
        )

    def first(params: TrafficParams) -> Start:
        return Start(jnp.full((2,), 0.5), jnp.arange(2))

    params = replace_params(TrafficParams(stop_at_red=REWARDS[reward]), params, name)
    check_probability(name, switch=params.switch)
    return from_outcomes(outcomes, first, 2, params, Discrete(2), name, raw=raw)


register("TrafficLight-jrl", make)
