"""A point in the plane that moves towards a goal it is not shown: the tasks of meta-learning differ in the goal.

``Navigation2D-jrl``. Finn et al. 2017, https://arxiv.org/abs/1703.03400, section 5.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jrl.envs.build import from_functions
from jrl.envs.finite import check_count, replace_params
from jrl.envs.registry import register
from jrl.types import Array, Box, Environment, Key


class NavigationParams(NamedTuple):
    """Parameters, all traced.

    Attributes:
        goal: float32 ``[2]``; a distribution of tasks draws it uniformly from [-0.5, 0.5]².
        max_speed: float32, length of a step along either axis at action 1.
        radius: float32, how near to the goal an episode ends.
        max_steps: int32, time limit.
    """

    goal: Any = np.array([0.3, 0.4], np.float32)
    max_speed: Any = 0.1
    radius: Any = 0.01
    max_steps: Any = 100


def make(*, params: Any = None) -> Environment:
    """Build the plane: the point starts in the origin, observes where it is, and sets its velocity.

    The reward is minus the distance to the goal after the step, as in the code of the paper's authors (its text says
    squared); nothing observed tells where the goal is. An episode terminates within ``radius`` of it. Actions are in
    units of ``max_speed``, [-1, 1]².

    Args:
        params: :class:`NavigationParams`, or a mapping of fields to change.

    Raises:
        ValueError: a parameter that does not exist, or ``max_steps`` below 1.
    """

    def reset(key: Key, params: NavigationParams) -> tuple[Any, Array]:
        position = jnp.zeros((2,), jnp.float32)
        return (position, 0), position

    def transition(key: Key, state: Any, action: Array, params: NavigationParams) -> tuple:
        position, time = state
        position, time = position + params.max_speed * jnp.clip(action, -1.0, 1.0), time + 1
        distance = jnp.sqrt(jnp.square(position - params.goal).sum())
        return (position, time), position, -distance, distance < params.radius, time >= params.max_steps

    name = "Navigation2D-jrl"
    params = replace_params(NavigationParams(), params, name)
    check_count(name, max_steps=params.max_steps)
    return from_functions(reset, transition, params, Box((2,), -1.0, 1.0), name)


register("Navigation2D-jrl", make)
