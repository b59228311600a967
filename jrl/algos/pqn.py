"""Parallelised Q-network (Gallici et al., 2024, https://arxiv.org/abs/2407.04811): Q-learning without a replay.

Many environments take the place of the replay, and layer normalisation that of the target network: ε-greedy unrolls,
Peng's Q(λ) targets from the network itself, a few epochs of minibatches, and the experience is dropped. Deviations: a
time limit is never a terminal state, and ends the λ-trace; the last row of a window bootstraps from its own successor;
Adam instead of RAdam; rewards are not scaled (:func:`jrl.envs.scale_reward` does it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import networks, ops, rollout
from jrl.algos import checks, exploration
from jrl.envs import vectorize
from jrl.native import threefry
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Metrics, Params, Policy, PyTree, Shards, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 128
    """Environments stepped side by side."""
    unroll_length: int = 32
    """Steps in each environment between two updates."""
    num_epochs: int = 2
    """Passes over each batch."""
    num_minibatches: int = 32
    """Parts of a batch, each one gradient step; must divide num_envs × unroll_length."""
    torso: str = "auto"
    """'mlp', 'cnn', or 'auto': cnn for image observations, else mlp."""
    hidden_sizes: tuple[int, ...] = (120, 84)
    """Widths of the fully connected layers."""
    channels: tuple[int, ...] = (16,)
    """Channels of the 3×3 convolutions of a cnn."""
    activation: str = "relu"
    """tanh, relu, elu, gelu or silu."""
    kernels: str = "xla"
    """'xla'; or 'native': an mlp of tanh or relu, Adam and random numbers in C++, on CPUs, compiled at first use."""
    layer_norm: bool = True
    """Normalise before each activation: what keeps learning stable without a target network."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_envs", "unroll_length", "num_epochs", "num_minibatches")
        checks.minibatches(self)
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 5e-4
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 500_000.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant. For longer runs
    raise it with them."""
    gamma: float = 0.99
    """Discount factor γ."""
    q_lambda: float = 0.9
    """λ of the targets: 0 is one-step Q-learning, 1 the return of the window."""
    epsilon_start: float = 1.0
    """Chance of a random action at env step 0."""
    epsilon_end: float = 0.05
    """Chance of a random action after epsilon_env_steps."""
    epsilon_env_steps: float = 100_000.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this global norm."""
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


class Batch(NamedTuple):
    """What an update learns from, flat ``[T·B, ...]``."""

    obs: PyTree
    action: Array
    target: Array


def make(
    env: Environment,
    config: Config | None = None,
    *,
    network: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
    shards: Shards = Shards(),  # noqa: B008 - a constant
) -> Algorithm:
    """Return PQN on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own, with Discrete actions.
        config: static choices.
        network: any ``init``/``apply`` pair, ``obs -> Q [..., A]``. None builds one from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.
        shards: the parts of a run's environments, of which this kernel is to compute one; given by
            :func:`jrl.parallel.data_parallel`.

    Raises:
        TypeError: ``env``, ``config`` or ``network`` is not what it should be, or the actions are not Discrete.
        ValueError: ``env`` is vectorised already; ``network``'s width is not the number of actions, or it has a
            memory; ``config`` cannot be split into so many shards.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, config.kernels)
    checks.environment(env)
    action = checks.discrete(env, "pqn")
    num_envs = checks.shard(config, shards)
    envs = vectorize(env, num_envs)
    network = (
        networks.q_network(env, config, features_first=True)
        if network is None
        else networks.as_network(network)
    )
    checks.feed_forward(network, "pqn")
    networks.check_q_output(network, env.observation, action)
    network = networks.mask_aware(network, ops.masked)
    act = exploration.epsilon_greedy(network.apply)
    env_steps_per_step = config.num_envs * config.unroll_length

    def action_values(params: Params, obs: PyTree) -> Array:
        return network.apply(params, obs, ())[0]

    def env_params(hparams: HParams) -> PyTree:
        return env.params if hparams.env is None else hparams.env

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, state_key = jax.random.split(key, 3)
        start = rollout.start(reset_key, envs, env_params(hparams), num_envs)
        params = network.init(network_key, start.obs, ())
        return State(
            params=params,
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=start,
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def targets(params: Params, transitions: Transition, hparams: HParams) -> Batch:
        """Q(λ): ``G = r + γ (1 − terminated) ((1 − λ) max_a Q(s', a) + λ G')``, ``G' = max_a Q`` where a trace ends."""

        def values(params: Params, next_obs: PyTree) -> Array:
            return action_values(params, next_obs).max(-1)

        # Acting has evaluated all true successors but the last ones and those where an episode was cut.
        next_value = rollout.successor_values(
            values, params, transitions.extras["q"].max(-1), transitions, transitions.next_obs
        )
        target = ops.q_lambda(
            transitions.reward,
            next_value[..., None],
            transitions.terminated,
            transitions.truncated,
            gamma=hparams.gamma,
            lambda_=hparams.q_lambda,
        )
        batch = Batch(transitions.obs, transitions.action, target)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)

    def loss(params: Params, batch: Batch) -> tuple[Array, Metrics]:
        q = action_values(params, batch.obs)
        td_error = ops.td_error(q, batch.action, batch.target)
        total = 0.5 * jnp.mean(td_error**2)
        return total, {"loss": total, "td_error": jnp.abs(td_error).mean(), "q": q.max(-1).mean()}

    def update(
        state: State, batch: Batch, key: Key, hparams: HParams, learning_rate: Array
    ) -> tuple[State, Metrics]:
        """Take num_epochs × num_minibatches gradient steps on ``batch``."""
        gradient_step = optimizer(hparams, learning_rate).update
        shuffles = ops.shuffled_indices(key, batch.action.size, config.num_epochs)

        def minibatch_step(carry: tuple[Params, PyTree], index: Array) -> tuple[tuple, Metrics]:
            params, opt_state = carry
            minibatch = jax.tree.map(lambda leaf: leaf[index], batch)
            grads, metrics = shards.mean(jax.grad(loss, has_aux=True)(params, minibatch))
            updates, opt_state = gradient_step(grads, opt_state, params)
            metrics["grad_norm"] = global_norm(grads, config.kernels)
            return (optax.apply_updates(params, updates), opt_state), metrics

        (params, opt_state), metrics = jax.lax.scan(
            minibatch_step,
            (state.params, state.opt_state),
            shuffles.reshape(config.num_epochs * config.num_minibatches, -1),
        )
        return dataclasses.replace(state, params=params, opt_state=opt_state), jax.tree.map(jnp.mean, metrics)

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys, update_key = threefry.split_keys(
            state.key, (), (config.unroll_length, 2), (), kernels=config.kernels
        )
        env_steps = ops.counter.to_float(state.env_steps)
        epsilon = exploration.annealed_epsilon(hparams, env_steps)
        learning_rate = annealed_learning_rate(hparams, env_steps)
        behaviour = Policy(act, (state.params, epsilon))
        rollout_state, transitions, episode_metrics = rollout.unroll(
            unroll_keys, envs, env_params(hparams), behaviour, state.rollout, config.unroll_length
        )
        batch = targets(state.params, transitions, hparams)
        state, metrics = update(state, batch, update_key, hparams, learning_rate)
        state = dataclasses.replace(
            state,
            rollout=rollout_state,
            env_steps=ops.counter.add(state.env_steps, env_steps_per_step),
            key=next_key,
        )
        return state, episode_metrics | metrics | {"epsilon": epsilon, "learning_rate": learning_rate}

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy, or, with greedy=False, an ε-greedy one."""
        return Policy(act, (state.params, jnp.float32(0.0 if greedy else epsilon)))

    return Algorithm(init, step, policy, env_steps_per_step, env)
