"""Monte-Carlo control with a table: learn from what really followed, at the end of a stretch of experience.

First- and every-visit Monte Carlo with an ε-greedy policy (Sutton and Barto 2018, sections 5.1 and 5.4,
http://incompleteideas.net/book/the-book-2nd.html). One step of the algorithm acts for ``unroll_length`` steps with
one policy, then moves the table towards the returns, visit by visit in the order of time. For thousands of
learners ``jax.vmap`` ``init`` and ``step``.

Deviations: an episode that a time limit or the end of the unroll cuts is completed by the table's greedy value of
the true successor. With an unroll many episodes long that is rare, and a pure Monte-Carlo return is all there is;
an unroll shorter than an episode makes it an n-step method.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jrl import ops, rollout
from jrl.algos import checks, exploration
from jrl.envs import vectorize
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Policy, PyTree, Transition

VISITS = ("first", "every")
STEP_SIZES = ("constant", "visits")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    visit: str = "first"
    """first: only the first time that an episode comes to a state and action; every: each time."""
    step_size: str = "visits"
    """visits: learning_rate / n(s, a), the mean of all returns for learning_rate 1; or constant."""
    unroll_length: int = 128
    """Environment steps between two changes of the policy; many episodes long, see above."""

    def __post_init__(self) -> None:
        checks.sizes(self, "unroll_length")
        checks.choice(self, "visit", VISITS)
        checks.choice(self, "step_size", STEP_SIZES)


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1.0
    """Step size α, or the numerator of the decreasing one."""
    gamma: float = 0.99
    """Discount factor γ."""
    epsilon_start: float = 0.1
    """Chance of a random action at env step 0."""
    epsilon_end: float = 0.1
    """Chance of a random action after epsilon_env_steps."""
    epsilon_env_steps: float = 0.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    initial_value: float = 0.0
    """Q before learning."""
    initial_scale: float = 0.0
    """Standard deviation of normal noise on it."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``params`` is the table Q, ``visits`` counts, ``[S, A]``."""

    params: Array
    visits: Array
    rollout: rollout.RolloutState
    env_steps: Array
    key: Key


def make(env: Environment, config: Config | None = None, *, action_mask: Any = None) -> Algorithm:
    """Return Monte-Carlo control on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a single environment from :func:`jrl.make` with Discrete actions, whose observation is an index or
            one-hot (:class:`~jrl.types.FiniteObservation`).
        config: static choices.
        action_mask: bool ``[S, A]``, True = allowed; None allows everything.

    Raises:
        TypeError: ``env`` or ``config`` is not what it should be; actions or observations are not finite.
        ValueError: ``env`` is vectorised already, or ``action_mask`` does not fit.
    """
    config = checks.config(config, Config)
    num_states, num_actions = checks.finite(env, "monte_carlo")
    mask = checks.action_mask(action_mask, num_states, num_actions)
    envs = vectorize(env, 1)

    def allowed(s: Array) -> Array | None:
        return None if mask is None else mask[s]

    def explore(acting: PyTree, key: Key, obs: Array, memory: Memory) -> tuple[Array, Memory, PyTree]:
        q, epsilon = acting
        s = checks.state_index(obs)
        return ops.draw_action(key, ops.epsilon_greedy_policy(q[s], epsilon, allowed(s))), memory, ()

    def act(acting: PyTree, key: Key, obs: Array, memory: Memory) -> tuple[Array, Memory, PyTree]:
        q, epsilon = acting
        s = checks.state_index(obs)
        return ops.epsilon_greedy(key, q[s], epsilon, allowed(s)), memory, {"q": q[s]}

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        table_key, reset_key, state_key = jax.random.split(key, 3)
        env_params = env.params if hparams.env is None else hparams.env
        noise = jax.random.normal(table_key, (num_states, num_actions))
        return State(
            params=jnp.asarray(hparams.initial_value + hparams.initial_scale * noise, jnp.float32),
            visits=jnp.zeros((num_states, num_actions), jnp.float32),
            rollout=rollout.start(reset_key, envs, env_params, 1),
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def targets(q: Array, seen: Transition, hparams: HParams) -> Array:
        """The return of each step, ``[T]``; the last step counts as cut."""
        following = q[checks.state_index(seen.next_obs)]
        if mask is not None:
            following = ops.masked(following, mask[checks.state_index(seen.next_obs)])
        cut = seen.truncated.at[-1].set(True)
        discount = hparams.gamma * (1.0 - seen.terminated)

        def backward(after: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            reward, discount, cut, value = now
            total = reward + discount * jnp.where(cut, value, after)
            return total, total

        steps = (seen.reward, discount, cut, following.max(-1))
        return jax.lax.scan(backward, jnp.float32(0), steps, reverse=True)[1]

    def counted(seen: Transition) -> Array:
        """Which steps count, bool ``[T]``."""
        length = config.unroll_length
        if config.visit == "every":
            return jnp.ones((length,), bool)
        ended = seen.terminated | seen.truncated
        episode = jnp.cumsum(ended) - ended
        pair = checks.state_index(seen.obs) * num_actions + seen.action
        same = (pair[:, None] == pair) & (episode[:, None] == episode)
        return ~jnp.tril(same, -1).any(1)

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        env_params = env.params if hparams.env is None else hparams.env
        next_key, unroll_key = jax.random.split(state.key)
        epsilon = exploration.annealed_epsilon(hparams, ops.counter.to_float(state.env_steps))
        behaviour = Policy(explore, (state.params, epsilon))
        rollout_state, seen, metrics = rollout.unroll(
            unroll_key, envs, env_params, behaviour, state.rollout, config.unroll_length
        )
        seen = jax.tree.map(lambda leaf: leaf[:, 0], seen)

        def update(
            tables: tuple[Array, Array], visit: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], Array]:
            q, visits = tables
            s, a, target, counts = visit
            visits = visits.at[s, a].add(counts)
            error = target - q[s, a]
            alpha = hparams.learning_rate * counts
            if config.step_size == "visits":
                alpha = alpha / jnp.maximum(visits[s, a], 1.0)
            return (q.at[s, a].add(alpha * error), visits), error

        steps = (
            checks.state_index(seen.obs),
            seen.action,
            targets(state.params, seen, hparams),
            counted(seen).astype(jnp.float32),
        )
        (q, visits), error = jax.lax.scan(update, (state.params, state.visits), steps)
        state = State(
            params=q,
            visits=visits,
            rollout=rollout_state,
            env_steps=ops.counter.add(state.env_steps, config.unroll_length),
            key=next_key,
        )
        return state, metrics | {
            "loss": 0.5 * jnp.square(error).mean(),
            "q": q.max(-1).mean(),
            "epsilon": epsilon,
        }

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy of the table (first among equals), or, with greedy=False, an ε-greedy one."""
        return Policy(act, (state.params, jnp.float32(0.0 if greedy else epsilon)))

    return Algorithm(init, step, policy, config.unroll_length)
