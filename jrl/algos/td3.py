"""Twin delayed deterministic policy gradient (Fujimoto et al., 2018, https://arxiv.org/abs/1802.09477), and DDPG.

DDPG (Lillicrap et al., 2016, https://arxiv.org/abs/1509.02971) is the static choice without its three changes: two
critics, a policy updated less often, and noise on the target's action. Deviations: a time limit is never a terminal
state; exploration is white noise in both unless ``noise_correlation`` is set (DDPG's Ornstein-Uhlenbeck process, at its
stationary variance); the targets of critics and policy move at every critic update; the warm-up fill happens in
``init``, so that no step has a data-dependent branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import networks, ops, replay, rollout
from jrl.algos import checks, off_policy
from jrl.envs import vectorize
from jrl.native import threefry
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Box, Environment, Key, Memory, Metrics, Policy, PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    variant: str = "td3"
    """'td3': two critics, policy_delay, target_noise; or 'ddpg': one critic and neither."""
    num_envs: int = 4
    """Environments stepped side by side."""
    unroll_length: int = 1
    """Steps in each environment between two rounds of updates."""
    num_updates: int = 2
    """Gradient steps of the critics a round."""
    policy_delay: int = 2
    """Of these, those before each of the policy; must divide num_updates. Without meaning for ddpg."""
    batch_size: int = 128
    """Transitions a gradient step."""
    capacity: int = 100_000
    """Transitions the replay holds (rounded up to whole blocks of num_envs × unroll_length)."""
    truncation_gap: int = 16
    """Steps between two time limits that cut episodes of one environment, at least; of two cuts within fewer steps
    one is not learned from. With 1 all are, at twice the memory for observations."""
    replay_dtype: str = "same"
    """What the replay keeps floats of observations in: 'same', 'float16' or 'bfloat16'; see dqn."""
    warmup_env_steps: int = 2_000
    """Environment steps taken with random actions before the first update, within init."""
    torso: str = "auto"
    """'mlp' or 'auto', which is mlp: values of continuous actions have no cnn."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the fully connected layers, of the policy and of each critic."""
    channels: tuple[int, ...] = (16,)
    """Without meaning here."""
    activation: str = "relu"
    """tanh, relu, elu, gelu or silu."""
    kernels: str = "xla"
    """'xla'; or 'native': an mlp of tanh or relu, Adam and random numbers in C++, on CPUs, compiled at first use."""
    layer_norm: bool = False
    """Normalise before each activation."""

    def __post_init__(self) -> None:
        checks.choice(self, "variant", ("td3", "ddpg"))
        checks.sizes(self, "num_updates", "policy_delay")
        if self.variant == "td3" and self.num_updates % self.policy_delay:
            raise ValueError(
                f"policy_delay={self.policy_delay} does not divide num_updates={self.num_updates}: a round ends with "
                f"an update of the policy; use num_updates={self.policy_delay} or a multiple."
            )
        off_policy.check_replay(self)
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """Adam's step size, of critics and policy."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    gamma: float = 0.99
    """Discount factor γ."""
    tau: float = 0.005
    """Share of the networks that the target networks take over at each update."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions, in half widths of the Box."""
    noise_correlation: float = 0.0
    """Correlation ρ of that noise from one step to the next: it goes where independent noise averages out."""
    target_noise: float = 0.2
    """Of the noise on the target's action, for td3."""
    target_noise_clip: float = 0.5
    """Where that noise is clipped, for td3."""
    max_grad_norm: float = 1e4
    """Gradients are clipped to this global norm; the default clips nothing."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``params`` are those of actor and critic."""

    params: dict[str, PyTree]
    target_params: dict[str, PyTree]
    opt_state: dict[str, PyTree]
    rollout: rollout.RolloutState
    replay: PyTree
    env_steps: Array
    key: Key


def make(
    env: Environment,
    config: Config | None = None,
    *,
    actor: Any = None,
    critic: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return TD3 or DDPG on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own, with a bounded Box of ``D`` numbers.
        config: static choices.
        actor: any ``init``/``apply`` pair, ``obs -> [..., D]``, which a tanh maps into the Box. None builds one from
            ``config``.
        critic: any ``init``/``apply`` pair, ``(obs, action) -> Q [..., K, 1]`` with ``K`` 2, for ddpg 1. None builds
            one from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env``, ``config`` or a network is not what it should be, or the actions are no Box.
        ValueError: ``env`` is vectorised already; the Box is not bounded; a network's output does not fit the
            actions, or it has a memory.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, config.kernels)
    checks.environment(env)
    checks.actions(env, "td3", Box)
    assert isinstance(env.action, Box)
    box, envs = env.action, vectorize(env, config.num_envs)
    twin = config.variant == "td3"
    num_critics, policy_delay = (2, config.policy_delay) if twin else (1, 1)
    actor = networks.as_network(actor or networks.actor(env, config, stochastic=False, features_first=True))
    critic = networks.as_network(critic or networks.critics(env, config, num_critics, features_first=True))
    off_policy.check_actor_and_critic(actor, critic, env, "td3", num_critics=num_critics)
    half, block_steps = (box.high - box.low) / 2.0, config.num_envs * config.unroll_length

    def choose(params: PyTree, obs: PyTree) -> Array:
        """The policy's action, in the Box."""
        return jnp.clip(box.low + half * (jnp.tanh(actor.apply(params, obs, ())[0]) + 1.0), box.low, box.high)

    def values(params: PyTree, obs: PyTree, action: Array) -> Array:
        """``Q_k(s, a)``, ``[N, K]``."""
        return critic.apply(params, (obs, action), ())[0][..., 0]

    def moved(action: Array, noise: Array) -> Array:
        return jnp.clip(action + half * noise, box.low, box.high)

    def act(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        params, scale = acting
        action = choose(params, obs)
        return moved(action, scale * jax.random.normal(key, action.shape, action.dtype)), memory, ()

    def explore(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        params, scale, correlation = acting
        # x' = ρ x + sqrt(1 − ρ²) ε keeps variance 1; an episode begins with 0.
        noise = jax.random.normal(key, memory.shape, memory.dtype)
        memory = correlation * memory + jnp.sqrt(1.0 - jnp.square(correlation)) * noise
        return moved(choose(params, obs), scale * memory), memory, ()

    def init_noise(batch_shape: tuple[int, ...]) -> Memory:
        return jnp.zeros((*batch_shape, *box.shape), jnp.float32)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        actor_key, critic_key, reset_key, warmup_key, state_key = jax.random.split(key, 5)
        env_params = env.params if hparams.env is None else hparams.env
        start = rollout.start(reset_key, envs, env_params, config.num_envs, init_noise((config.num_envs,)))
        at_random = dataclasses.replace(off_policy.random_policy(env), init_memory=init_noise)
        start, memory = off_policy.warm_up(warmup_key, envs, env_params, at_random, start, config)
        action = jnp.zeros((config.num_envs, *box.shape), jnp.float32)
        params = {
            "actor": actor.init(actor_key, start.obs, ()),
            "critic": critic.init(critic_key, (start.obs, action), ()),
        }
        adam = optimizer(hparams, jnp.float32(0))
        return State(
            params=params,
            target_params=jax.tree.map(jnp.copy, params),
            opt_state={name: adam.init(part) for name, part in params.items()},
            rollout=start,
            replay=memory,
            env_steps=ops.counter.add(ops.counter.zero(), off_policy.warmup_env_steps(config)),
            key=state_key,
        )

    def targets(state: State, sample: replay.Sample, key: Key, hparams: HParams) -> Array:
        """``r + γ (1 − terminated) min_k Q⁻_k(s', μ⁻(s') + noise)``, ``[N]``."""
        next_action = choose(state.target_params["actor"], sample.next_obs)
        if twin:
            noise = hparams.target_noise * jax.random.normal(key, next_action.shape, next_action.dtype)
            clip = hparams.target_noise_clip
            next_action = moved(next_action, jnp.clip(noise, -clip, clip))
        next_value = values(state.target_params["critic"], sample.next_obs, next_action).min(-1)
        return sample.rewards[0] + hparams.gamma * jnp.where(sample.terminated, 0.0, next_value)

    def critic_loss(params: PyTree, sample: replay.Sample, target: Array) -> tuple[Array, Array]:
        q = values(params, sample.obs, sample.action)
        return (sample.weight * 0.5 * jnp.square(q - target[:, None]).sum(-1)).mean(), q.mean()

    def actor_loss(params: PyTree, critic_params: PyTree, sample: replay.Sample) -> Array:
        return -values(critic_params, sample.obs, choose(params, sample.obs))[:, 0].mean()

    def gradient_step(
        state: State, name: str, grads: PyTree, hparams: HParams, learning_rate: Array
    ) -> State:
        adam = optimizer(hparams, learning_rate)
        updates, opt_state = adam.update(grads, state.opt_state[name], state.params[name])
        return dataclasses.replace(
            state,
            params=state.params | {name: optax.apply_updates(state.params[name], updates)},
            opt_state=state.opt_state | {name: opt_state},
        )

    def update(state: State, keys: Key, hparams: HParams, learning_rate: Array) -> tuple[State, Metrics]:
        """Take policy_delay gradient steps of the critics, each on a batch of its own, and one of the policy."""

        def update_critic(state: State, keys: Key) -> tuple[State, tuple[replay.Sample, Metrics]]:
            sample_key, noise_key = keys
            sample = replay.uniform.sample(sample_key, state.replay, config.batch_size, config.num_envs, 1)
            target = targets(state, sample, noise_key, hparams)
            (loss, q), grads = jax.value_and_grad(critic_loss, has_aux=True)(
                state.params["critic"], sample, target
            )
            state = gradient_step(state, "critic", grads, hparams, learning_rate)
            target_params = optax.incremental_update(state.params, state.target_params, hparams.tau)
            state = dataclasses.replace(state, target_params=target_params)
            return state, (
                sample,
                {"critic_loss": loss, "q": q, "grad_norm": global_norm(grads, config.kernels)},
            )

        state, (samples, metrics) = jax.lax.scan(update_critic, state, keys)
        last = jax.tree.map(lambda leaf: leaf[-1], samples)
        loss, grads = jax.value_and_grad(actor_loss)(state.params["actor"], state.params["critic"], last)
        state = gradient_step(state, "actor", grads, hparams, learning_rate)
        metrics = jax.tree.map(jnp.mean, metrics)
        return state, metrics | {"actor_loss": loss, "loss": metrics["critic_loss"] + loss}

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys, update_keys = threefry.split_keys(
            state.key,
            (),
            (config.unroll_length, 2),
            (config.num_updates // policy_delay, policy_delay, 2),
            kernels=config.kernels,
        )
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        env_params = env.params if hparams.env is None else hparams.env
        acting = (state.params["actor"], hparams.exploration_noise, hparams.noise_correlation)
        behaviour = Policy(explore, acting, init_noise)
        rollout_state, transitions, episode_metrics = rollout.unroll(
            unroll_keys, envs, env_params, behaviour, state.rollout, config.unroll_length
        )
        state = dataclasses.replace(
            state,
            rollout=rollout_state,
            replay=replay.uniform.add(state.replay, transitions),
            env_steps=ops.counter.add(state.env_steps, block_steps),
            key=next_key,
        )
        state, metrics = jax.lax.scan(
            lambda state, keys: update(state, keys, hparams, learning_rate),
            state,
            update_keys,
        )
        metrics = jax.tree.map(jnp.mean, metrics) | {"learning_rate": learning_rate}
        return state, episode_metrics | metrics

    def policy(state: State, *, greedy: bool = True, noise: float = 0.1) -> Policy:
        """Return the current policy, or, with greedy=False, one with noise of so many half widths of the Box."""
        return Policy(act, (state.params["actor"], jnp.float32(0.0 if greedy else noise)))

    return Algorithm(init, step, policy, block_steps, env)
