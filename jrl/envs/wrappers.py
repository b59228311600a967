"""Wrappers that vectorise, limit time, and change actions and rewards.

Each is a function ``Environment -> Environment``. Numbers one would tune become part of ``params``, so that a
sweep over them does not recompile: a wrapper that has one makes ``params`` a record whose field ``env`` holds
the inner environment's parameters. Unless said otherwise apply them to the single environment, then
:func:`vectorize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.batched import OneOf
from jrl.envs.build import action_struct, check_whole, select
from jrl.envs.observations import check_single
from jrl.types import Array, Box, Discrete, Environment, Key, MultiDiscrete, PyTree, TimeStep


def vectorize(env: Environment, num_envs: int) -> Environment:
    """Run ``num_envs`` copies over a leading axis: states, observations, rewards … are ``[B, ...]``.

    One key goes in and is split, so that each copy has its own; ``params`` are shared by all copies. The
    specifications ``env.observation`` and ``env.action`` stay those of a *single* environment. An environment
    that is written for a whole batch (:mod:`jrl.envs.batched`) runs as it is written, on the one key.

    Raises:
        ValueError: ``num_envs`` is no whole number or below 1; when traced, actions are not one for each environment.
    """
    check_whole("vectorize", num_envs=num_envs)
    if num_envs < 1:
        raise ValueError(f"vectorize(num_envs={num_envs}): needs at least one environment.")
    if isinstance(env.reset, OneOf) and isinstance(env.step, OneOf):
        reset_many = env.reset.batched
        return env._replace(
            reset=lambda key, params: reset_many(key, params, num_envs), step=env.step.batched
        )

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        return jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, num_envs), params)

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        if jnp.shape(action)[:1] != (num_envs,):
            raise ValueError(
                f"{env.name}: actions of shape {jnp.shape(action)} for {num_envs} environments, expected "
                f"({num_envs}, ...): a first axis with one for each."
            )
        keys = jax.random.split(key, num_envs)
        return jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, env_state, action, params)

    return env._replace(reset=reset, step=step)


# ----------------------------------------------------------------------------------------------- time


class TimeLimitParams(NamedTuple):
    """``env``: the inner parameters; ``max_steps``: int32, steps after which an episode is truncated."""

    env: PyTree
    max_steps: Any


class TimeLimitState(NamedTuple):
    """``env_state``: the inner state; ``time``: int32 ``[]``, steps taken in this episode."""

    env_state: PyTree
    time: Array


def time_limit(env: Environment, max_steps: int) -> Environment:
    """Truncate episodes after ``max_steps`` steps (``params.max_steps``, traced).

    A limit of the inner environment that comes earlier still holds. Where the inner environment terminates in
    the very step that reaches the limit, both flags are true. The step that only this limit ends resets the
    inner environment with a key of its own, which costs a second reset each step: where the environment has
    a limit of its own (gymnax: ``params={"max_steps_in_episode": …}``), change that one instead.

    Raises:
        ValueError: ``max_steps`` is a number below 1; when traced, if the environment was vectorised first.
    """
    if not isinstance(max_steps, jax.core.Tracer) and np.any(np.asarray(max_steps) < 1):
        raise ValueError(f"time_limit(max_steps={max_steps}): an episode has at least one step.")

    def reset(key: Key, params: TimeLimitParams) -> tuple[TimeLimitState, PyTree]:
        env_state, obs = env.reset(key, params.env)
        check_single(env, obs)
        return TimeLimitState(env_state, jnp.zeros((), jnp.int32)), obs

    def step(key: Key, env_state: TimeLimitState, action: Array, params: TimeLimitParams) -> Any:
        step_key, reset_key = jax.random.split(key)
        inner_state, out = env.step(step_key, env_state.env_state, action, params.env)
        time = env_state.time + 1
        limit = time >= params.max_steps
        ended = out.terminated | out.truncated  # by the inner environment, which has then reset itself
        fresh = env.reset(reset_key, params.env)
        inner_state, obs = select(limit & ~ended, fresh, (inner_state, out.obs), env.name)
        state = TimeLimitState(inner_state, jnp.where(limit | ended, 0, time))
        return state, out._replace(obs=obs, truncated=out.truncated | limit)

    return env._replace(reset=reset, step=step, params=TimeLimitParams(env.params, max_steps))


# -------------------------------------------------------------------------------------------- actions


class StickyParams(NamedTuple):
    """``env``: the inner parameters; ``probability``: float32 in [0, 1], of repeating the last action."""

    env: PyTree
    probability: Any


class StickyState(NamedTuple):
    """``env_state``: the inner state; ``last_action``: what was executed; ``first``: no action yet."""

    env_state: PyTree
    last_action: Array
    first: Array


def sticky_actions(env: Environment, probability: float = 0.25) -> Environment:
    """Execute the previously executed action again with probability ``params.probability`` (traced).

    Machado et al. 2018, "Revisiting the Arcade Learning Environment", https://arxiv.org/abs/1709.06009. The
    first action of an episode has no predecessor and is executed as asked.

    Raises:
        ValueError: ``probability`` is a number outside [0, 1]; when traced, if the environment was vectorised first.
    """
    if isinstance(probability, int | float) and not 0.0 <= probability <= 1.0:
        raise ValueError(f"sticky_actions(probability={probability}): must be in [0, 1].")
    struct = action_struct(env.action)

    def reset(key: Key, params: StickyParams) -> tuple[StickyState, PyTree]:
        env_state, obs = env.reset(key, params.env)
        check_single(env, obs)
        return StickyState(env_state, jnp.zeros(struct.shape, struct.dtype), jnp.ones((), jnp.bool_)), obs

    def step(
        key: Key, env_state: StickyState, action: Array, params: StickyParams
    ) -> tuple[PyTree, TimeStep]:
        sticky_key, step_key = jax.random.split(key)
        repeat = jax.random.bernoulli(sticky_key, params.probability) & ~env_state.first
        executed = jnp.where(repeat, env_state.last_action, jnp.asarray(action, env_state.last_action.dtype))
        inner_state, out = env.step(step_key, env_state.env_state, executed, params.env)
        return StickyState(inner_state, executed, out.terminated | out.truncated), out

    return env._replace(reset=reset, step=step, params=StickyParams(env.params, probability))


def transform_action(env: Environment, fn: Callable[[Array], Array], action: Any) -> Environment:
    """Give the environment ``fn(action)``; ``action`` is the new action space."""

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        return env.step(key, env_state, fn(action), params)

    return env._replace(step=step, action=action)


def discretize_actions(env: Environment, bins: int | Sequence[int]) -> Environment:
    """Offer evenly spaced values of a bounded :class:`~jrl.types.Box`, both bounds among them, exactly.

    Component ``i`` takes ``(1 - t) low[i] + t high[i]`` with ``t = a[i] / (bins[i] - 1)``. One component gives
    :class:`~jrl.types.Discrete`, several give :class:`~jrl.types.MultiDiscrete`.

    Args:
        env: an environment whose action is a Box with finite bounds.
        bins: values for each component, one number for all or one for each; at least 2.

    Raises:
        ValueError: the action is no Box or has an infinite bound, or ``bins`` does not fit it.
    """
    box = _bounded_box(env, "discretize_actions")
    size = int(np.prod(box.shape))
    numbers: Any = bins
    given = (numbers,) * size if np.ndim(numbers) == 0 else tuple(numbers)
    whole = all(np.issubdtype(np.asarray(b).dtype, np.integer) for b in given)
    if len(given) != size or not whole or min(given) < 2:
        raise ValueError(
            f"discretize_actions(bins={bins}): needs one whole number, or {size} whole numbers, one for each "
            "component of the action, each at least 2."
        )
    ns = tuple(int(b) for b in given)
    last = np.asarray(ns, np.float32) - 1

    def value(action: Array) -> Array:
        return _between(box, (jnp.reshape(action, (size,)) / last).reshape(box.shape))

    return transform_action(env, value, Discrete(ns[0]) if size == 1 else MultiDiscrete(ns))


def clip_action(env: Environment) -> Environment:
    """Clip actions to the bounds of the :class:`~jrl.types.Box`; the action space stays as it is.

    Raises:
        ValueError: the action is no Box.
    """
    box = env.action
    if not isinstance(box, Box):
        raise ValueError(f"clip_action({env.name}): needs a Box action space, got {box}.")
    return transform_action(env, lambda action: jnp.clip(action, box.low, box.high), box)


def rescale_action(env: Environment, low: float = -1.0, high: float = 1.0) -> Environment:
    """Let the policy act in ``[low, high]``, mapped affinely to the bounds of the Box (not clipped).

    Raises:
        ValueError: the action is no Box or has an infinite bound, or ``low`` is not below ``high``.
    """
    box = _bounded_box(env, "rescale_action")
    space = Box(box.shape, low, high)
    width = space.high - space.low
    return transform_action(env, lambda action: _between(box, (action - space.low) / width), space)


def _between(box: Box, share: Array) -> Array:
    """Return what lies at a share of the way from ``low`` to ``high``; at 0 and 1 the bounds themselves, unrounded."""
    return (1.0 - share) * box.low + share * box.high


def _bounded_box(env: Environment, wrapper: str) -> Box:
    box = env.action
    if not isinstance(box, Box) or not np.all(np.isfinite([box.low, box.high])):
        raise ValueError(f"{wrapper}({env.name}): needs a Box action space with finite bounds, got {box}.")
    return box


# -------------------------------------------------------------------------------------------- rewards


class ScaleRewardParams(NamedTuple):
    """``env``: the inner parameters; ``scale``: float32, what rewards are multiplied by."""

    env: PyTree
    scale: Any


class ClipRewardParams(NamedTuple):
    """``env``: the inner parameters; ``low``, ``high``: float32, the bounds of the reward."""

    env: PyTree
    low: Any
    high: Any


def scale_reward(env: Environment, scale: float) -> Environment:
    """Multiply rewards by ``params.scale`` (traced). For single and vectorised environments."""
    return _with_reward(env, lambda r, p: r * p.scale, ScaleRewardParams(env.params, scale))


def clip_reward(env: Environment, low: float = -1.0, high: float = 1.0) -> Environment:
    """Clip rewards to ``[params.low, params.high]`` (traced). For single and vectorised environments.

    Raises:
        ValueError: ``low`` and ``high`` are numbers and ``low`` is above ``high``.
    """
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        raise ValueError(f"clip_reward(low={low}, high={high}): low must not be above high.")
    return _with_reward(env, lambda r, p: jnp.clip(r, p.low, p.high), ClipRewardParams(env.params, low, high))


def _with_reward(env: Environment, fn: Callable[[Array, Any], Array], params: Any) -> Environment:
    def reset(key: Key, params: Any) -> tuple[PyTree, PyTree]:
        return env.reset(key, params.env)

    def step(key: Key, env_state: PyTree, action: Array, params: Any) -> tuple[PyTree, TimeStep]:
        env_state, out = env.step(key, env_state, action, params.env)
        return env_state, out._replace(reward=fn(out.reward, params).astype(jnp.float32))

    return env._replace(reset=reset, step=step, params=params)
