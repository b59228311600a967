"""Probe environments: each asks one question, and the answer is known exactly.

An algorithm that learns a wrong value on one of them has a definite fault (the docstring of each says which).
Each is a :class:`Probe` here, and an id for :func:`jrl.make`::

    probe = probes.TRUNCATION
    env = probe.env                       # or jrl.make("ProbeTruncation-jrl", params={"max_steps": 10})
    v = network(probe.observations)       # [K]
    np.testing.assert_allclose(v, probe.value(gamma=0.9), atol=0.1)

All observations are float32 vectors. ``K`` is the number of observations that a probe lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.build import from_functions
from jrl.envs.finite import check_count, replace_params
from jrl.envs.registry import register
from jrl.types import Array, Box, Discrete, Environment, Key


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """An environment and what is true of it.

    Attributes:
        id: what :func:`jrl.make` knows it by.
        build: ``params -> Environment``.
        params: default parameters.
        observations: float32 ``[K, D]``; those whose values are known.
        action_values: ``(params, gamma) -> [K, A]``, Q of the optimal policy; None for continuous actions.
        state_values: ``(params, gamma) -> [K]``; None where it is the maximum of ``action_values``.
        optimal_actions: int32 ``[K]`` or float32 ``[K, D]``; None where every action is as good.
    """

    id: str
    build: Callable[[Any], Environment]
    params: Any
    observations: np.ndarray
    action_values: Callable[[Any, float], Any] | None
    state_values: Callable[[Any, float], Any] | None = None
    optimal_actions: np.ndarray | None = None

    @functools.cached_property
    def env(self) -> Environment:
        """The environment with its default parameters, built once."""
        return self.build(self.params)

    def make(self, params: Any = None) -> Environment:
        """Build it with other parameters: a record like ``self.params``, or a mapping of fields to change.

        Raises:
            TypeError: ``params`` is neither.
            ValueError: a parameter that does not exist, or ``max_steps`` or ``delay`` below 1.
        """
        params = replace_params(self.params, params, self.id)
        counts = {name: getattr(params, name) for name in ("max_steps", "delay") if hasattr(params, name)}
        check_count(self.id, **counts)
        return self.build(params)

    def q(self, gamma: float, params: Any = None) -> np.ndarray:
        """Return Q of the optimal policy at ``observations``, ``[K, A]``.

        Raises:
            ValueError: the probe has continuous actions.
        """
        if self.action_values is None:
            raise ValueError(f"{self.id}: actions are continuous, there is no table of Q; use value(gamma).")
        params = self.params if params is None else params
        table = np.asarray(self.action_values(params, gamma), np.float64)
        return np.array(np.broadcast_to(table, (len(self.observations), table.shape[-1])))

    def value(self, gamma: float, params: Any = None) -> np.ndarray:
        """Return V of the optimal policy at ``observations``, ``[K]``."""
        if self.state_values is None:
            return self.q(gamma, params).max(axis=1)
        params = self.params if params is None else params
        try:
            values = self.state_values(params, gamma)
        except ZeroDivisionError as error:
            raise ValueError(
                f"{self.id}: gamma={gamma}: its value is that of a perpetuity, gamma below 1."
            ) from error
        return np.array(np.broadcast_to(values, len(self.observations)), np.float64)


class RewardParams(NamedTuple):
    """``reward``: float32, the size of the reward."""

    reward: Any = 1.0


class LimitParams(NamedTuple):
    """``reward``: float32, for each step; ``max_steps``: int32, steps until truncation."""

    reward: Any = 1.0
    max_steps: Any = 5


class MemoryParams(NamedTuple):
    """``reward``: float32, for the right answer; ``delay``: int32, steps from cue to question (>= 1)."""

    reward: Any = 1.0
    delay: Any = 2


_ZERO = np.zeros((1, 1), np.float32)
_SIGNS = np.array([[-1.0], [1.0]], np.float32)


def _rows(*values: float) -> np.ndarray:
    """Q where both actions are worth the same."""
    return np.repeat(np.asarray(values, np.float64)[:, None], 2, axis=1)


def _blank(key: Key, params: Any) -> tuple[Any, Array]:
    """Reset to an observation that says nothing; the state is the time."""
    del key, params
    return jnp.zeros((), jnp.int32), jnp.zeros((1,))


def _sign(key: Key, params: Any) -> tuple[Any, Array]:
    """Reset to a random sign, shown; it is the state too."""
    del params
    sign = jax.random.rademacher(key, (1,), jnp.float32)
    return sign, sign


def _constant(params: RewardParams) -> Environment:
    def transition(key: Key, time: Array, action: Array, params: RewardParams) -> Any:
        del key, action
        return time, jnp.zeros((1,)), params.reward, True, False

    return from_functions(_blank, transition, params, Discrete(2), "ProbeConstant-jrl")


def _observation(params: RewardParams) -> Environment:
    def transition(key: Key, sign: Array, action: Array, params: RewardParams) -> Any:
        del key, action
        return sign, sign, params.reward * sign[0], True, False

    return from_functions(_sign, transition, params, Discrete(2), "ProbeObservation-jrl")


def _discount(params: RewardParams) -> Environment:
    def transition(key: Key, time: Array, action: Array, params: RewardParams) -> Any:
        del key, action
        last = time == 1
        return time + 1, jnp.ones((1,)), jnp.where(last, params.reward, 0.0), last, False

    return from_functions(_blank, transition, params, Discrete(2), "ProbeDiscount-jrl")


def _action(params: RewardParams) -> Environment:
    def transition(key: Key, time: Array, action: Array, params: RewardParams) -> Any:
        del key
        return time, jnp.zeros((1,)), jnp.where(action == 1, params.reward, -params.reward), True, False

    return from_functions(_blank, transition, params, Discrete(2), "ProbeAction-jrl")


def _policy(params: RewardParams) -> Environment:
    def transition(key: Key, sign: Array, action: Array, params: RewardParams) -> Any:
        del key
        right = (action == 1) == (sign[0] > 0)
        return sign, sign, jnp.where(right, params.reward, -params.reward), True, False

    return from_functions(_sign, transition, params, Discrete(2), "ProbePolicy-jrl")


def _truncation(params: LimitParams) -> Environment:
    def transition(key: Key, time: Array, action: Array, params: LimitParams) -> Any:
        del key, action
        return time + 1, jnp.zeros((1,)), params.reward, False, time + 1 >= params.max_steps

    return from_functions(_blank, transition, params, Discrete(2), "ProbeTruncation-jrl")


def _successor(params: LimitParams) -> Environment:
    def transition(key: Key, time: Array, action: Array, params: LimitParams) -> Any:
        del key, action
        reward = jnp.where(time > 0, params.reward, 0.0)
        return time + 1, jnp.ones((1,)), reward, False, time + 1 >= params.max_steps

    return from_functions(_blank, transition, params, Discrete(2), "ProbeSuccessor-jrl")


def _both_flags(params: RewardParams) -> Environment:
    def transition(key: Key, time: Array, action: Array, params: RewardParams) -> Any:
        del key, action
        return time, jnp.zeros((1,)), params.reward, True, True

    return from_functions(_blank, transition, params, Discrete(2), "ProbeBothFlags-jrl")


def _continuous(params: RewardParams) -> Environment:
    def transition(key: Key, sign: Array, action: Array, params: RewardParams) -> Any:
        del key
        return sign, sign, -params.reward * (action[0] - 0.5 * sign[0]) ** 2, True, False

    return from_functions(_sign, transition, params, Box((1,), -1.0, 1.0), "ProbeContinuous-jrl")


def _memory(params: MemoryParams) -> Environment:
    def reset(key: Key, params: MemoryParams) -> tuple[Any, Array]:
        del params
        cue = jax.random.rademacher(key, (), jnp.float32)
        return (cue, jnp.zeros((), jnp.int32)), jnp.stack([cue, 0.0])

    def transition(key: Key, state: tuple[Array, Array], action: Array, params: MemoryParams) -> Any:
        del key
        cue, time = state
        asked, right = time == params.delay, (action == 1) == (cue > 0)
        reward = jnp.where(asked, jnp.where(right, params.reward, -params.reward), 0.0)
        obs = jnp.stack([0.0, (time + 1 == params.delay).astype(jnp.float32)])
        return (cue, time + 1), obs, reward, asked, False

    return from_functions(reset, transition, params, Discrete(2), "ProbeMemory-jrl")


CONSTANT = Probe("ProbeConstant-jrl", _constant, RewardParams(), _ZERO, lambda p, g: _rows(p.reward))
"""One step, reward ``r``, terminates: ``V = r``. A value that differs is a fault of the value loss."""

OBSERVATION = Probe(
    "ProbeObservation-jrl", _observation, RewardParams(), _SIGNS, lambda p, g: _rows(-p.reward, p.reward)
)
"""One step, the observation is ±1 and the reward ``r`` times it: ``V(±1) = ±r``. Faults: the value does not
see the observation, observations and targets are misaligned."""

DISCOUNT = Probe(
    "ProbeDiscount-jrl",
    _discount,
    RewardParams(),
    np.array([[0.0], [1.0]], np.float32),
    lambda p, g: _rows(g * p.reward, p.reward),
)
"""Two steps, reward ``r`` in the second: ``V(0) = γ r``, ``V(1) = r``. Faults: discounting, bootstrapping."""

ACTION = Probe(
    "ProbeAction-jrl",
    _action,
    RewardParams(),
    _ZERO,
    lambda p, g: np.array([[-p.reward, p.reward]]),
    optimal_actions=np.array([1], np.int32),
)
"""One step, action 0 gives ``-r``, action 1 gives ``r``: ``Q = [-r, r]``. Faults: the policy's loss."""

POLICY = Probe(
    "ProbePolicy-jrl",
    _policy,
    RewardParams(),
    _SIGNS,
    lambda p, g: np.array([[p.reward, -p.reward], [-p.reward, p.reward]]),
    optimal_actions=np.array([0, 1], np.int32),
)
"""One step, action 1 is right where the observation is +1, action 0 where it is -1: ``r`` if right, else
``-r``. Faults: actions or advantages belong to other observations than they are trained with."""

TRUNCATION = Probe(
    "ProbeTruncation-jrl", _truncation, LimitParams(), _ZERO, lambda p, g: _rows(p.reward / (1.0 - g))
)
"""Reward ``r`` each step, never terminates, truncated after ``max_steps``, which the observation does not
tell: ``V = r / (1 - γ)`` for every limit. Fault: a truncation taken for a termination (``V`` then is at most
``r (1 - γ^max_steps) / (1 - γ)``)."""

SUCCESSOR = Probe(
    "ProbeSuccessor-jrl",
    _successor,
    LimitParams(max_steps=2),
    np.array([[0.0], [1.0]], np.float32),
    lambda p, g: _rows(g * p.reward / (1.0 - g), p.reward / (1.0 - g)),
)
"""Starts in 0, then stays in 1 for ever; reward ``r`` for each step taken in 1; truncated after ``max_steps``
(at least 2): ``V(1) = r / (1 - γ)``, ``V(0) = γ V(1)``. Fault: at a truncation the value of the reset
observation is used, not that of the true successor (with ``max_steps=2`` then ``V(1) = r / (1 - γ²)``)."""

BOTH_FLAGS = Probe("ProbeBothFlags-jrl", _both_flags, RewardParams(), _ZERO, lambda p, g: _rows(p.reward))
"""One step, reward ``r``, terminated *and* truncated: ``V = r``. Fault: truncation wins (``r / (1 - γ)``)."""

CONTINUOUS = Probe(
    "ProbeContinuous-jrl",
    _continuous,
    RewardParams(),
    _SIGNS,
    None,
    state_values=lambda p, g: np.zeros(2),
    optimal_actions=0.5 * _SIGNS,
)
"""One step, action in [-1, 1], reward ``-r (a - obs/2)²``: the best action is ``obs/2``, its value 0; a
policy ``N(μ, σ²)`` is worth ``-r ((μ - obs/2)² + σ²)``."""

MEMORY = Probe(
    "ProbeMemory-jrl",
    _memory,
    MemoryParams(),
    np.array([[-1.0, 0.0], [1.0, 0.0]], np.float32),
    lambda p, g: _rows(g**p.delay * p.reward, g**p.delay * p.reward),
)
"""The first observation ``[±1, 0]`` is a cue, then come zeros, and ``delay`` steps later the question
``[0, 1]``: action 1 is right after the cue +1, action 0 after -1; ``r`` if right, else ``-r``. With a memory
``V = γ^delay r`` at the cue; without one the best is 0."""

PROBES: tuple[Probe, ...] = (
    CONSTANT,
    OBSERVATION,
    DISCOUNT,
    ACTION,
    POLICY,
    TRUNCATION,
    SUCCESSOR,
    BOTH_FLAGS,
    CONTINUOUS,
    MEMORY,
)
"""All of them, the simplest first."""

for _probe in PROBES:
    register(_probe.id, _probe.make)
