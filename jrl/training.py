"""The runners: training as one scan, evaluation over exactly N episodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algos import checks
from jrl.rollout import reset_memory
from jrl.types import Algorithm, Array, Environment, Key, Metrics, Policy, PyTree


def train(algo: Algorithm, state: Any, hparams: Any, *, num_steps: int) -> tuple[Any, Metrics]:
    """Run ``num_steps`` calls of ``algo.step`` as one ``lax.scan``.

    Pure: works inside ``jit`` and ``vmap``. Outside of them it is compiled once per algorithm and
    ``num_steps``. The state is not donated; to update a large replay in place across calls, wrap this in your
    own ``jax.jit(..., donate_argnums=...)`` as the driver does.

    Args:
        algo: the algorithm.
        state: from ``algo.init`` or an earlier call.
        hparams: traced numbers.
        num_steps: calls of ``algo.step``, static; each is ``algo.env_steps_per_step`` environment steps.

    Returns:
        The new state and the metrics of every step, each ``[num_steps]``; :func:`summarize` reduces them.

    Raises:
        ValueError: ``num_steps`` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"train(num_steps={num_steps}): must be at least 1.")
    return _train(algo.step, state, hparams, num_steps)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _train(step: Callable[..., Any], state: Any, hparams: Any, num_steps: int) -> tuple[Any, Metrics]:
    return jax.lax.scan(lambda state, _: step(state, hparams), state, length=num_steps)


def summarize(metrics: Metrics, num_steps: Array | None = None) -> Metrics:
    """Reduce metrics over their leading axis to scalars.

    Episode statistics (``episode_…``) weigh each step by the episodes that ended in it, their minimum and maximum
    (``episode_…_min``, ``_max``) are taken over steps in which an episode ended; ``num_episodes`` is summed; all else
    is averaged. Where no episode ended at all the episode statistics are 0, and ``num_episodes`` says so.

    Args:
        metrics: of each step, ``[T, ...]``, ``num_episodes`` among them.
        num_steps: how many rows are in use, where those after them are all zero; None means all ``T``.

    Raises:
        ValueError: there is no ``num_episodes``.
    """
    if "num_episodes" not in metrics:
        raise ValueError(
            f"summarize(metrics): num_episodes is missing among {', '.join(metrics)}: what algo.step returns needs the "
            "episodes that ended in it, as jrl.rollout.unroll reports them."
        )
    count = metrics["num_episodes"]
    total = count.sum(0)
    used = len(count) if num_steps is None else jnp.maximum(num_steps, 1)
    summary = {}
    for name, value in metrics.items():
        if name == "num_episodes":
            summary[name] = total
        elif not name.startswith("episode_"):
            summary[name] = value.sum(0) / used
        elif name.endswith("_min"):
            summary[name] = jnp.where(total > 0, jnp.where(count > 0, value, jnp.inf).min(0), 0.0)
        elif name.endswith("_max"):
            summary[name] = jnp.where(total > 0, jnp.where(count > 0, value, -jnp.inf).max(0), 0.0)
        else:
            summary[name] = (value * count).sum(0) / jnp.maximum(total, 1.0)
    return summary


class EpisodeStats(NamedTuple):
    """What :func:`evaluate` measured.

    Attributes:
        episode_return: float32 ``[N]``, undiscounted sums of rewards.
        episode_length: int32 ``[N]``, environment steps.
        completed: bool ``[N]``; False for an episode that the step cap cut short (or kept from starting):
            its return is that of the part seen, and says little.
    """

    episode_return: Array
    episode_length: Array
    completed: Array


DEFAULT_MAX_STEPS = 100_000


def evaluate(
    key: Key,
    env: Environment,
    policy: Policy | Callable[..., Any],
    *,
    num_episodes: int,
    params: PyTree = None,
    num_envs: int | None = None,
    max_steps: int = DEFAULT_MAX_STEPS,
) -> EpisodeStats:
    """Play exactly ``num_episodes`` episodes and return each one's return and length.

    The number of episodes that each environment plays is fixed beforehand. Taking the first N to *finish*
    would favour short episodes.

    Args:
        key: consumed; use one that no training uses.
        env: a single environment (not vectorised).
        policy: ``algo.policy(state)``, or any function ``(key, obs, memory) -> (action, memory, extras)`` of
            batched observations.
        num_episodes: ``N``, static.
        params: parameters of the environment; None means ``env.params``.
        num_envs: environments side by side, static; None means one an episode, up to 1,024.
        max_steps: steps after which each environment stops, static; what it cut is marked in ``completed``.

    Raises:
        TypeError: ``env`` or ``policy`` is not what it should be.
        ValueError: ``num_episodes``, ``num_envs`` or ``max_steps`` is not in 1 … 2³¹ − 1; ``env`` is vectorised.
    """
    for name, value in (("num_episodes", num_episodes), ("num_envs", num_envs), ("max_steps", max_steps)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate({name}={value}): must be at least 1.")
        if value is not None and value >= 2**31:
            raise ValueError(
                f"evaluate({name}={value}): must be below 2**31, as they are counted in 32 bits."
            )
    if not isinstance(env, Environment):
        raise TypeError(f"evaluate(env={env!r}): no jrl Environment; build it with jrl.make.")
    if not callable(policy):
        raise TypeError(
            f"evaluate(policy=<{type(policy).__name__}>): give algo.policy(state), or a function."
        )
    if not isinstance(policy, Policy):
        policy = Policy(_call_without_params(policy))
    params = env.params if params is None else params
    num_envs = min(num_episodes, num_envs or 1024)
    try:
        return _evaluate(key, env.reset, env.step, policy, params, num_episodes, num_envs, max_steps)
    except (TypeError, ValueError):
        # Looked at only now, as it costs a trace: an environment that is vectorised already always ends here.
        checks.environment(env._replace(params=params))
        raise


@functools.cache
def _call_without_params(function: Callable[..., Any]) -> Callable[..., Any]:
    # Cached: a Policy's function is static, and a new lambda a call would recompile each time.
    return lambda params, key, obs, memory: function(key, obs, memory)


@functools.partial(jax.jit, static_argnums=(1, 2, 5, 6, 7))
def _evaluate(
    key: Key,
    env_reset: Callable[..., Any],
    env_step: Callable[..., Any],
    policy: Policy,
    params: PyTree,
    num_episodes: int,
    num_envs: int,
    max_steps: int,
) -> EpisodeStats:
    most = -(-num_episodes // num_envs)
    # The first environments play one episode more where N is no multiple: quota[i] sums to N.
    quota = most - (jnp.arange(num_envs) >= num_episodes - (most - 1) * num_envs)
    environments = jnp.arange(num_envs)
    reset_key, loop_key = jax.random.split(key)
    env_state, obs = jax.vmap(env_reset, in_axes=(0, None))(jax.random.split(reset_key, num_envs), params)
    table = EpisodeStats(
        jnp.zeros((num_envs, most), jnp.float32),
        jnp.zeros((num_envs, most), jnp.int32),
        jnp.zeros((num_envs, most), bool),
    )

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, played, *_ = carry
        return (step < max_steps) & jnp.any(played < quota)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, played, table, env_state, obs, memory = carry
        action_key, env_key = jax.random.split(jax.random.fold_in(loop_key, step))
        action, new_memory, _ = policy(action_key, obs, memory)
        env_state, time_step = jax.vmap(env_step, in_axes=(0, 0, 0, None))(
            jax.random.split(env_key, num_envs), env_state, action, params
        )
        ended = time_step.terminated | time_step.truncated
        # An environment whose quota is played goes on unrecorded until all are done: out of bounds, dropped.
        slot = jnp.where(played < quota, played, most)
        table = EpisodeStats(
            table.episode_return.at[environments, slot].add(time_step.reward, mode="drop"),
            table.episode_length.at[environments, slot].add(1, mode="drop"),
            table.completed.at[environments, slot].set(ended, mode="drop"),
        )
        memory = reset_memory(policy, new_memory, ended)
        return step + 1, played + (ended & (played < quota)), table, env_state, time_step.obs, memory

    played, memory = jnp.zeros((num_envs,), jnp.int32), policy.init_memory((num_envs,))
    start = (jnp.int32(0), played, table, env_state, obs, memory)
    _, _, table, *_ = jax.lax.while_loop(unfinished, body, start)
    # Slots in use, in the order (episode of the environment, environment): exactly the first N.
    return jax.tree.map(lambda leaf: leaf.T.reshape(-1)[:num_episodes], table)
