"""REINFORCE: the policy gradient from whole episodes (Williams, 1992, https://doi.org/10.1007/BF00992696).

``∇J = E Σ_t γ^t ∇log π(a_t|s_t) (G_t − b_t)`` over the first episode of each environment, all begun anew at each step.
Not over those that happen to end within a window: short ones would be favoured. So ``unroll_length`` must be as long
as the longest episode, and what follows shorter ones is not learned from. Baselines ``b``: none; the mean of ``G_t``
over the episodes; the mean over the others, which keeps the estimate unbiased (Kool et al., 2019,
https://openreview.net/forum?id=r1lgTGL5DE); a learned value (Sutton and Barto, 2018, section 13.4).

Only the learned value can tell what a time limit cut off; without it the return up to the limit is maximised.
Deviation: ``γ^t`` is left out unless asked for, as all of practice does.
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

BASELINES = ("none", "mean", "leave_one_out", "value")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 8
    """Episodes of each gradient step, side by side."""
    unroll_length: int = 500
    """Steps of each environment; longer episodes are cut there."""
    baseline: str = "value"
    """'none', 'mean', 'leave_one_out' or 'value'."""
    discount_gradient: bool = False
    """Weigh step t of an episode by γ^t, as the gradient of the discounted return has it."""
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
        checks.sizes(self, "num_envs", "unroll_length")
        checks.choice(self, "baseline", BASELINES)
        if self.baseline in ("mean", "leave_one_out") and self.num_envs < 2:
            raise ValueError(
                f"baseline={self.baseline!r} with num_envs={self.num_envs}: it compares 2 or more."
            )
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-2
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    gamma: float = 0.99
    """Discount factor γ."""
    value_coef: float = 0.5
    """Weight of the value loss, with baseline 'value'."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 10.0
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
    """Return REINFORCE on ``env`` as an :class:`~jrl.types.Algorithm`.

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
    checks.feed_forward(network, "reinforce")
    learns_value = config.baseline == "value"
    played = on_policy.policies(actor, learns_value)

    def act(params: Params, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        (head, _), memory = network.apply(params, obs, memory)
        return distribution(head).sample(key), memory, ()

    def begin(key: Key, hparams: HParams) -> rollout.RolloutState:
        env_params = env.params if hparams.env is None else hparams.env
        return rollout.start(key, envs, env_params, config.num_envs)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, state_key = jax.random.split(key, 3)
        start = begin(reset_key, hparams)
        params = network.init(network_key, start.obs, ())
        opt_state = optimizer(hparams, jnp.float32(0)).init(params)
        return State(params, opt_state, start, ops.counter.zero(), state_key)

    def targets(next_value: Array, transitions: Transition, used: Array, hparams: HParams) -> Array:
        """The returns ``G [T, B]``, 0 where the episode is over."""
        next_value = jax.lax.stop_gradient(next_value) if learns_value else jnp.zeros_like(next_value)
        returns = ops.discounted_returns(
            transitions.reward, next_value, transitions.terminated, transitions.truncated, gamma=hparams.gamma
        )
        return jnp.where(used, returns, 0.0)

    def baseline(returns: Array, value: Array) -> Array:
        match config.baseline:
            case "mean":
                return returns.mean(1, keepdims=True)
            case "leave_one_out":
                return (returns.sum(1, keepdims=True) - returns) / (config.num_envs - 1)
            case "value":
                return jax.lax.stop_gradient(value)
        return jnp.zeros_like(returns)

    def loss(params: Params, transitions: Transition, hparams: HParams) -> tuple[Array, Metrics]:
        """Sums over the steps of an episode, means over the episodes."""
        (head, value), _ = network.apply(params, transitions.obs, ())
        (_, next_value), _ = network.apply(params, transitions.next_obs, ())
        policy = distribution(head)
        ended = transitions.terminated | transitions.truncated
        used = jnp.cumsum(ended, axis=0) == ended  # no episode ended before
        returns = targets(next_value, transitions, used, hparams)
        advantage = returns - baseline(returns, value)
        if config.discount_gradient:
            advantage *= hparams.gamma ** jnp.arange(config.unroll_length, dtype=jnp.float32)[:, None]

        def total(x: Array) -> Array:
            return jnp.where(used, x, 0.0).sum(0).mean()

        policy_loss = -total(policy.log_prob(transitions.action) * advantage)
        value_loss = 0.5 * total(jnp.square(value - returns)) * learns_value
        entropy = total(policy.entropy())
        whole = policy_loss + hparams.value_coef * value_loss - hparams.entropy_coef * entropy
        return whole, {
            "loss": whole,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy / total(jnp.ones_like(value)),
            "used_fraction": used.mean(dtype=jnp.float32),
        }

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_key, reset_key = threefry.split_keys(state.key, (), (), (), kernels=config.kernels)
        env_params = env.params if hparams.env is None else hparams.env
        _, transitions, episode_metrics = rollout.unroll(
            unroll_key, envs, env_params, Policy(act, state.params), state.rollout, config.unroll_length
        )
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, transitions, hparams)
        metrics |= {"grad_norm": global_norm(grads, config.kernels), "learning_rate": learning_rate}
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        env_steps = ops.counter.add(state.env_steps, env_steps_per_step)
        state = State(params, opt_state, begin(reset_key, hparams), env_steps, next_key)
        return state, episode_metrics | metrics

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the current policy: the mode of its distribution, or samples from it."""
        return played(state.params, greedy=greedy)

    env_steps_per_step = config.num_envs * config.unroll_length
    return Algorithm(init, step, policy, env_steps_per_step, env)
