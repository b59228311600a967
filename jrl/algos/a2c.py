"""Advantage actor-critic, the synchronous form of A3C (Mnih et al., 2016, https://arxiv.org/abs/1602.01783).

Optionally with V-trace (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561), which corrects for the policy
having moved since it acted, so that several gradient steps can be taken on each unroll. Deviations from the papers:
Adam in place of RMSProp; at a time limit the target bootstraps from the value of the true last observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import ops, rollout
from jrl.algos import checks, on_policy
from jrl.native import threefry
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 16
    """Environments stepped side by side."""
    unroll_length: int = 32
    """Steps in each environment between two rounds of updates."""
    vtrace: bool = False
    """Weigh what was done by how likely the present policy would do it."""
    num_updates: int = 1
    """Gradient steps on each unroll; more than one need vtrace."""
    standardize_advantages: bool = False
    """Centre and scale the advantages of each unroll."""
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

    def __post_init__(self) -> None:
        checks.sizes(self, "num_envs", "unroll_length", "num_updates")
        if self.num_updates > 1 and not self.vtrace:
            raise ValueError(
                f"num_updates={self.num_updates} with vtrace=False: after the first step the data is another policy's; "
                "use vtrace=True, or jrl.ppo."
            )
        if self.standardize_advantages and self.num_envs == self.unroll_length == 1:
            raise ValueError(
                "num_envs=1 with unroll_length=1 leaves one transition an update, whose standardised advantage is "
                "always 0; use more, or standardize_advantages=False."
            )
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 2e-3
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    gamma: float = 0.99
    """Discount factor γ."""
    gae_lambda: float = 1.0
    """λ of the advantage estimate, or of V-trace's trace; 1 is the n-step return of the paper."""
    clip_rho: float = 1.0
    """With vtrace: bound of the probability ratio, in the value's error and in the policy gradient."""
    clip_c: float = 1.0
    """With vtrace: bound of the probability ratio in the trace."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this global norm, over policy and value together."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint."""

    params: Params
    opt_state: PyTree
    rollout: rollout.RolloutState
    env_steps: Array
    key: Key


def make(
    env: Environment,
    config: Config | None = None,
    *,
    network: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return A2C on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own; Discrete, MultiDiscrete or Box actions.
        config: static choices.
        network: any ``init``/``apply`` pair without memory, ``obs -> (policy head, value)``: the head is logits
            (MultiDiscrete: side by side), or ``(mean, log_std)`` for a Box. None builds one from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env``, ``config`` or ``network`` is not what it should be.
        ValueError: ``env`` is vectorised already; ``network``'s output does not fit the action space, or it has
            a memory.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, config.kernels)
    envs, network, distribution = actor = on_policy.actor(
        env, config.num_envs, network, config, shared_torso=config.shared_torso
    )
    checks.feed_forward(network, "a2c")
    played = on_policy.policies(actor)

    def act(params: Params, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        (head, _), memory = network.apply(params, obs, memory)
        policy = distribution(head)
        action = policy.sample(key)
        return action, memory, policy.log_prob(action)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, state_key = jax.random.split(key, 3)
        env_params = env.params if hparams.env is None else hparams.env
        start = rollout.start(reset_key, envs, env_params, config.num_envs)
        params = network.init(network_key, start.obs, ())
        opt_state = optimizer(hparams, jnp.float32(0)).init(params)
        return State(params, opt_state, start, ops.counter.zero(), state_key)

    def targets(
        value: Array, next_value: Array, log_prob: Array, transitions: Transition, hparams: HParams
    ) -> tuple[Array, Array]:
        """Return the advantages and the value targets, ``[T, B]``."""
        reward, flags = transitions.reward, (transitions.terminated, transitions.truncated)
        gamma, lambda_ = hparams.gamma, hparams.gae_lambda
        if not config.vtrace:
            return ops.gae(reward, value, next_value, *flags, gamma=gamma, gae_lambda=lambda_)
        target, advantage = ops.vtrace(
            reward,
            value,
            next_value,
            *flags,
            log_prob - transitions.extras,
            gamma=gamma,
            lambda_=lambda_,
            clip_rho=hparams.clip_rho,
            clip_c=hparams.clip_c,
            clip_pg_rho=hparams.clip_rho,
        )
        return advantage, target

    def loss(params: Params, transitions: Transition, hparams: HParams) -> tuple[Array, Metrics]:
        (head, value), _ = network.apply(params, transitions.obs, ())
        (_, next_value), _ = network.apply(params, transitions.next_obs, ())
        policy = distribution(head)
        log_prob = policy.log_prob(transitions.action)
        advantage, target = jax.lax.stop_gradient(targets(value, next_value, log_prob, transitions, hparams))
        if config.standardize_advantages:
            advantage = ops.standardize(advantage)
        policy_loss = ops.policy_gradient_loss(log_prob, advantage)
        value_loss = ops.value_loss(value, target)
        entropy = policy.entropy().mean()
        total = policy_loss + hparams.value_coef * value_loss - hparams.entropy_coef * entropy
        return total, {
            "loss": total,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": ops.approx_kl(log_prob, transitions.extras),
            "explained_variance": ops.explained_variance(value, target),
        }

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys = threefry.split_keys(
            state.key, (), (config.unroll_length, 2), kernels=config.kernels
        )
        env_params = env.params if hparams.env is None else hparams.env
        rollout_state, transitions, episode_metrics = rollout.unroll(
            unroll_keys, envs, env_params, Policy(act, state.params), state.rollout, config.unroll_length
        )
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        gradient_step = optimizer(hparams, learning_rate).update

        def update(carry: tuple[Params, PyTree], _: None) -> tuple[tuple[Params, PyTree], Metrics]:
            params, opt_state = carry
            grads, metrics = jax.grad(loss, has_aux=True)(params, transitions, hparams)
            metrics["grad_norm"] = global_norm(grads, config.kernels)
            updates, opt_state = gradient_step(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics

        start = (state.params, state.opt_state)
        (params, opt_state), metrics = jax.lax.scan(update, start, length=config.num_updates)
        env_steps = ops.counter.add(state.env_steps, env_steps_per_step)
        metrics = jax.tree.map(jnp.mean, metrics) | {"learning_rate": learning_rate}
        return State(params, opt_state, rollout_state, env_steps, next_key), episode_metrics | metrics

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the current policy: the mode of its distribution, or samples from it."""
        return played(state.params, greedy=greedy)

    env_steps_per_step = config.num_envs * config.unroll_length
    return Algorithm(init, step, policy, env_steps_per_step, env)
