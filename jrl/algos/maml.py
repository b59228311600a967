"""MAML for policies: parameters from which a few policy-gradient steps on a new task go far.

Finn et al., 2017, https://arxiv.org/abs/1703.03400, algorithm 3. A task is the environment with one of its parameters
drawn anew. Of each task ``num_envs`` episodes are played and one REINFORCE step taken on them, ``inner_steps`` times;
of what comes of it episodes are played again, and the gradient of their objective with respect to the parameters that
all tasks began with moves those. With ``inner_steps=0`` one policy is trained for all tasks (pretraining).

The loss is ``−mean π(a|s)/⌊π(a|s)⌋ A`` (⌊·⌋ a constant): its gradient is REINFORCE's, and its second derivative has
what that of ``log π(a|s) A`` leaves out, that the parameters decide which actions are seen (Rothfuss et al., 2019,
https://arxiv.org/abs/1810.06784). Deviations: one step of Adam on the outer gradient in place of TRPO; the
baseline is the mean return of the task's other episodes at the same time step (leave-one-out), not a fitted one.
As with REINFORCE ``unroll_length`` must be as long as the longest episode; the return up to a time limit is maximised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import meta, ops, rollout
from jrl.algos import checks, on_policy
from jrl.networks.defaults import check_torso
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.training import summarize
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_tasks: int = 20
    """Tasks of each outer step."""
    num_envs: int = 20
    """Episodes of each task before and after every inner step, side by side."""
    unroll_length: int = 100
    """Steps of each environment; longer episodes are cut there."""
    inner_steps: int = 1
    """Gradient steps within a task; 0 trains one policy for all tasks."""
    first_order: bool = False
    """Take the inner gradients for constants: cheaper, and nearly as good where the loss is nearly linear."""
    task_parameter: str = "goal"
    """The environment's parameter that makes a task: each of its numbers is drawn from task_low to task_high."""
    torso: str = "auto"
    """'mlp', 'cnn', or 'auto': cnn for image observations, else mlp."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the fully connected layers."""
    channels: tuple[int, ...] = (16,)
    """Channels of the 3×3 convolutions of a cnn."""
    activation: str = "tanh"
    """tanh, relu, elu, gelu or silu."""
    layer_norm: bool = False
    """Normalise before each activation."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_tasks", "num_envs", "unroll_length")
        if (
            isinstance(self.inner_steps, bool)
            or not isinstance(self.inner_steps, int)
            or self.inner_steps < 0
        ):
            raise ValueError(f"inner_steps={self.inner_steps!r}: must be an integer of at least 0.")
        if self.num_envs < 2:
            raise ValueError(f"num_envs={self.num_envs}: the baseline compares 2 or more episodes of a task.")
        check_torso(self)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-2
    """Adam's step size, of the outer step."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    inner_learning_rate: float = 0.1
    """Step size of gradient descent within a task."""
    gamma: float = 0.99
    """Discount factor γ."""
    max_grad_norm: float = 10.0
    """The outer gradient is clipped to this global norm."""
    task_low: float = -0.5
    """Lowest value of the task's parameter."""
    task_high: float = 0.5
    """Highest value of the task's parameter."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint.

    ``rollout`` is where the last episodes stood, over ``num_tasks · num_envs``; each step begins anew.
    """

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
    """Return MAML on ``env`` as an :class:`~jrl.types.Algorithm`; :func:`adaptation` goes on from its parameters.

    Its policy is the one before any inner step. The metrics' ``episode_return`` is that after them,
    ``initial_episode_return`` that before the first.

    Args:
        env: a single environment, from :func:`jrl.make` or your own; Discrete, MultiDiscrete or Box actions.
        config: static choices.
        network: any ``init``/``apply`` pair without memory, ``obs -> (policy head, value)``, whose value is not used.
            None builds one from ``config``.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env``, ``config`` or ``network`` is not what it should be.
        ValueError: ``env`` is vectorised already, or has no such parameter; ``network``'s output does not fit the
            action space, or it has a memory.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, "xla")
    actor, surrogate = _surrogate(env, config, network)
    _replace_parameter(env.params, config.task_parameter, jnp.asarray, env.name)
    played = on_policy.policies(actor, learns_value=False)
    per_step = config.num_tasks * config.num_envs * config.unroll_length * (config.inner_steps + 1)

    def draw_tasks(key: Key, hparams: HParams) -> PyTree:
        """Parameters of the environment for each task, leaves ``[num_tasks, ...]``."""

        def draw(key: Key) -> PyTree:
            def uniform(value: Any) -> Array:
                return jax.random.uniform(
                    key, jnp.shape(value), minval=hparams.task_low, maxval=hparams.task_high
                )

            env_params = env.params if hparams.env is None else hparams.env
            return _replace_parameter(env_params, config.task_parameter, uniform, env.name)

        return jax.vmap(draw)(jax.random.split(key, config.num_tasks))

    def flat(states: rollout.RolloutState) -> rollout.RolloutState:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), states)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        network_key, reset_key, task_key, state_key = jax.random.split(key, 4)
        reset_keys = jax.random.split(reset_key, config.num_tasks)
        starts = jax.vmap(lambda key, task: rollout.start(key, actor.envs, task, config.num_envs))(
            reset_keys, draw_tasks(task_key, hparams)
        )
        start = flat(starts)
        params = actor.network.init(network_key, start.obs, ())
        opt_state = optimizer(hparams, jnp.float32(0)).init(params)
        return State(params, opt_state, start, ops.counter.zero(), state_key)

    def loss(params: Params, key: Key, task: PyTree, hparams: HParams) -> tuple[Array, tuple]:
        """The loss after the inner steps of one task, and what was seen before and after them."""
        inner_key, outer_key = jax.random.split(key)
        adapted, (_, (_, before)) = meta.adapt(
            lambda params, key: surrogate(params, key, task, hparams),
            params,
            jax.random.split(inner_key, config.inner_steps),
            hparams.inner_learning_rate,
            first_order=config.first_order,
            has_aux=True,
        )
        value, (state, after) = surrogate(adapted, outer_key, task, hparams)
        first = jax.tree.map(lambda x: x[0], before) if config.inner_steps else after
        return value, (state, first, after)

    def meta_loss(params: Params, keys: Key, tasks: PyTree, hparams: HParams) -> tuple[Array, tuple]:
        values, seen = jax.vmap(loss, (None, 0, 0, None))(params, keys, tasks, hparams)
        return values.mean(), seen

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, task_key, loss_key = jax.random.split(state.key, 3)
        tasks, keys = draw_tasks(task_key, hparams), jax.random.split(loss_key, config.num_tasks)
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        (value, (last, before, after)), grads = jax.value_and_grad(meta_loss, has_aux=True)(
            state.params, keys, tasks, hparams
        )
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        state = State(
            optax.apply_updates(state.params, updates),
            opt_state,
            flat(last),
            ops.counter.add(state.env_steps, per_step),
            next_key,
        )
        return state, summarize(after[0]) | {
            "episode_return": after[1].mean(),
            "initial_episode_return": before[1].mean(),
            "loss": value,
            "grad_norm": global_norm(grads),
            "learning_rate": learning_rate,
        }

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the policy before any inner step: the mode of its distribution, or samples from it."""
        return played(state.params, greedy=greedy)

    return Algorithm(init, step, policy, per_step, env)


def adaptation(
    env: Environment, config: Config | None = None, *, network: Any = None
) -> Callable[..., tuple[Params, Array]]:
    """Return ``(key, params, hparams, num_steps) -> (params, returns [num_steps + 1])``: learning one task.

    The task is that of ``hparams.env``; ``num_steps`` is static, the rest may be jitted and vmapped. Each entry of
    ``returns`` is the mean return of ``config.num_envs`` sampled episodes, as far as ``config.unroll_length`` steps go,
    before the first step and after each.
    """
    config = checks.config(config, Config)
    _, surrogate = _surrogate(env, config, network)

    def adapt(key: Key, params: Params, hparams: HParams, num_steps: int) -> tuple[Params, Array]:
        task = env.params if hparams.env is None else hparams.env
        keys = jax.random.split(key, num_steps + 1)
        params, (_, (_, seen)) = meta.adapt(
            lambda params, key: surrogate(params, key, task, hparams),
            params,
            keys[:-1],
            hparams.inner_learning_rate,
            has_aux=True,
        )
        _, (_, last) = surrogate(params, keys[-1], task, hparams)
        return params, jnp.append(seen[1], last[1])

    return adapt


def _surrogate(
    env: Environment, config: Config, network: Any
) -> tuple[on_policy.Actor, Callable[..., tuple[Array, tuple]]]:
    """Return the actor, and ``(params, key, env_params, hparams) -> (loss, (rollout, (metrics, first return)))``.

    The metrics are those of all episodes that end, the return is the mean of each environment's first one, whole or
    not: that of what is learned from.
    """
    actor = on_policy.actor(env, config.num_envs, network, config)
    checks.feed_forward(actor.network, "maml")

    def act(params: Params, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        (head, _), memory = actor.network.apply(params, obs, memory)
        return actor.distribution(head).sample(key), memory, ()

    def advantages(transitions: Transition, used: Array, gamma: Array | float) -> Array:
        """``G_t`` less its mean over the other episodes of the task, standardised over the steps in use, ``[T, B]``."""
        zero = jnp.zeros_like(transitions.reward)
        returns = ops.discounted_returns(
            transitions.reward, zero, transitions.terminated, transitions.truncated, gamma=gamma
        )
        returns = jnp.where(used, returns, 0.0)
        advantage = returns - (returns.sum(1, keepdims=True) - returns) / (config.num_envs - 1)
        return ops.standardize(advantage, mean=lambda x: jnp.where(used, x, 0.0).sum() / used.sum())

    def surrogate(params: Params, key: Key, env_params: PyTree, hparams: HParams) -> tuple[Array, tuple]:
        reset_key, unroll_key = jax.random.split(key)
        start = rollout.start(reset_key, actor.envs, env_params, config.num_envs)
        # Constants: the gradient is the likelihood ratio's, never one through the environment.
        behaviour = Policy(act, jax.lax.stop_gradient(params))
        last, transitions, metrics = rollout.unroll(
            unroll_key, actor.envs, env_params, behaviour, start, config.unroll_length
        )
        ended = transitions.terminated | transitions.truncated
        used = jnp.cumsum(ended, axis=0) == ended  # no episode ended before
        (head, _), _ = actor.network.apply(params, transitions.obs, ())
        log_prob = actor.distribution(head).log_prob(transitions.action)
        ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
        gain = ratio * advantages(transitions, used, hparams.gamma)
        first_return = jnp.where(used, transitions.reward, 0.0).sum(0).mean()
        return -jnp.where(used, gain, 0.0).sum() / used.sum(), (last, (metrics, first_return))

    return actor, surrogate


def _replace_parameter(
    env_params: PyTree, name: str, replace: Callable[[Any], Array], env_name: str
) -> PyTree:
    """Return the environment's parameters with ``replace`` applied to the one so named.

    Raises:
        ValueError: there is none, or its numbers are not real.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(env_params)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    real = [key for key, leaf in named.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if name not in real:
        raise ValueError(
            f"task_parameter={name!r}: {env_name} has no such parameter of real numbers, of which a task could be "
            f"drawn; it has {', '.join(real) or 'none'}."
        )
    return jax.tree.unflatten(structure, (named | {name: replace(named[name])}).values())
