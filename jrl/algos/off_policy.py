"""What every algorithm with a replay does around its update: collect, fill before the first step, copy a target.

For any actions: Discrete ones are kept in the narrowest dtype that holds them, others as they are. What the
behaviour policy returns as ``extras`` is kept too, so one that only explores returns ``()``.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jrl import networks, ops, replay, rollout
from jrl.algos import checks
from jrl.types import (
    ActionSpace,
    Array,
    Discrete,
    Environment,
    Key,
    MaskedObservation,
    Network,
    Params,
    Policy,
    PyTree,
)

REPLAY_DTYPES = ("same", "float16", "bfloat16")


class ReplayConfig(Protocol):
    """The fields of a Config that describe a replay and how it is filled."""

    @property
    def num_envs(self) -> int:
        """Environments stepped side by side."""

    @property
    def unroll_length(self) -> int:
        """Steps in each environment between two rounds of updates: what one ``add`` writes."""

    @property
    def batch_size(self) -> int:
        """Transitions a gradient step."""

    @property
    def capacity(self) -> int:
        """Transitions the replay holds."""

    @property
    def truncation_gap(self) -> int:
        """Steps that share room for what a truncated step led to, see :mod:`jrl.replay.uniform`."""

    @property
    def replay_dtype(self) -> str:
        """What floats of observations are kept in, one of :data:`REPLAY_DTYPES`."""

    @property
    def warmup_env_steps(self) -> int:
        """Environment steps taken before the first update."""


def check_replay(config: ReplayConfig) -> None:
    """Raise unless the sizes of a replay fit each other; for ``Config.__post_init__``.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is below 1, the capacity is below the batch or the warm-up, or the dtype is none of those.
    """
    checks.choice(config, "replay_dtype", REPLAY_DTYPES)
    checks.sizes(
        config,
        *("num_envs", "unroll_length", "batch_size", "capacity", "truncation_gap", "warmup_env_steps"),
    )
    if config.capacity < config.batch_size:
        raise ValueError(
            f"capacity={config.capacity} is smaller than batch_size={config.batch_size}: the replay must hold at "
            "least one batch; raise capacity or lower batch_size."
        )
    if config.warmup_env_steps > config.capacity:
        raise ValueError(
            f"warmup_env_steps={config.warmup_env_steps} exceeds capacity={config.capacity}: what the warm-up "
            "collects must fit; raise capacity or lower warmup_env_steps."
        )


def warmup_env_steps(config: ReplayConfig) -> int:
    """Return the environment steps that :func:`warm_up` takes: those asked for, rounded up to whole unrolls."""
    block = config.num_envs * config.unroll_length
    return -(-config.warmup_env_steps // block) * block


def warm_up(
    key: Key,
    env: Environment,
    env_params: PyTree,
    policy: Policy,
    start: rollout.RolloutState,
    config: ReplayConfig,
    buffer: Any = replay.uniform,
) -> tuple[rollout.RolloutState, PyTree]:
    """Make a replay and fill it with what ``policy`` meets, unroll by unroll.

    Belongs into ``init``: a step that first asked whether the replay is full enough would be a branch on data.

    Args:
        key: consumed.
        env: vectorised over ``config.num_envs`` environments.
        env_params: its parameters.
        policy: what acts, usually at random; its ``extras`` are kept beside the transition.
        start: where the rollout stands.
        config: the sizes, see :class:`ReplayConfig`.
        buffer: ``replay.uniform``, ``replay.prioritized``, or what else has their ``init`` and ``add``.

    Returns:
        The rollout :func:`warmup_env_steps` later, and the replay.
    """

    def unroll(
        key: Key, start: rollout.RolloutState
    ) -> tuple[rollout.RolloutState, rollout.Transition, rollout.Metrics]:
        return rollout.unroll(key, env, env_params, policy, start, config.unroll_length)

    # Block by block: the whole warm-up at once would be held a second time beside the replay.
    def fill(carry: tuple[rollout.RolloutState, PyTree], key: Key) -> tuple[tuple, None]:
        start, memory = carry
        start, transitions, _ = unroll(key, start)
        return (start, buffer.add(memory, transitions)), None

    _, block, _ = jax.eval_shape(unroll, key, start)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), block)
    one = one._replace(action=jax.ShapeDtypeStruct(one.action.shape, stored_dtype(env.action)))
    rows = replay.num_rows(config.capacity, config.num_envs, config.unroll_length)
    obs_dtype = None if config.replay_dtype == "same" else config.replay_dtype
    empty = buffer.init(one, rows, config.num_envs, config.truncation_gap, obs_dtype=obs_dtype)
    keys = jax.random.split(key, warmup_env_steps(config) // (config.num_envs * config.unroll_length))
    (start, memory), _ = jax.lax.scan(fill, (start, empty), keys)
    return start, memory


def stored_dtype(action: ActionSpace) -> Any:
    """Return the dtype of an action in a replay: of Discrete ones the narrowest, which shares a word with the flags."""
    if not isinstance(action, Discrete):
        return jax.eval_shape(action.sample, jax.random.key(0)).dtype
    return jnp.uint8 if action.n <= 2**8 else jnp.uint16 if action.n <= 2**16 else jnp.int32


def random_policy(env: Environment) -> Policy:
    """Return the policy that draws uniformly from the actions of ``env`` that are allowed, in ``[B]`` environments."""

    def act(params: Params, key: Key, obs: PyTree, memory: PyTree) -> tuple[Array, PyTree, PyTree]:
        num_envs = jax.tree.leaves(obs)[0].shape[0]
        if isinstance(obs, MaskedObservation):
            logits = ops.masked(jnp.zeros(obs.action_mask.shape), obs.action_mask)
            return ops.Categorical(logits).sample(key), memory, ()
        return jax.vmap(env.action.sample)(jax.random.split(key, num_envs)), memory, ()

    return Policy(act)


def check_actor_and_critic(
    actor: Network, critic: Network, env: Environment, algorithm: str, *, num_critics: int, heads: int = 1
) -> None:
    """Raise ValueError unless two networks without memory fit the actions of ``env``.

    With Discrete actions ``obs -> logits [A]`` and ``obs -> Q [num_critics, A]``; with a Box ``obs -> heads`` times
    ``[D]`` and ``(obs, action) -> Q [num_critics, 1]``.
    """
    for network in (actor, critic):
        checks.feed_forward(network, algorithm)
    obs = env.observation.obs if isinstance(env.observation, MaskedObservation) else env.observation
    if isinstance(env.action, Discrete):
        networks.check_output(actor, obs, [(env.action.n,)], "actor")
        networks.check_output(critic, obs, [(num_critics, env.action.n)], "critic")
    else:
        action = jax.eval_shape(env.action.sample, jax.random.key(0))
        networks.check_output(actor, obs, [action.shape] * heads, "actor")
        networks.check_output(critic, (obs, action), [(num_critics, 1)], "critic")


def copy_periodically(
    params: Params, target_params: Params, since: Array, elapsed: int, period: Array | float
) -> tuple[Params, Array]:
    """Return the target parameters, copied from ``params`` once ``period`` has gone by, whatever divides it.

    A select, not a branch: under ``vmap`` both sides would run anyway.

    Args:
        params: of the online network.
        target_params: of the target network.
        since: float32 ``[]``, environment steps (or updates) since the last copy.
        elapsed: how many more there are now.
        period: between two copies, in the same unit.

    Returns:
        The target parameters, and the new ``since``.
    """
    since = since + elapsed
    due = since >= period
    target_params = jax.tree.map(lambda new, old: jnp.where(due, new, old), params, target_params)
    return target_params, jnp.where(due, 0.0, since)
