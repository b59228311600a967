"""Soft actor-critic (Haarnoja et al., 2018, https://arxiv.org/abs/1801.01290 and https://arxiv.org/abs/1812.05905).

For a Box with a squashed normal, for Discrete actions with exact expectations (Christodoulou, 2019,
https://arxiv.org/abs/1910.07207); the temperature learned or fixed. Deviations: a time limit is never a terminal
state; critics, policy and temperature are updated from one batch at once, each by the others' values before it; the
warm-up fill happens in ``init``, so that no step has a data-dependent branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jrl import networks, ops, replay, rollout
from jrl.algos import checks, off_policy
from jrl.envs import vectorize
from jrl.native import threefry
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import (
    Algorithm,
    Array,
    Box,
    Discrete,
    Environment,
    Key,
    MaskedObservation,
    Memory,
    Metrics,
    Policy,
    PyTree,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 4
    """Environments stepped side by side."""
    unroll_length: int = 1
    """Steps in each environment between two rounds of updates."""
    num_updates: int = 2
    """Gradient steps a round."""
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
    learn_temperature: bool = True
    """Adapt the temperature to keep the policy's entropy at its target, from the initial temperature on."""
    torso: str = "auto"
    """'mlp', 'cnn', or 'auto': cnn for image observations, else mlp. Only mlp for continuous actions."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the fully connected layers, of the policy and of each of the two critics."""
    channels: tuple[int, ...] = (16,)
    """Channels of the 3×3 convolutions of a cnn."""
    activation: str = "relu"
    """tanh, relu, elu, gelu or silu."""
    kernels: str = "xla"
    """'xla'; or 'native': an mlp of tanh or relu, Adam and random numbers in C++, on CPUs, compiled at first use."""
    layer_norm: bool = False
    """Normalise before each activation."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_updates")
        off_policy.check_replay(self)
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """Adam's step size, of critics, policy and temperature."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    gamma: float = 0.99
    """Discount factor γ."""
    tau: float = 0.005
    """Share of the critics that the target critics take over at each update."""
    temperature: float = 1.0
    """α, the worth of one nat of entropy; where it is learned, at the start, and above 0."""
    target_entropy: float = -1.0
    """Entropy aimed at with a Box: nats for each dimension, were the Box scaled to [-1, 1]."""
    target_entropy_ratio: float = 0.5
    """Entropy aimed at with Discrete actions, as a share of the largest, log A (of those allowed, where masked)."""
    max_grad_norm: float = 1e4
    """Gradients are clipped to this global norm; the default clips nothing."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``params`` are those of actor, critics and log-temperature."""

    params: dict[str, PyTree]
    target_critic: PyTree
    opt_state: PyTree
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
    """Return SAC on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own, with a bounded Box or Discrete actions.
        config: static choices.
        actor: any ``init``/``apply`` pair, ``obs -> (mean, log_std)`` of a Box's ``D`` numbers before squashing, or
            ``obs -> logits [..., A]``. None builds one from ``config``.
        critic: any ``init``/``apply`` pair, ``(obs, action) -> Q [..., 2, 1]`` for a Box, ``obs -> Q [..., 2, A]`` for
            Discrete actions, of two critics. None builds them from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env``, ``config`` or a network is not what it should be, or the actions are of another kind.
        ValueError: ``env`` is vectorised already; the Box is not bounded; a network's output does not fit the
            actions, or it has a memory.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, config.kernels)
    checks.environment(env)
    checks.actions(env, "sac", Discrete, Box)
    box = env.action if isinstance(env.action, Box) else None
    envs = vectorize(env, config.num_envs)
    actor = networks.as_network(actor or networks.actor(env, config, features_first=True))
    critic = networks.as_network(critic or networks.critics(env, config, 2, features_first=True))
    heads = 1 if box is None else 2
    off_policy.check_actor_and_critic(actor, critic, env, "sac", num_critics=2, heads=heads)
    actor = networks.mask_aware(actor, ops.masked)
    critic = networks.mask_aware(critic, lambda q, mask: q)
    block_steps = config.num_envs * config.unroll_length

    def distribution(params: PyTree, obs: PyTree) -> Any:
        head, _ = actor.apply(params, obs, ())
        if box is None:
            return ops.Categorical(head)
        mean, log_std = head
        return ops.TanhNormal(mean, log_std, box.low, box.high)

    def soft_value(
        critic_params: PyTree, policy: Any, obs: PyTree, alpha: Array, key: Key
    ) -> tuple[Array, Array]:
        """``E[min_k Q_k(s, a)] + α H``, ``[N]``, and the entropy ``H``; a Box's from one sample, differentiable."""
        if box is None:
            q = critic.apply(critic_params, obs, ())[0].min(-2)
            entropy = policy.entropy()
            return (jax.nn.softmax(policy.logits) * q).sum(-1) + alpha * entropy, entropy
        action, log_prob = policy.sample_and_log_prob(key)
        q = critic.apply(critic_params, (obs, action), ())[0].min(-2)[..., 0]
        return q - alpha * log_prob, -log_prob

    def act(params: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        return distribution(params, obs).sample(key), memory, ()

    def act_greedily(params: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        return distribution(params, obs).mode(), memory, ()

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        actor_key, critic_key, reset_key, warmup_key, state_key = jax.random.split(key, 5)
        env_params = env.params if hparams.env is None else hparams.env
        start = rollout.start(reset_key, envs, env_params, config.num_envs)
        at_random = off_policy.random_policy(env)
        start, memory = off_policy.warm_up(warmup_key, envs, env_params, at_random, start, config)
        action = None if box is None else jnp.zeros((config.num_envs, *box.shape), jnp.float32)
        # A fixed temperature is that of hparams: its logarithm is not read, and of 0 would be no number to go on with.
        initial = hparams.temperature if config.learn_temperature else 1.0
        params = {
            "actor": actor.init(actor_key, start.obs, ()),
            "critic": critic.init(critic_key, start.obs if box is None else (start.obs, action), ()),
            "log_temperature": jnp.log(jnp.asarray(initial, jnp.float32)),
        }
        return State(
            params=params,
            target_critic=jax.tree.map(jnp.copy, params["critic"]),
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=start,
            replay=memory,
            env_steps=ops.counter.add(ops.counter.zero(), off_policy.warmup_env_steps(config)),
            key=state_key,
        )

    def temperature(params: PyTree, hparams: HParams) -> Array:
        learned = jnp.exp(params["log_temperature"])
        return (
            jax.lax.stop_gradient(learned) if config.learn_temperature else jnp.float32(hparams.temperature)
        )

    def target_entropy(obs: PyTree, hparams: HParams) -> Array:
        if isinstance(env.action, Discrete):
            largest = np.log(env.action.n)
            if isinstance(obs, MaskedObservation):
                largest = jnp.log(obs.action_mask.sum(-1)).mean()
            return hparams.target_entropy_ratio * largest
        assert box is not None
        return hparams.target_entropy * box.low.size + np.log((box.high - box.low) / 2.0).sum()

    def targets(state: State, sample: replay.Sample, key: Key, hparams: HParams) -> Array:
        """``r + γ (1 − terminated) (E[min_k Q⁻_k(s', a')] + α H)``, ``[N]``."""
        policy = distribution(state.params["actor"], sample.next_obs)
        alpha = temperature(state.params, hparams)
        next_value, _ = soft_value(state.target_critic, policy, sample.next_obs, alpha, key)
        return sample.rewards[0] + hparams.gamma * jnp.where(sample.terminated, 0.0, next_value)

    def loss(
        params: PyTree, sample: replay.Sample, target: Array, key: Key, hparams: HParams
    ) -> tuple[Array, Metrics]:
        if box is None:
            q, _ = critic.apply(params["critic"], sample.obs, ())
            q = ops.select_action(q, jnp.broadcast_to(sample.action[:, None], q.shape[:-1]))
        else:
            q = critic.apply(params["critic"], (sample.obs, sample.action), ())[0][..., 0]
        critic_loss = (sample.weight[:, None] * 0.5 * (q - target[:, None]) ** 2).sum(-1).mean()
        alpha, fixed_critic = temperature(params, hparams), jax.lax.stop_gradient(params["critic"])
        value, entropy = soft_value(
            fixed_critic, distribution(params["actor"], sample.obs), sample.obs, alpha, key
        )
        actor_loss = -value.mean()
        total = critic_loss + actor_loss
        if config.learn_temperature:
            surplus = jax.lax.stop_gradient(entropy.mean() - target_entropy(sample.obs, hparams))
            total += params["log_temperature"] * surplus
        return total, {
            "loss": total,
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "entropy": entropy.mean(),
            "temperature": alpha,
            "q": q.mean(),
        }

    def update(state: State, keys: Key, hparams: HParams, learning_rate: Array) -> tuple[State, Metrics]:
        """Take one gradient step on one batch from the replay."""
        sample_key, target_key, loss_key = keys
        sample = replay.uniform.sample(sample_key, state.replay, config.batch_size, config.num_envs, 1)
        target = targets(state, sample, target_key, hparams)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, sample, target, loss_key, hparams)
        metrics["grad_norm"] = global_norm(grads, config.kernels)
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        target_critic = optax.incremental_update(params["critic"], state.target_critic, hparams.tau)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, target_critic=target_critic)
        return state, metrics

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys, update_keys = threefry.split_keys(
            state.key, (), (config.unroll_length, 2), (config.num_updates, 3), kernels=config.kernels
        )
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        env_params = env.params if hparams.env is None else hparams.env
        behaviour = Policy(act, state.params["actor"])
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

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the current policy: the mode of its distribution, or samples from it."""
        return Policy(act_greedily if greedy else act, state.params["actor"])

    return Algorithm(init, step, policy, block_steps, env)
