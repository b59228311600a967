"""Deep Q-learning (Mnih et al., 2015, https://www.nature.com/articles/nature14236) and its refinements.

Each is a static choice: Double (van Hasselt et al., 2016, arXiv:1509.06461), Dueling (Wang et al., 2016,
arXiv:1511.06581), n-step targets (Sutton, 1988), prioritised replay (Schaul et al., 2016, arXiv:1511.05952),
Huber loss, a target network copied now and then or tracked by Polyak averaging (Lillicrap et al., 2016,
arXiv:1509.02971); a distribution over returns in place of their mean: by atoms (C51: Bellemare et al., 2017,
arXiv:1707.06887), quantiles (QR-DQN: Dabney et al., 2018, arXiv:1710.10044) or a quantile function (IQN: Dabney et
al., 2018, arXiv:1806.06923); noisy layers (Fortunato et al., 2018, arXiv:1706.10295); exploratory actions that persist
(Dabney et al., 2021, arXiv:2006.01782); Munchausen targets (Vieillard et al., 2020, arXiv:2007.14430).
:mod:`jrl.algos.rainbow` puts six of them together.

Deviations: a time limit is never a terminal state; n-step windows end at either flag and bootstrap with γ^k; the
warm-up fill happens in ``init``, so that no step has a data-dependent branch; all environments of a step (see
``noise_draws``), and all transitions of a batch, share one draw of a noisy network's noise; an implicit quantile
network acts on fixed quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import ops, replay, rollout
from jrl.algos import checks, exploration, off_policy, q_functions
from jrl.envs import vectorize
from jrl.native import threefry
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree, no_memory


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_envs: int = 10
    """Environments stepped side by side."""
    unroll_length: int = 1
    """Steps in each environment between two rounds of updates."""
    num_updates: int = 1
    """Gradient steps a round."""
    batch_size: int = 128
    """Transitions a gradient step."""
    capacity: int = 50_000
    """Transitions the replay holds (rounded up to whole blocks of num_envs × unroll_length)."""
    truncation_gap: int = 16
    """Steps between two time limits that cut episodes of one environment, at least. The replay keeps each observation
    once, and in so many steps room for one more, where a cut episode had come to; of two cuts within fewer steps one
    is not learned from. With 1 all are, at twice the memory for observations."""
    replay_dtype: str = "same"
    """What the replay keeps floats of observations in: 'same', as they are; 'float16', half the memory, rounded to 11
    bits and at most 65,504; or 'bfloat16', as small, 8 bits of any size."""
    warmup_env_steps: int = 10_000
    """Environment steps taken with random actions before the first update, within init."""
    n_step: int = 1
    """Steps of reward before the target bootstraps."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    dueling: bool = False
    """Split the network's head into a value and advantages."""
    prioritized: bool = False
    """Draw transitions in proportion to their last error instead of uniformly."""
    huber: bool = False
    """Huber loss instead of the squared error. Not the default: on returns far above huber_delta it fits the
    median of the target, which overlooks rare episode ends, and values grow without bound (seen on CartPole)."""
    distribution: str = "none"
    """What is learned of the return: 'none', its mean; 'categorical' (C51), the probabilities of num_atoms returns
    from value_min to value_max; 'quantile' (QR-DQN), num_atoms quantiles; 'implicit' (IQN), a function of the quantile
    fraction, trained at num_atoms random ones a gradient step (8 suffice). Quantiles are fitted with huber_delta."""
    num_atoms: int = 51
    """Atoms, or quantiles, of a distribution."""
    noisy: bool = False
    """Explore by noise on the weights, whose scale is learned. ε-greedy goes on beside it: set its ε to 0."""
    noise_draws: int = 1
    """Draws of that noise in each step of the environments, which share them evenly. With one draw, environments in
    the same state do the same; with num_envs each explores for itself, at the cost of so many sets of weights."""
    persistent: bool = False
    """Hold an exploratory action for a heavy-tailed number of steps (εz-greedy), which gets further than as many
    independent ones."""
    munchausen: bool = False
    """Add the scaled log-probability of the action taken to the reward and value the successor softly, both under the
    target network's Boltzmann policy (double is then of no effect). One-step targets only."""
    polyak: bool = False
    """Let the target track by tau at each update, instead of copying every target_period steps."""
    torso: str = "auto"
    """'mlp', 'cnn', or 'auto': cnn for image observations, else mlp."""
    hidden_sizes: tuple[int, ...] = (120, 84)
    """Widths of the fully connected layers."""
    channels: tuple[int, ...] = (16,)
    """Channels of the 3×3 convolutions of a cnn."""
    activation: str = "relu"
    """tanh, relu, elu, gelu or silu."""
    kernels: str = "xla"
    """'xla'; or 'native': an mlp of tanh or relu, Adam, a 'categorical' distribution, random numbers and noisy layers'
    noise in C++ kernels, on a CPU, compiled at first use."""
    layer_norm: bool = True
    """Normalise before each activation. The default, since without it one or two of ten seeds ended CartPole on
    overestimated values (as Gallici et al., 2024, arXiv:2407.04811, found for Q-learning at large)."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_updates", "n_step", "noise_draws")
        off_policy.check_replay(self)
        if self.num_envs % self.noise_draws:
            raise ValueError(
                f"noise_draws={self.noise_draws} cannot be shared evenly by num_envs={self.num_envs} environments; "
                "use a divisor of num_envs."
            )
        if self.n_step * self.num_envs > self.capacity:
            raise ValueError(
                f"n_step={self.n_step} windows of num_envs={self.num_envs} environments do not fit "
                f"capacity={self.capacity}; raise capacity to at least {self.n_step * self.num_envs}."
            )
        q_functions.check_distribution(self)
        if self.munchausen and self.n_step > 1:
            raise ValueError(
                f"munchausen=True with n_step={self.n_step}: the bonus belongs to every step of a window, and only the "
                "first one's is known; use n_step=1."
            )
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
    epsilon_start: float = 1.0
    """Chance of a random action at env step 0."""
    epsilon_end: float = 0.05
    """Chance of a random action after epsilon_env_steps."""
    epsilon_env_steps: float = 100_000.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    persistence: float = 2.0
    """μ of persistent exploration: an action is held for k steps or more with chance k^(1 − μ)."""
    target_period: float = 2_000.0
    """Environment steps between two copies to the target network (without polyak)."""
    tau: float = 0.005
    """Share of the online network that the target takes over at each update (with polyak)."""
    huber_delta: float = 1.0
    """Error at which the Huber loss turns linear (with huber, and for quantiles)."""
    value_min: float = -100.0
    """Return of the lowest atom ('categorical'; read by init). -100 to 100 holds whatever rewards in [-1, 1] sum to at
    γ 0.99; a narrower range resolves more."""
    value_max: float = 100.0
    """Return of the highest atom."""
    noise_scale: float = 0.5
    """σ₀ of noisy layers: the noise on a weight starts at σ₀ / sqrt(inputs) (read by init)."""
    munchausen_coef: float = 0.9
    """α, the share of the log-probability that is added to the reward (with munchausen)."""
    munchausen_temperature: float = 0.03
    """τ of the Boltzmann policy, in the unit of the return (with munchausen)."""
    munchausen_min: float = -1.0
    """l₀, where the scaled log-probability is cut off (with munchausen)."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this global norm."""
    priority_exponent: float = 0.6
    """α of prioritised replay; 0 is uniform."""
    importance_exponent: float = 0.4
    """β of prioritised replay at env step 0."""
    importance_exponent_end: float = 1.0
    """β at the end of importance_env_steps."""
    importance_env_steps: float = 500_000.0
    """Environment steps over which β goes linearly to its end; 0 keeps it constant at its start."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint."""

    params: Params
    target_params: Params
    opt_state: PyTree
    rollout: rollout.RolloutState
    replay: PyTree
    support: PyTree  # returns of a categorical distribution's atoms, float32 [num_atoms]; else ()
    since_target: Array
    env_steps: Array
    key: Key


def make(
    env: Environment,
    config: Config | None = None,
    *,
    network: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
    warmup_policy: Policy | None = None,
) -> Algorithm:
    """Return DQN on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment, from :func:`jrl.make` or your own, with Discrete actions.
        config: static choices.
        network: any ``init``/``apply`` pair, ``obs -> Q [..., A]``, or ``[..., A, num_atoms]`` where a distribution is
            learned; an implicit one is called on a :class:`~jrl.types.QuantileQuery`. None builds one from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.
        warmup_policy: takes the warmup_env_steps, without a memory: one that finds what chance does not (Li et al.,
            2017, arXiv:1703.01008, start from rules). None draws actions uniformly.

    Raises:
        TypeError: ``env``, ``config`` or ``network`` is not what it should be, or the actions are not Discrete.
        ValueError: ``env`` is vectorised already; ``network``'s width is not the number of actions, or it has a
            memory.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, config.kernels)
    checks.environment(env)
    checks.discrete(env, "dqn")
    envs = vectorize(env, config.num_envs)
    q_function = q_functions.make(env, config, network, "dqn")
    draws = config.noisy or config.distribution == "implicit"  # then running the network takes a draw
    block_steps = config.num_envs * config.unroll_length
    buffer = replay.prioritized if config.prioritized else replay.uniform
    act = exploration.epsilon_greedy(q_function.values)
    behave = exploration.epsilon_greedy(q_function.values, q_function.noise) if config.noisy else act
    hold = exploration.persistent(behave)
    init_memory = exploration.nothing_held if config.persistent else no_memory

    def explore(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        action, memory, _ = (hold if config.persistent else behave)(acting, key, obs, memory)
        return action, memory, ()  # the replay would keep what it returns here

    def explorer(params: Params, support: PyTree, epsilon: Array, hparams: HParams) -> Policy:
        acting = ((params, support), epsilon)
        return Policy(explore, (acting, hparams.persistence) if config.persistent else acting, init_memory)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, warmup_key, state_key = jax.random.split(key, 4)
        env_params = env.params if hparams.env is None else hparams.env
        memory = init_memory((config.num_envs,))
        start = rollout.start(reset_key, envs, env_params, config.num_envs, memory)
        params = q_function.init(network_key, start.obs, hparams.noise_scale)
        support: PyTree = ()
        if config.distribution == "categorical":
            support = jnp.linspace(hparams.value_min, hparams.value_max, config.num_atoms, dtype=jnp.float32)
        filling = explorer(params, support, jnp.float32(1.0), hparams)
        if warmup_policy is not None:
            filling = exploration.actions_of(warmup_policy, init_memory)
        start, stored = off_policy.warm_up(warmup_key, envs, env_params, filling, start, config, buffer)
        return State(
            params=params,
            # A copy of its own: two leaves of one buffer could not both be donated.
            target_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=start,
            replay=stored,
            support=support,
            since_target=jnp.float32(0),
            env_steps=ops.counter.add(ops.counter.zero(), off_policy.warmup_env_steps(config)),
            key=state_key,
        )

    def targets(state: State, sample: replay.Sample, hparams: HParams, drawn: Sequence[Any]) -> Array:
        """``Σ_{j<k} γ^j r_j + γ^k (1 − terminated) max_a Q⁻(s_k, a)``, ``[N]``, or the distribution of such returns."""
        powers = hparams.gamma ** jnp.arange(config.n_step, dtype=jnp.float32)
        # Not a matrix product, which an accelerator may round to TF32.
        reward = (powers[:, None] * sample.rewards).sum(0)
        # The power last, which XLA computes once: a product it would repeat for every atom.
        discount = jnp.where(sample.terminated, 0.0, hparams.gamma) ** sample.length.astype(jnp.float32)
        head = q_function.head(state.support)
        next_output = q_function.evaluate(state.target_params, sample.next_obs, drawn[0])
        next_q = q_function.mean(next_output, sample.next_obs, state.support)
        if config.munchausen:
            q, _ = q_function.values((state.target_params, state.support), sample.obs, (), drawn[1])
            temperature, coef = hparams.munchausen_temperature, hparams.munchausen_coef
            reward += ops.munchausen_bonus(q, sample.action, temperature, coef, hparams.munchausen_min)
            return head.soft_target(reward, discount, next_output, next_q, temperature)
        online_q = None
        if config.double:
            online_q, _ = q_function.values((state.params, state.support), sample.next_obs, (), drawn[1])
        return head.target(reward, discount, next_output, next_q, online_q)

    def loss(
        params: Params, sample: replay.Sample, target: Array, support: PyTree, drawn: Any, hparams: HParams
    ) -> tuple[Array, tuple[Array, Array]]:
        output = q_function.evaluate(params, sample.obs, drawn)
        head = q_function.head(support, hparams.huber_delta)
        per_sample, error = head.loss(output, sample.action, target)
        q = q_function.mean(output, sample.obs, support)
        return (sample.weight * per_sample).mean(), (error, q)

    def update(
        state: State, key: Key, hparams: HParams, env_steps: Array, learning_rate: Array
    ) -> tuple[State, Metrics]:
        """Take one gradient step on one batch from the replay."""
        drawn: Sequence[Any] = [None] * 3
        if draws:
            key, draw_key = jax.random.split(key)
            drawn = q_function.draw(draw_key, state.params, 3, (config.batch_size,))
        if config.prioritized:
            start, end = hparams.importance_exponent, hparams.importance_exponent_end
            beta = ops.linear_schedule(
                env_steps, start=start, end=end, begin=0.0, duration=hparams.importance_env_steps
            )
            sample = replay.prioritized.sample(
                key, state.replay, config.batch_size, config.num_envs, config.n_step, beta=beta
            )
        else:
            sample = replay.uniform.sample(
                key, state.replay, config.batch_size, config.num_envs, config.n_step
            )
        target = targets(state, sample, hparams, drawn[1:])
        (loss_value, (td_error, q)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, sample, target, state.support, drawn[0], hparams
        )
        # One whose successor is lost is not learned from; its error is that of another episode, and no priority.
        td_error = jnp.where(sample.weight > 0.0, td_error, 0.0)
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = dataclasses.replace(state, params=params, opt_state=opt_state)
        if config.polyak:
            target_params = optax.incremental_update(params, state.target_params, hparams.tau)
            state = dataclasses.replace(state, target_params=target_params)
        if config.prioritized:
            stored = replay.prioritized.update_priorities(
                state.replay, sample.position, td_error, alpha=hparams.priority_exponent
            )
            state = dataclasses.replace(state, replay=stored)
        return state, {
            "loss": loss_value,
            "td_error": jnp.abs(td_error).mean(),
            "q": q.max(-1).mean(),
            "grad_norm": global_norm(grads, config.kernels),
        }

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_keys, update_keys = threefry.split_keys(
            state.key, (), (config.unroll_length, 2), (config.num_updates,), kernels=config.kernels
        )
        env_steps = ops.counter.to_float(state.env_steps)
        epsilon = exploration.annealed_epsilon(hparams, env_steps)
        learning_rate = annealed_learning_rate(hparams, env_steps)
        behaviour = explorer(state.params, state.support, epsilon, hparams)
        env_params = env.params if hparams.env is None else hparams.env
        rollout_state, transitions, episode_metrics = rollout.unroll(
            unroll_keys, envs, env_params, behaviour, state.rollout, config.unroll_length
        )
        state = dataclasses.replace(
            state,
            rollout=rollout_state,
            replay=buffer.add(state.replay, transitions),
            env_steps=ops.counter.add(state.env_steps, block_steps),
            key=next_key,
        )
        state, metrics = jax.lax.scan(
            lambda state, key: update(state, key, hparams, env_steps, learning_rate), state, update_keys
        )
        if not config.polyak:
            target_params, since_target = off_policy.copy_periodically(
                state.params, state.target_params, state.since_target, block_steps, hparams.target_period
            )
            state = dataclasses.replace(state, target_params=target_params, since_target=since_target)
        metrics = jax.tree.map(jnp.mean, metrics)
        return state, episode_metrics | metrics | {"epsilon": epsilon, "learning_rate": learning_rate}

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy of the online network, or, with greedy=False, an ε-greedy one, noisy if that is."""
        acting = ((state.params, state.support), jnp.float32(0.0 if greedy else epsilon))
        return Policy(act if greedy else behave, acting)

    return Algorithm(init, step, policy, block_steps, env)
