"""Semi-gradient control with linear action values: SARSA(λ), Q-learning, tile coding, a target network.

``Q(s, a) = w_a · x(s)`` for features ``x``; every environment step moves the weights by ``α δ z`` with the
eligibility trace ``z ← γλ z + ∇Q`` (Sutton and Barto 2018, sections 10.1 and 12.7,
http://incompleteideas.net/book/the-book-2nd.html), replacing traces for binary features (Singh and Sutton 1996,
https://doi.org/10.1007/BF00114726). The default features are tilings of a bounded observation. A target network
(Mnih et al. 2015) is what keeps off-policy learning with features bounded on Baird's counterexample, see
``Baird-jrl``. Deviation: a time limit is never a terminal state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jrl import ops, rollout
from jrl.algos import checks, exploration
from jrl.envs import vectorize
from jrl.types import (
    Algorithm,
    Array,
    Discrete,
    Environment,
    FiniteObservation,
    Key,
    MaskedObservation,
    Memory,
    Metrics,
    Policy,
    PyTree,
)

TARGETS = ("sarsa", "q_learning")
TRACES = ("none", "replacing", "accumulating")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    target: str = "sarsa"
    """sarsa or q_learning."""
    trace: str = "replacing"
    """none, replacing (for features 0 and 1) or accumulating; with q_learning the trace is cut where an action was
    not greedy."""
    target_network: bool = False
    """Bootstrap from weights copied every target_period environment steps."""
    num_tilings: int = 8
    """Tilings of the default features."""
    tiles: int = 8
    """Tiles along each dimension of one tiling."""
    unroll_length: int = 64
    """Environment steps, each with its update, in one step of the algorithm."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_tilings", "tiles", "unroll_length")
        checks.choice(self, "target", TARGETS)
        checks.choice(self, "trace", TRACES)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 0.5
    """α for the whole observation: it is divided by the sum of its features, num_tilings for tile coding."""
    gamma: float = 1.0
    """Discount factor γ."""
    lam: float = 0.9
    """λ, decay of the eligibility traces beside γ."""
    epsilon_start: float = 0.0
    """Chance of a random action at env step 0; initial values of 0 are optimistic where rewards are costs."""
    epsilon_end: float = 0.0
    """Chance of a random action after epsilon_env_steps."""
    epsilon_env_steps: float = 0.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    target_period: float = 500.0
    """Environment steps between two copies to the target network."""
    initial_scale: float = 0.0
    """Standard deviation of normal initial weights."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. What the Config does not need is ``()``.

    ``params`` and ``target_params`` are weights ``[A, D]``, ``trace`` too; ``action`` int32 ``[]`` is what is done
    next.
    """

    params: Array
    target_params: PyTree
    trace: PyTree
    action: Array
    rollout: rollout.RolloutState
    since_target: Array
    env_steps: Array
    key: Key


def make(
    env: Environment,
    config: Config | None = None,
    *,
    features: Callable[[Array], Array] | None = None,
    low: Any = None,
    high: Any = None,
) -> Algorithm:
    """Return a linear learner on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment from :func:`jrl.make` with Discrete actions.
        config: static choices.
        features: ``obs [...] -> float32 [..., D]``. None takes one-hot observations as they are, and tiles others.
        low: bounds of the observation for the tiling, ``[dimensions]``; None takes those of the environment's
            parameters (``min_position``, ``max_speed`` … of MountainCar).
        high: likewise.

    Raises:
        TypeError: ``env`` or ``config`` is not what it should be, the actions are not Discrete, or they are masked.
        ValueError: ``env`` is vectorised already, or bounds are needed and unknown.
    """
    config = checks.config(config, Config)
    checks.environment(env)
    if not isinstance(env.action, Discrete):
        raise TypeError(
            f"linear on {env.name} with actions {env.action!r}: each action has its own weights; wrap the "
            "environment in jrl.envs.discretize_actions(env, bins)."
        )
    if isinstance(env.observation, MaskedObservation):
        raise TypeError(
            f"linear on {env.name} with a mask of its actions: it has no place for one; use jrl.dqn or jrl.ppo, which "
            "keep to it, or an environment without it."
        )
    if features is None:
        features = default_features(env, config, low, high)
    num_actions = env.action.n
    num_features = jax.eval_shape(features, env.observation).shape[-1]
    envs = vectorize(env, 1)
    traced, copied = config.trace != "none", config.target_network

    def values(params: Array, x: Array) -> Array:
        # Not a matrix product, which an accelerator may round to TF32.
        return (params * x[..., None, :]).sum(-1)

    def choose(uniform: Array, q: Array, epsilon: Array) -> Array:
        return ops.inverse_cdf(ops.epsilon_greedy_policy(q, epsilon), uniform)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        weights_key, reset_key, action_key, state_key = jax.random.split(key, 4)
        env_params = env.params if hparams.env is None else hparams.env
        start = rollout.start(reset_key, envs, env_params, 1)
        params = jnp.asarray(
            hparams.initial_scale * jax.random.normal(weights_key, (num_actions, num_features)), jnp.float32
        )
        q = values(params, features(start.obs)[0])
        action = choose(jax.random.uniform(action_key), q, jnp.float32(hparams.epsilon_start))
        return State(
            params=params,
            target_params=jnp.copy(params) if copied else (),
            trace=jnp.zeros_like(params) if traced else (),
            action=action,
            rollout=start,
            since_target=jnp.float32(0),
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def targets(q: Array, next_action: Array) -> Array:
        """What the true successor is worth, by its action values ``[A]``."""
        return q[next_action] if config.target == "sarsa" else q.max()

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        env_params = env.params if hparams.env is None else hparams.env
        next_key, env_key, uniform_key = jax.random.split(state.key, 3)
        epsilon = exploration.annealed_epsilon(hparams, ops.counter.to_float(state.env_steps))

        def body(carry: State, random: tuple[Key, Array]) -> tuple[State, Any]:
            step_key, uniform = random
            params, run, action = carry.params, carry.rollout, carry.action
            env_state, out = envs.step(step_key, run.env_state, action[None], env_params)
            ended = (out.terminated | out.truncated)[0]
            x, successor, arrived = (features(obs)[0] for obs in (run.obs, out.next_obs, out.obs))
            q = values(params, x)
            # The values acted on are those before the update; the same draw, unless an episode ended.
            next_action = choose(uniform[0], values(params, successor), epsilon)
            fresh_action = choose(uniform[1], values(params, arrived), epsilon)
            bootstrap = values(carry.target_params if copied else params, successor)
            discount = hparams.gamma * (1.0 - out.terminated[0])
            td_error = out.reward[0] + discount * targets(bootstrap, next_action) - q[action]
            taken = jax.nn.one_hot(action, num_actions, dtype=x.dtype)[:, None]
            gradient = taken * x
            if traced:
                trace = carry.trace * (hparams.gamma * hparams.lam)
                if config.target == "q_learning":
                    trace = jnp.where(q[action] >= q.max(), trace, 0.0)
                if config.trace == "replacing":
                    # The other actions of these features are forgotten, as Singh and Sutton found best.
                    trace = jnp.where(x > 0.0, gradient, trace)
                else:
                    trace = trace + gradient
                gradient = trace
                carry = dataclasses.replace(carry, trace=jnp.where(ended, 0.0, trace))
            alpha = hparams.learning_rate / jnp.maximum(jnp.abs(x).sum(), 1e-8)
            params = params + alpha * td_error * gradient
            if copied:
                since = carry.since_target + 1.0
                due = since >= hparams.target_period
                carry = dataclasses.replace(
                    carry,
                    target_params=jnp.where(due, params, carry.target_params),
                    since_target=jnp.where(due, 0.0, since),
                )
            episode_return, length = run.episode_return + out.reward, run.episode_length + 1
            run = rollout.RolloutState(
                env_state,
                out.obs,
                (),
                jnp.where(ended, 0.0, episode_return),
                jnp.where(ended, 0, length),
            )
            carry = dataclasses.replace(
                carry, params=params, rollout=run, action=jnp.where(ended, fresh_action, next_action)
            )
            return carry, (ended[None], episode_return, length, td_error)

        env_keys = jax.random.split(env_key, config.unroll_length)
        uniforms = jax.random.uniform(uniform_key, (config.unroll_length, 2))
        state, (ended, episode_return, length, td_error) = jax.lax.scan(body, state, (env_keys, uniforms))
        state = dataclasses.replace(
            state, env_steps=ops.counter.add(state.env_steps, config.unroll_length), key=next_key
        )
        return state, rollout.episode_metrics(ended, episode_return, length) | {
            "loss": 0.5 * jnp.square(td_error).mean(),
            "td_error": jnp.abs(td_error).mean(),
            "weight_norm": jnp.sqrt(jnp.square(state.params).sum()),
            "epsilon": epsilon,
        }

    def act(acting: PyTree, key: Key, obs: Array, memory: Memory) -> tuple[Array, Memory, PyTree]:
        params, epsilon = acting
        q = values(params, features(obs))
        return ops.epsilon_greedy(key, q, epsilon), memory, {"q": q}

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy of the weights (first among equals), or, with greedy=False, an ε-greedy one."""
        return Policy(act, (state.params, jnp.float32(0.0 if greedy else epsilon)))

    return Algorithm(init, step, policy, config.unroll_length)


def tile_coding(low: Any, high: Any, *, num_tilings: int, tiles: int) -> Callable[[Array], Array]:
    """Return ``obs [..., k] -> float32 [..., D]``: in each of the tilings one feature is 1, the others 0.

    Tiling ``i`` of ``n`` is shifted by ``i (1, 3, 5, …) / n`` of a tile, modulo 1 (Sutton and Barto 2018, section
    9.5.4, after Miller and Glanz 1996). ``D = n (tiles + 1)^k``; what lies outside the bounds falls into the
    tiles at the edge.

    Raises:
        ValueError: bounds that are not finite or not in order.
    """
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if low.ndim != 1 or low.shape != high.shape or not np.all(np.isfinite(high - low) & (low < high)):
        raise ValueError(
            f"tile_coding(low={low}, high={high}): needs finite vectors of one length, low below high everywhere."
        )
    dimensions = len(low)
    shift = np.arange(num_tilings)[:, None] * (2 * np.arange(dimensions) + 1) / num_tilings % 1.0
    place = (tiles + 1) ** np.arange(dimensions)

    def features(obs: Array) -> Array:
        scaled = jnp.clip((obs - low) / (high - low), 0.0, 1.0) * tiles
        tile = jnp.floor(scaled[..., None, :] + jnp.asarray(shift, jnp.float32)).astype(jnp.int32)
        index = (jnp.minimum(tile, tiles) * place).sum(-1)
        active = jax.nn.one_hot(index, (tiles + 1) ** dimensions, dtype=jnp.float32)
        return active.reshape(*active.shape[:-2], -1)

    return features


def default_features(env: Environment, config: Config, low: Any, high: Any) -> Callable[[Array], Array]:
    """Return the features of a finite or a bounded observation.

    Raises:
        ValueError: the bounds are unknown, or not as many as the observation has numbers.
    """
    observation = env.observation
    if isinstance(observation, FiniteObservation):
        num_states = observation.n
        return lambda obs: jax.nn.one_hot(checks.state_index(obs), num_states, dtype=jnp.float32)
    params = env.params
    if low is None and high is None and hasattr(params, "min_position") and hasattr(params, "max_speed"):
        low, high = (params.min_position, -params.max_speed), (params.max_position, params.max_speed)
    if low is None or high is None:
        raise ValueError(
            f"linear on {env.name}: the bounds of its observation {observation} are unknown. Pass low=... and "
            "high=..., one number for each dimension, or features=..."
        )
    if not isinstance(observation, jax.ShapeDtypeStruct) or np.shape(low) != observation.shape:
        raise ValueError(
            f"linear on {env.name}: low has shape {np.shape(low)}, the observation is {observation}; give one bound "
            "for each of its numbers."
        )
    return tile_coding(low, high, num_tilings=config.num_tilings, tiles=config.tiles)
