"""Wrappers that normalise observations and rewards with running statistics, for *vectorised* environments.

The statistics live in the environment's state: they are saved with it, and no two runs share them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.envs.observations import output_struct
from jrl.normalize import (
    RewardScaling,
    RunningStatistics,
    init_reward_scaling,
    init_statistics,
    normalize,
    update_statistics,
)
from jrl.normalize import scale_reward as scale_rewards
from jrl.types import Array, Environment, Key, PyTree, TimeStep


class NormalizeObservationState(NamedTuple):
    """``env_state``: the inner state; ``statistics``: of the observations shown to the policy so far."""

    env_state: PyTree
    statistics: RunningStatistics


class NormalizeObservationParams(NamedTuple):
    """``env``: the inner parameters; ``statistics``: the frozen ones (traced: new ones do not recompile)."""

    env: PyTree
    statistics: RunningStatistics


def normalize_observation(
    env: Environment, statistics: RunningStatistics | None = None, clip: float = 10.0
) -> Environment:
    """Normalise observations elementwise, and clip them to ``±clip``.

    Learning (``statistics=None``): every observation the policy is shown enters the statistics once, those of
    the reset and each step's ``obs`` (after an episode's end the first one of the next); then ``obs`` and
    ``next_obs`` are normalised with the same, updated statistics. They start anew with ``reset`` and are
    found in ``env_state.statistics``.

    Frozen (``statistics=`` those of a training run; for evaluation): nothing is updated. They are part of
    ``params`` (:class:`NormalizeObservationParams`), so that evaluating again with newer ones does not
    recompile.

    Of a :class:`~jrl.types.MaskedObservation` only the observation is normalised. Observations become
    float32.

    Raises:
        ValueError: when traced, if the environment has not been vectorised.
    """

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        env_state, obs = env.reset(key, params)
        _num_envs(env, obs, "normalize_observation")
        learnt = update_statistics(init_statistics(env.observation), obs)
        return NormalizeObservationState(env_state, learnt), normalize(learnt, obs, clip)

    def step(key: Key, env_state: Any, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        inner_state, out = env.step(key, env_state.env_state, action, params)
        learnt = update_statistics(env_state.statistics, out.obs)
        out = out._replace(
            obs=normalize(learnt, out.obs, clip), next_obs=normalize(learnt, out.next_obs, clip)
        )
        return NormalizeObservationState(inner_state, learnt), out

    def frozen_reset(key: Key, params: NormalizeObservationParams) -> tuple[PyTree, PyTree]:
        env_state, obs = env.reset(key, params.env)
        _num_envs(env, obs, "normalize_observation")
        return env_state, normalize(params.statistics, obs, clip)

    def frozen_step(key: Key, env_state: Any, action: Array, params: Any) -> tuple[PyTree, TimeStep]:
        env_state, out = env.step(key, env_state, action, params.env)
        shown = out._replace(
            obs=normalize(params.statistics, out.obs, clip),
            next_obs=normalize(params.statistics, out.next_obs, clip),
        )
        return env_state, shown

    observation = output_struct(lambda obs: normalize(init_statistics(env.observation), obs), env.observation)
    if statistics is None:
        return env._replace(reset=reset, step=step, observation=observation)
    params = NormalizeObservationParams(env.params, statistics)
    return env._replace(reset=frozen_reset, step=frozen_step, params=params, observation=observation)


class NormalizeRewardState(NamedTuple):
    """``env_state``: the inner state; ``scaling``: the running returns and their statistics."""

    env_state: PyTree
    scaling: RewardScaling


class NormalizeRewardParams(NamedTuple):
    """``env``: the inner parameters; ``gamma``: float32, the discount of the running return."""

    env: PyTree
    gamma: Any


def normalize_reward(env: Environment, gamma: float = 0.99, clip: float = 10.0) -> Environment:
    """Divide rewards by the running standard deviation of the discounted return, and clip to ``±clip``.

    The running return takes in this step's reward and is set to zero *after* it where the episode ended, by
    termination or truncation (:func:`jrl.normalize.scale_reward`). ``params.gamma`` is traced. For
    evaluation use the environment without this wrapper: its rewards are the real ones.

    Raises:
        ValueError: when traced, if the environment has not been vectorised.
    """

    def reset(key: Key, params: NormalizeRewardParams) -> tuple[PyTree, PyTree]:
        env_state, obs = env.reset(key, params.env)
        return NormalizeRewardState(
            env_state, init_reward_scaling(_num_envs(env, obs, "normalize_reward"))
        ), obs

    def step(key: Key, env_state: Any, action: Array, params: Any) -> tuple[PyTree, TimeStep]:
        inner_state, out = env.step(key, env_state.env_state, action, params.env)
        scaling, scaled = scale_rewards(
            env_state.scaling,
            out.reward[None],
            out.terminated[None],
            out.truncated[None],
            gamma=params.gamma,
            clip=clip,
        )
        return NormalizeRewardState(inner_state, scaling), out._replace(reward=scaled[0])

    return env._replace(reset=reset, step=step, params=NormalizeRewardParams(env.params, gamma))


def _num_envs(env: Environment, obs: PyTree, wrapper: str) -> int:
    leaf, spec = jax.tree.leaves(obs)[0], jax.tree.leaves(env.observation)[0]
    if jnp.ndim(leaf) != len(spec.shape) + 1:
        raise ValueError(
            f"{wrapper}({env.name}): observations of shape {jnp.shape(leaf)} where [B, *{spec.shape}] is "
            "expected. Apply this wrapper after jrl.envs.vectorize(env, num_envs)."
        )
    return leaf.shape[0]
