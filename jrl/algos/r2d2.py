"""Recurrent replay distributed DQN (Kapturowski et al., 2019, https://openreview.net/forum?id=r1lyTjAqYX).

Deep Q-learning with a memory, from prioritised sequences: each begins with the memory that the policy had there when
it acted, a burn-in brings that up to date, and the rest learns n-step Double targets of rescaled values (Pohlen et
al., 2018, https://arxiv.org/abs/1805.11593). Deviations: environments side by side instead of distributed actors, with
one ε; sequences may run over the end of an episode, where the memory starts anew; a time limit is never a terminal
state, and is bootstrapped from the true successor under the memory of its episode; n-step windows end at either flag,
and with the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import networks, ops, replay, rollout
from jrl.algos import checks, exploration, off_policy
from jrl.envs import vectorize
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 16
    """Environments stepped side by side."""
    unroll_length: int = 16
    """Steps in each environment between two rounds of updates; sequences in the replay begin so far apart."""
    num_updates: int = 4
    """Gradient steps a round."""
    batch_size: int = 32
    """Sequences a gradient step."""
    burn_in: int = 8
    """First steps of a sequence, which bring the memory up to date and are not learned from."""
    learn_length: int = 24
    """Steps of a sequence after the burn-in."""
    capacity: int = 50_000
    """Transitions the replay holds (rounded up to whole blocks of num_envs × unroll_length)."""
    truncation_gap: int = 16
    """Steps between two time limits that cut episodes of one environment, at least; see dqn."""
    replay_dtype: str = "same"
    """What the replay keeps floats of observations in: 'same', 'float16' or 'bfloat16'; see dqn."""
    warmup_env_steps: int = 5_000
    """Environment steps taken with random actions before the first update, within init."""
    n_step: int = 3
    """Steps of reward before the target bootstraps."""
    dueling: bool = True
    """Split the network's head into a value and advantages."""
    memory: str = "gru"
    """'gru'; 'transformer': attention over the last memory_window steps; 'none', to see what a memory is for."""
    memory_size: int = 64
    """Width of the memory."""
    memory_window: int = 16
    """Steps back that each layer of a transformer sees."""
    memory_layers: int = 1
    """Layers of a transformer."""
    torso: str = "auto"
    """'mlp', 'cnn', or 'auto': cnn for image observations, else mlp."""
    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of the fully connected layers before the memory."""
    channels: tuple[int, ...] = (16,)
    """Channels of the 3×3 convolutions of a cnn."""
    activation: str = "relu"
    """tanh, relu, elu, gelu or silu."""
    layer_norm: bool = True
    """Normalise before each activation."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_updates", "learn_length", "n_step", "memory_size")
        checks.sizes(self, "memory_window", "memory_layers")
        checks.choice(self, "memory", ("gru", "transformer", "none"))
        off_policy.check_replay(self)
        if isinstance(self.burn_in, bool) or not isinstance(self.burn_in, int) or self.burn_in < 0:
            raise ValueError(f"burn_in={self.burn_in!r}: must be an integer of at least 0.")
        steps = self.num_envs * self.unroll_length * self.span
        if min(self.capacity, self.warmup_env_steps) < steps:
            raise ValueError(
                f"capacity={self.capacity} and warmup_env_steps={self.warmup_env_steps} must both hold whole "
                f"sequences: burn_in + learn_length = {self.sequence_length} steps lie in {self.span} unrolls of "
                f"{self.num_envs} × {self.unroll_length} steps; raise them to at least {steps}, or learn_length lower."
            )
        check_torso(self)

    @property
    def sequence_length(self) -> int:
        """Steps of a sequence."""
        return self.burn_in + self.learn_length

    @property
    def span(self) -> int:
        """Unrolls that a sequence touches."""
        return -(-self.sequence_length // self.unroll_length)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 500_000.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant. For longer runs
    raise it with them."""
    gamma: float = 0.99
    """Discount factor γ."""
    epsilon_start: float = 1.0
    """Chance of a random action at env step 0."""
    epsilon_end: float = 0.05
    """Chance of a random action after epsilon_env_steps."""
    epsilon_env_steps: float = 100_000.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    target_period: float = 2_500.0
    """Environment steps between two copies to the target network."""
    rescale_eps: float = 1e-3
    """ε of the value rescaling h(x) = sign(x) (sqrt(|x| + 1) − 1) + ε x."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this global norm."""
    max_error_weight: float = 0.9
    """η: a sequence's priority is η times its largest error and 1 − η times its mean one."""
    priority_exponent: float = 0.9
    """α of prioritised replay; 0 is uniform."""
    importance_exponent: float = 0.6
    """β of prioritised replay."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint."""

    params: Params
    target_params: Params
    opt_state: PyTree
    rollout: rollout.RolloutState
    replay: replay.sequence.SequenceState
    since_target: Array
    env_steps: Array
    key: Key


class Batch(NamedTuple):
    """What a gradient step learns from: steps after the burn-in, ``[S, N, ...]``.

    ``memory [N, ...]`` is the online network's before the first of them, ``reset`` says before which an episode ended,
    and ``weight [S, N]`` is 0 where the target is not known.
    """

    obs: PyTree
    action: Array
    target: Array
    reset: Array
    memory: Memory
    weight: Array


def make(
    env: Environment,
    config: Config | None = None,
    *,
    network: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return R2D2 on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own, with Discrete actions.
        config: static choices.
        network: any ``init``/``apply`` pair, ``obs -> Q [..., A]``, with a memory or without. None builds one from
            ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env``, ``config`` or ``network`` is not what it should be, or the actions are not Discrete.
        ValueError: ``env`` is vectorised already; ``network``'s width is not the number of actions.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, "xla")
    checks.environment(env)
    action = checks.discrete(env, "r2d2")
    envs = vectorize(env, config.num_envs)
    if network is None:
        network = networks.q_network(env, config, dueling=config.dueling, core=networks.memory_core(config))
    network = networks.as_network(network)
    networks.check_q_output(network, env.observation, action)
    network = networks.mask_aware(network, ops.masked)
    block_steps = config.num_envs * config.unroll_length
    buffer = replay.sequence.buffer(config.unroll_length, config.sequence_length)
    act = exploration.epsilon_greedy(network.apply)

    def explore(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        action, next_memory, _ = act(acting, key, obs, memory)
        return action, next_memory, memory  # the replay keeps that of the first step

    def behaviour(params: Params, epsilon: Array) -> Policy:
        return Policy(explore, (params, epsilon), network.init_memory)

    def env_params(hparams: HParams) -> PyTree:
        return env.params if hparams.env is None else hparams.env

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, warmup_key, state_key = jax.random.split(key, 4)
        memory = network.init_memory((config.num_envs,))
        start = rollout.start(reset_key, envs, env_params(hparams), config.num_envs, memory)
        params = network.init(network_key, start.obs, memory)
        uniform = behaviour(params, jnp.float32(1.0))
        start, stored = off_policy.warm_up(
            warmup_key, envs, env_params(hparams), uniform, start, config, buffer
        )
        return State(
            params=params,
            # A copy of its own: two leaves of one buffer could not both be donated.
            target_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=start,
            replay=stored,
            since_target=jnp.float32(0),
            env_steps=ops.counter.add(ops.counter.zero(), off_policy.warmup_env_steps(config)),
            key=state_key,
        )

    def evaluate_sequence(
        params: Params, steps: Transition, memory: Memory, reset: Array
    ) -> tuple[Array, Memory]:
        """Return Q of the true successors ``[S, N, A]``, with their episode's memory, and the memory after burn-in."""

        def body(memory: Memory, now: tuple[PyTree, PyTree, Array]) -> tuple[Memory, tuple[Array, Memory]]:
            obs, next_obs, reset = now
            before = rollout.reset_memory(network, memory, reset)
            _, memory = network.apply(params, obs, before)
            # Of the next row for most steps, but where an episode was cut no row has it.
            next_q, _ = network.apply(params, next_obs, memory)
            return memory, (next_q, before)

        _, (next_q, before) = jax.lax.scan(body, memory, (steps.obs, steps.next_obs, reset))
        return next_q, jax.tree.map(lambda leaf: leaf[config.burn_in], before)

    def targets(state: State, sample: replay.sequence.Sequences, hparams: HParams) -> Batch:
        """``h(Σ_{j<k} γ^j r_j + γ^k (1 − terminated) h⁻¹(Q⁻(s_k, argmax_a Q(s_k, a))))``."""
        steps = sample.steps
        reset = networks.reset_before(steps.terminated | steps.truncated)
        online_q, memory = evaluate_sequence(state.params, steps, sample.memory, reset)
        target_q, _ = evaluate_sequence(state.target_params, steps, sample.memory, reset)
        next_value = ops.select_action(target_q, jnp.argmax(online_q, axis=-1))
        flags = (steps.terminated, steps.truncated)
        target = ops.n_step_returns(
            steps.reward,
            ops.unscale_value(next_value, hparams.rescale_eps),
            *flags,
            gamma=hparams.gamma,
            n=config.n_step,
        )
        # A window that ends in a successor that was lost has no target: it would count 1 or more of them.
        lost = sample.lost.astype(jnp.float32)
        lost = ops.n_step_returns(lost, jnp.zeros_like(lost), *flags, gamma=1.0, n=config.n_step)
        batch = Batch(
            steps.obs,
            steps.action,
            ops.rescale_value(target, hparams.rescale_eps),
            reset,
            (),
            jnp.where(lost > 0, 0.0, sample.weight),
        )
        batch = jax.tree.map(lambda leaf: leaf[config.burn_in :], batch)
        # The memory there has had this step's reset already.
        return jax.lax.stop_gradient(
            batch._replace(memory=memory, reset=batch.reset.at[0].set(jnp.zeros_like(batch.reset[0])))
        )

    def loss(params: Params, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
        q, _ = networks.apply_sequence(network, params, batch.obs, batch.memory, batch.reset)
        td_error = ops.td_error(q, batch.action, batch.target) * (batch.weight > 0)
        return 0.5 * jnp.mean(batch.weight * td_error**2), (td_error, q)

    def update(state: State, key: Key, hparams: HParams, learning_rate: Array) -> tuple[State, Metrics]:
        """Take one gradient step on one batch of sequences."""
        sample = replay.sequence.sample(
            key, state.replay, config.batch_size, beta=hparams.importance_exponent
        )
        batch = targets(state, sample, hparams)
        (loss_value, (td_error, q)), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        size = jnp.abs(td_error)
        eta = hparams.max_error_weight
        state = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            replay=replay.sequence.update_priorities(
                state.replay,
                sample.position,
                eta * size.max(0) + (1.0 - eta) * size.mean(0),
                alpha=hparams.priority_exponent,
            ),
        )
        return state, {
            "loss": loss_value,
            "td_error": size.mean(),
            "q": ops.unscale_value(q.max(-1), hparams.rescale_eps).mean(),
            "grad_norm": global_norm(grads),
        }

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys, update_keys = ops.split_keys(
            state.key, (), (config.unroll_length, 2), (config.num_updates,)
        )
        env_steps = ops.counter.to_float(state.env_steps)
        epsilon = exploration.annealed_epsilon(hparams, env_steps)
        learning_rate = annealed_learning_rate(hparams, env_steps)
        exploring = behaviour(state.params, epsilon)
        rollout_state, transitions, episode_metrics = rollout.unroll(
            unroll_keys, envs, env_params(hparams), exploring, state.rollout, config.unroll_length
        )
        state = dataclasses.replace(
            state,
            rollout=rollout_state,
            replay=buffer.add(state.replay, transitions),
            env_steps=ops.counter.add(state.env_steps, block_steps),
            key=next_key,
        )
        state, metrics = jax.lax.scan(
            lambda state, key: update(state, key, hparams, learning_rate), state, update_keys
        )
        target_params, since_target = off_policy.copy_periodically(
            state.params, state.target_params, state.since_target, block_steps, hparams.target_period
        )
        state = dataclasses.replace(state, target_params=target_params, since_target=since_target)
        metrics = jax.tree.map(jnp.mean, metrics)
        return state, episode_metrics | metrics | {"epsilon": epsilon, "learning_rate": learning_rate}

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy of the online network, or, with greedy=False, an ε-greedy one.

        The ``q`` among its extras is rescaled as the network's output is: :func:`jrl.ops.unscale_value` undoes it.
        """
        acting = (state.params, jnp.float32(0.0 if greedy else epsilon))
        return Policy(act, acting, network.init_memory)

    return Algorithm(init, step, policy, block_steps, env)
