"""Proximal policy optimisation (Schulman et al., 2017, https://arxiv.org/abs/1707.06347).

With generalised advantage estimation (Schulman et al., 2016, https://arxiv.org/abs/1506.02438) and the
details that make it work (Huang et al., 2022, "The 37 implementation details of PPO"). The objective is the clipped
one, or one with a KL penalty, of a fixed coefficient or one that adapts (both in the first paper, section 4).

With a memory minibatches are whole unrolls of some of the environments, from the memory that they began with. Where
this differs from the usual code: at a time limit the target bootstraps from the value of the true last observation,
seen with the memory of its episode; the minibatches come from :func:`jrl.ops.shuffled_indices` instead of a sort;
values are computed once after the rollout, on the whole batch, instead of at each of its steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import networks, normalize, ops, rollout
from jrl.algos import checks, on_policy
from jrl.native import threefry
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm, mean_over
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree, Shards


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 16
    """Environments stepped side by side."""
    unroll_length: int = 128
    """Steps in each environment between two updates."""
    num_epochs: int = 4
    """Passes over each batch."""
    num_minibatches: int = 4
    """Parts of a batch, each one gradient step; must divide num_envs × unroll_length, with a memory num_envs."""
    num_microbatches: int = 1
    """Parts of a minibatch whose gradients are computed one after the other and averaged: less memory, and what a
    large one keeps for the backward pass stays in the cache. The same step to rounding; must divide a minibatch."""
    objective: str = "clip"
    """'clip'; 'kl': penalise the divergence from the policy that acted by kl_coef; 'adaptive_kl': by a coefficient that
    begins there and halves or doubles to keep the divergence near target_kl."""
    memory: str = "none"
    """'none'; 'gru'; or 'transformer': attention over the last memory_window steps."""
    memory_size: int = 32
    """Width of the memory."""
    memory_window: int = 16
    """Steps back that each layer of a transformer sees."""
    memory_layers: int = 1
    """Layers of a transformer."""
    torso: str = "auto"
    """'mlp', 'cnn', or 'auto': cnn for image observations, else mlp."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the fully connected layers."""
    channels: tuple[int, ...] = (16,)
    """Channels of the 3×3 convolutions of a cnn."""
    activation: str = "tanh"
    """tanh, relu, elu, gelu or silu."""
    kernels: str = "xla"
    """'xla'; or 'native': an mlp of tanh or relu, Adam and random numbers in C++, on CPUs, compiled at first use."""
    layer_norm: bool = False
    """Normalise before each activation."""
    shared_torso: bool = False
    """One torso for policy and value instead of one each."""
    clip_value: bool = True
    """Clip the value's change too, by value_clip_eps."""
    standardize_advantages: bool = True
    """Centre and scale the advantages of each minibatch."""
    normalize_observations: bool = False
    """Standardise observations by running statistics, clipped to ±10; frozen in evaluation."""
    normalize_rewards: bool = False
    """Scale rewards by the standard deviation of the discounted return, clipped to ±10."""
    stop_at_target_kl: bool = False
    """Skip what is left of an update once a minibatch's KL exceeds target_kl."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_envs", "unroll_length", "num_epochs", "num_minibatches", "num_microbatches")
        checks.minibatches(self)
        checks.choice(self, "objective", ("clip", "kl", "adaptive_kl"))
        checks.choice(self, "memory", ("none", "gru", "transformer"))
        checks.sizes(self, "memory_size", "memory_window", "memory_layers")
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    gamma: float = 0.99
    """Discount factor γ."""
    gae_lambda: float = 0.95
    """λ of the advantage estimate."""
    clip_eps: float = 0.2
    """ε of the clipped probability ratio."""
    value_clip_eps: float = 0.2
    """ε of the clipped value, with clip_value."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this global norm, over policy and value together."""
    target_kl: float = 0.02
    """The KL (nats) that the adaptive penalty aims at, and at which an update stops with stop_at_target_kl."""
    kl_coef: float = 1.0
    """Weight of the KL penalty; of the adaptive one, at the start."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint."""

    params: Params
    opt_state: PyTree
    rollout: rollout.RolloutState
    observation_statistics: PyTree
    reward_scaling: PyTree
    kl_coef: PyTree
    env_steps: Array
    key: Key


class Batch(NamedTuple):
    """What an update learns from, flat ``[T·B, ...]``, or with a memory ``[T, B, ...]``; ``obs`` already normalised.

    ``head`` is that of the policy that acted, for a KL penalty; ``reset`` says before which steps an episode ended;
    ``memory [1, B, ...]`` is that of the first step. What is not needed is ``()``.
    """

    obs: PyTree
    action: Array
    log_prob: Array
    value: Array
    advantage: Array
    target: Array
    head: PyTree
    reset: PyTree
    memory: Memory


def make(
    env: Environment,
    config: Config | None = None,
    *,
    network: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
    shards: Shards = Shards(),  # noqa: B008 - a constant
) -> Algorithm:
    """Return PPO on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own; Discrete, MultiDiscrete or Box actions.
        config: static choices.
        network: any ``init``/``apply`` pair, ``obs -> (policy head, value)``, with a memory or without: the head is
            logits (MultiDiscrete: side by side), or ``(mean, log_std)`` for a Box. None builds one from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.
        shards: the parts of a run's environments, of which this kernel is to compute one; given by
            :func:`jrl.parallel.data_parallel`. Each minibatch then has an equal part of every shard.

    Raises:
        TypeError: ``env``, ``config`` or ``network`` is not what it should be.
        ValueError: ``env`` is vectorised already; ``network``'s output does not fit the action space; ``config``
            cannot be split into so many shards, or the sequences of a memory into so many minibatches, or normalises
            observations that are tokens.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, config.kernels)
    num_envs = checks.shard(config, shards)
    core = networks.memory_core(config)
    envs, network, distribution = actor = on_policy.actor(
        env, num_envs, network, config, shared_torso=config.shared_torso, fuse=True, core=core
    )
    if config.normalize_observations:
        checks.numeric(env, "normalize_observations")
    with_memory = bool(jax.tree.leaves(network.init_memory(())))
    if with_memory:
        checks.sequences(config, shards)
    penalized, adaptive = config.objective != "clip", config.objective == "adaptive_kl"

    # Of a minibatch as a whole: before it is split. Shards exchange the moments of all minibatches at once, so that in
    # the loop they exchange gradients only.
    split = shards.count > 1 or config.num_microbatches > 1
    standardize_before = config.standardize_advantages and split
    standardize_within = config.standardize_advantages and not split

    def mean(x: Array) -> Array:
        return shards.mean(jnp.mean(x))

    def normalized(statistics: PyTree, obs: PyTree) -> PyTree:
        return normalize.normalize(statistics, obs) if config.normalize_observations else obs

    def apply_normalized(params: PyTree, obs: PyTree, memory: Memory) -> tuple[PyTree, Memory]:
        return network.apply(params[0], normalized(params[1], obs), memory)

    def act(params: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        output, memory = apply_normalized(params, obs, memory)
        policy = distribution(output[0])
        action = policy.sample(key)
        # Without a memory the batch as a whole is faster than its steps one by one.
        return action, memory, (policy.log_prob(action), memory, output if with_memory else None)

    played = on_policy.policies(actor._replace(network=network._replace(apply=apply_normalized)))

    def env_params(hparams: HParams) -> PyTree:
        return env.params if hparams.env is None else hparams.env

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, state_key = jax.random.split(key, 3)
        memory = network.init_memory((num_envs,))
        start = rollout.start(reset_key, envs, env_params(hparams), num_envs, memory)
        params = network.init(network_key, start.obs, memory)
        return State(
            params=params,
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=start,
            observation_statistics=(
                normalize.init_statistics(env.observation) if config.normalize_observations else ()
            ),
            reward_scaling=normalize.init_reward_scaling(num_envs) if config.normalize_rewards else (),
            kl_coef=jnp.asarray(hparams.kl_coef, jnp.float32) if adaptive else (),
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def targets(state: State, transitions: rollout.Transition, hparams: HParams) -> Batch:
        def values(acting: PyTree, successors: tuple[PyTree, Memory]) -> Array:
            (_, value), _ = apply_normalized(acting, *successors)
            return value

        obs = normalized(state.observation_statistics, transitions.obs)
        log_prob, next_memory, output = transitions.extras
        head, value = output if with_memory else network.apply(state.params, obs, ())[0]
        acting = (state.params, state.observation_statistics)
        successors = (transitions.next_obs, next_memory)
        next_value = rollout.successor_values(values, acting, value, transitions, successors)
        flags = (transitions.terminated, transitions.truncated)
        advantage, target = ops.gae(
            transitions.reward, value, next_value, *flags, gamma=hparams.gamma, gae_lambda=hparams.gae_lambda
        )
        head = head if penalized else ()
        batch = Batch(obs, transitions.action, log_prob, value, advantage, target, head, (), ())
        if with_memory:
            reset = networks.reset_before(transitions.terminated | transitions.truncated)
            memory = jax.tree.map(lambda leaf: leaf[None], state.rollout.memory)
            return batch._replace(reset=reset, memory=memory)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)

    def loss(params: Params, batch: Batch, kl_coef: PyTree, hparams: HParams) -> tuple[Array, Metrics]:
        memory = jax.tree.map(lambda leaf: leaf[0], batch.memory)
        (head, value), _ = networks.apply_sequence(network, params, batch.obs, memory, batch.reset)
        policy = distribution(head)
        log_prob = policy.log_prob(batch.action)
        advantage = ops.standardize(batch.advantage) if standardize_within else batch.advantage
        metrics = {}
        if penalized:
            metrics["kl"] = distribution(batch.head).kl(policy).mean()
            policy_loss = ops.ppo_kl_loss(log_prob, batch.log_prob, advantage, metrics["kl"], kl_coef)
        else:
            policy_loss = ops.ppo_clip_loss(log_prob, batch.log_prob, advantage, hparams.clip_eps)
        if config.clip_value:
            value_loss = ops.clipped_value_loss(value, batch.value, batch.target, hparams.value_clip_eps)
        else:
            value_loss = ops.value_loss(value, batch.target)
        entropy = policy.entropy().mean()
        total = policy_loss + hparams.value_coef * value_loss - hparams.entropy_coef * entropy
        return total, metrics | {
            "loss": total,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": ops.approx_kl(log_prob, batch.log_prob),
            "clip_fraction": ops.clip_fraction(log_prob, batch.log_prob, hparams.clip_eps),
        }

    def update(state: State, batch: Batch, key: Key, hparams: HParams) -> tuple[State, Metrics]:
        """Take num_epochs × num_minibatches gradient steps on ``batch``."""
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        gradient_step = optimizer(hparams, learning_rate).update
        kl_coef = state.kl_coef if adaptive else hparams.kl_coef
        size = num_envs if with_memory else batch.advantage.size

        def part(leaf: Array, index: Array) -> Array:
            return leaf[:, index] if with_memory else leaf[index]

        def standardized(index: Array) -> Array:
            return ops.standardize(part(batch.advantage, index), mean=mean)

        def microbatches(leaf: Array) -> Array:
            return jnp.moveaxis(leaf.reshape(*leaf.shape[:-1], config.num_microbatches, -1), -2, 0)

        shuffles = ops.shuffled_indices(key, size, config.num_epochs)
        shuffles = shuffles.reshape(config.num_epochs * config.num_minibatches, -1)
        advantages = jax.vmap(standardized)(shuffles) if standardize_before else None

        def gradient(params: Params, shuffled: tuple) -> tuple[Params, Metrics]:
            index, advantage = shuffled
            minibatch = jax.tree.map(lambda leaf: part(leaf, index), batch)
            if standardize_before:
                minibatch = minibatch._replace(advantage=advantage)
            return jax.grad(loss, has_aux=True)(params, minibatch, kl_coef, hparams)

        def minibatch_step(carry: tuple, shuffled: tuple) -> tuple[tuple, Metrics]:
            params, opt_state, stopped = carry
            parts = jax.tree.map(microbatches, shuffled)
            grads, metrics = shards.mean(mean_over(functools.partial(gradient, params), parts))
            metrics["grad_norm"] = global_norm(grads, config.kernels)
            updates, new_opt_state = gradient_step(grads, opt_state, params)
            new = (optax.apply_updates(params, updates), new_opt_state)
            if config.stop_at_target_kl:
                # A select, not a branch: under vmap a batched branch would run both sides anyway.
                stopped |= metrics["approx_kl"] > hparams.target_kl
                new = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), (params, opt_state), new)
                metrics["stopped_fraction"] = stopped.astype(jnp.float32)
            return (*new, stopped), metrics

        start = (state.params, state.opt_state, jnp.bool_(False))
        (params, opt_state, _), steps = jax.lax.scan(minibatch_step, start, (shuffles, advantages))
        metrics = jax.tree.map(jnp.mean, steps)
        if adaptive:
            metrics["kl_coef"] = kl_coef
            # Of the last epoch, as the paper measures it when the update is over.
            last_kl = steps["kl"][-config.num_minibatches :].mean()
            kl_coef = ops.adapted_kl_coef(kl_coef, last_kl, hparams.target_kl)
            state = dataclasses.replace(state, kl_coef=kl_coef)
        metrics["learning_rate"] = learning_rate
        metrics["explained_variance"] = ops.explained_variance(batch.value, batch.target, mean=mean)
        return dataclasses.replace(state, params=params, opt_state=opt_state), metrics

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys, update_key = threefry.split_keys(
            state.key, (), (config.unroll_length, 2), (), kernels=config.kernels
        )
        behaviour = Policy(act, (state.params, state.observation_statistics), network.init_memory)
        rollout_state, transitions, episode_metrics = rollout.unroll(
            unroll_keys, envs, env_params(hparams), behaviour, state.rollout, config.unroll_length
        )
        reward_scaling = state.reward_scaling
        if config.normalize_rewards:
            flags = (transitions.terminated, transitions.truncated)
            reward_scaling, reward = normalize.scale_reward(
                reward_scaling, transitions.reward, *flags, gamma=hparams.gamma, shards=shards
            )
            transitions = transitions._replace(reward=reward)
        batch = targets(state, transitions, hparams)
        state, metrics = update(state, batch, update_key, hparams)
        statistics = state.observation_statistics
        if config.normalize_observations:
            # Only now: the batch's ratios start at 1 because its statistics are those it was collected with.
            statistics = normalize.update_statistics(statistics, transitions.obs, shards)
        state = dataclasses.replace(
            state,
            rollout=rollout_state,
            observation_statistics=statistics,
            reward_scaling=reward_scaling,
            env_steps=ops.counter.add(state.env_steps, env_steps_per_step),
            key=next_key,
        )
        return state, episode_metrics | metrics

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the current policy: the mode of its distribution, or samples from it."""
        return played((state.params, state.observation_statistics), greedy=greedy)

    env_steps_per_step = config.num_envs * config.unroll_length
    return Algorithm(init, step, policy, env_steps_per_step, env)
