"""Temporal-difference control with a table: Q-learning and its relatives, one learner in one environment.

Static choices give Q-learning (Watkins 1989, https://www.cs.rhul.ac.uk/~chrisw/thesis.html), SARSA (Rummery and
Niranjan 1994), Expected SARSA (van Seijen et al. 2009, https://doi.org/10.1109/ADPRL.2009.4927542), Double
Q-learning (van Hasselt 2010), Watkins' Q(λ) and SARSA(λ) (Sutton and Barto 2018, section 12.7 and 12.10), and
Dyna-Q (Sutton 1990). Every environment step updates the table at once. For thousands of learners
``jax.vmap`` ``init`` and ``step``.

Deviations: a time limit is never a terminal state; greedy actions that tie are drawn with equal chance while
learning (the textbooks' "ties broken randomly"); Dyna-Q plans on pairs drawn evenly among those seen, where the
book draws a state first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jrl import ops, rollout
from jrl.algos import checks, exploration, planning
from jrl.envs import vectorize
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Policy, PyTree

TARGETS = ("q_learning", "sarsa", "expected_sarsa", "double_q")
TRACES = ("none", "replacing", "accumulating")
EXPLORATIONS = ("epsilon_greedy", "boltzmann", "ucb", "count_bonus")
STEP_SIZES = ("constant", "visits")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    target: str = "q_learning"
    """q_learning, sarsa, expected_sarsa or double_q."""
    trace: str = "none"
    """none, or eligibility traces: replacing or accumulating. With q_learning this is Watkins' Q(λ), which cuts
    the trace where an action was not greedy; with sarsa it is SARSA(λ)."""
    exploration: str = "epsilon_greedy"
    """epsilon_greedy, boltzmann, ucb, or count_bonus: ε-greedy with bonus_coef / √n(s, a) added to the reward,
    that of plans too (Strehl and Littman 2008, https://doi.org/10.1016/j.jcss.2007.08.009); begin with an optimistic
    initial_value, or what was never tried looks worse than what has earned a bonus."""
    step_size: str = "constant"
    """constant, or visits: learning_rate / n(s, a)^step_size_exponent, n counting this visit (with double_q those that
    changed the same table); that is 1/n for learning_rate 1 and exponent 1."""
    planning_updates: int = 0
    """Updates from a learned model after each environment step (Dyna-Q); for a deterministic environment."""
    unroll_length: int = 64
    """Environment steps, each with its update, in one step of the algorithm."""

    def __post_init__(self) -> None:
        checks.sizes(self, "unroll_length")
        checks.choice(self, "target", TARGETS)
        checks.choice(self, "trace", TRACES)
        checks.choice(self, "exploration", EXPLORATIONS)
        checks.choice(self, "step_size", STEP_SIZES)
        if self.planning_updates:
            checks.sizes(self, "planning_updates")
        if self.trace != "none" and self.target == "double_q":
            raise ValueError(
                f"trace={self.trace!r} with target='double_q': a trace belongs to one table; use trace='none', "
                "or target='q_learning'."
            )
        if self.planning_updates and (self.target != "q_learning" or self.trace != "none"):
            raise ValueError(
                f"planning_updates={self.planning_updates} with target={self.target!r}, trace={self.trace!r}: "
                "Dyna-Q plans with target='q_learning' and trace='none'."
            )


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 0.1
    """Step size α."""
    step_size_exponent: float = 1.0
    """ω of α / n^ω, with step_size='visits'; convergence needs 0.5 < ω ≤ 1."""
    gamma: float = 0.99
    """Discount factor γ."""
    lam: float = 0.9
    """λ, decay of the eligibility traces beside γ."""
    epsilon_start: float = 0.1
    """Chance of a random action at env step 0."""
    epsilon_end: float = 0.1
    """Chance of a random action after epsilon_env_steps."""
    epsilon_env_steps: float = 0.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    temperature: float = 1.0
    """τ of boltzmann, in the unit of Q."""
    ucb_coef: float = 1.0
    """c of ucb, in the unit of Q."""
    bonus_coef: float = 0.1
    """β of count_bonus, in the unit of the reward."""
    initial_value: float = 0.0
    """Q before learning; above what can be earned it is optimistic, and makes the learner try everything."""
    initial_scale: float = 0.0
    """Standard deviation of normal noise on it."""
    tolerance: float = 0.0
    """Learning stops when no entry has changed by this much in tolerance_env_steps; 0 goes on for ever."""
    tolerance_env_steps: float = 1_000.0
    """Environment steps over which the largest change is taken; windows before the first change do not count."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. What the Config does not need is ``()``.

    ``params`` is the table Q, ``visits`` how often each entry was visited, float32 ``[S, A]`` (``[2, S, A]`` with
    double_q); ``trace`` float32 ``[S, A]``; ``action`` int32 ``[]``, what sarsa does next.
    """

    params: Array
    visits: PyTree
    trace: PyTree
    action: PyTree
    model: PyTree
    rollout: rollout.RolloutState
    largest_change: Array
    window_env_steps: Array
    converged: Array
    env_steps: Array
    key: Key


def make(env: Environment, config: Config | None = None, *, action_mask: Any = None) -> Algorithm:
    """Return a tabular learner on ``env`` as an :class:`~jrl.types.Algorithm`.

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
    num_states, num_actions = checks.finite(env, "tabular")
    mask = checks.action_mask(action_mask, num_states, num_actions)
    envs = vectorize(env, 1)
    double, traced = config.target == "double_q", config.trace != "none"
    counts = config.step_size == "visits" or config.exploration in ("ucb", "count_bonus")

    # One for the action; one for the other action of sarsa or the coin of double_q; one for each planned pair.
    num_uniforms = 1 + (config.target in ("sarsa", "double_q")) + config.planning_updates

    def combined(q: Array) -> Array:
        """The table that is acted on, ``[S, A]``."""
        return q.mean(0) if double else q

    def behaviour(q: Array, visits: PyTree, s: Array, epsilon: Array, hparams: HParams) -> Array:
        """Probabilities ``[..., A]`` of the actions in states ``s`` ``[...]``."""
        row = q[:, s].mean(0) if double else q[s]
        allowed = None if mask is None else mask[s]
        match config.exploration:
            case "boltzmann":
                return ops.boltzmann_policy(row, hparams.temperature, allowed)
            case "ucb":
                tried = visits[:, s].sum(0) if double else visits[s]
                return ops.ucb_policy(row, tried, hparams.ucb_coef, allowed)
        return ops.epsilon_greedy_policy(row, epsilon, allowed)

    def best(row: Array, s: Array) -> Array:
        return row if mask is None else ops.masked(row, mask[s])

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        table_key, reset_key, action_key, state_key = jax.random.split(key, 4)
        env_params = env.params if hparams.env is None else hparams.env
        start = rollout.start(reset_key, envs, env_params, 1)
        table = (num_states, num_actions)
        noise = jax.random.normal(table_key, (2, *table) if double else table)
        q = jnp.asarray(hparams.initial_value + hparams.initial_scale * noise, jnp.float32)
        visits = jnp.zeros_like(q) if counts else ()
        action: PyTree = ()
        if config.target == "sarsa":
            epsilon = jnp.float32(hparams.epsilon_start)
            s = checks.state_index(start.obs)[0]
            action = ops.draw_action(action_key, behaviour(q, visits, s, epsilon, hparams))
        return State(
            params=q,
            visits=visits,
            trace=jnp.zeros(table, jnp.float32) if traced else (),
            action=action,
            model=planning.empty(num_states, num_actions) if config.planning_updates else (),
            rollout=start,
            largest_change=jnp.float32(0),
            window_env_steps=jnp.float32(0),
            converged=jnp.bool_(False),
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def targets(
        q: Array, visits: PyTree, s: Array, next_action: Array, coin: Array, epsilon: Array, hparams: HParams
    ) -> Array:
        """What the true successor ``s`` is worth, ``[]``."""
        match config.target:
            case "sarsa":
                return q[s, next_action]
            case "expected_sarsa":
                return (behaviour(q, visits, s, epsilon, hparams) * q[s]).sum()
            case "double_q":
                return q[1 - coin, s, jnp.argmax(best(q[coin, s], s))]
        return best(q[s], s).max()

    def with_bonus(reward: Array, visits: PyTree, s: Array, a: Array, hparams: HParams) -> Array:
        if config.exploration != "count_bonus":
            return reward
        return reward + hparams.bonus_coef * jax.lax.rsqrt(visits[:, s, a].sum(0) if double else visits[s, a])

    def plan(
        q: Array, visits: PyTree, uniform: Array, model: planning.Model, hparams: HParams, alpha: Array
    ) -> tuple[Array, Array]:
        """Q-learning on pairs drawn from the model; also returns the largest change."""
        pairs = planning.sample(model, uniform)

        def update(q: Array, pair: Array) -> tuple[Array, Array]:
            s, a = pair // num_actions, pair % num_actions
            next_s = model.next_state[s, a]
            # The bonus of the counts as they are: without one plans would take back what the visits have earned.
            reward = with_bonus(model.reward[s, a], visits, s, a, hparams)
            target = reward + hparams.gamma * model.discount[s, a] * best(q[next_s], next_s).max()
            change = alpha * (target - q[s, a])
            return q.at[s, a].add(change), jnp.abs(change)

        q, changes = jax.lax.scan(update, q, pairs)
        return q, changes.max()

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        env_params = env.params if hparams.env is None else hparams.env
        next_key, env_key, uniform_key = jax.random.split(state.key, 3)
        epsilon = exploration.annealed_epsilon(hparams, ops.counter.to_float(state.env_steps))
        learning = 1.0 - state.converged

        def body(carry: State, random: tuple[Key, Array]) -> tuple[State, Any]:
            step_key, uniform = random
            q, visits, run = carry.params, carry.visits, carry.rollout
            s = checks.state_index(run.obs)[0]
            if config.target == "sarsa":
                action = carry.action
            else:
                action = ops.inverse_cdf(behaviour(q, visits, s, epsilon, hparams), uniform[0])
            env_state, out = envs.step(step_key, run.env_state, action[None], env_params)
            ended = out.terminated | out.truncated
            successor, arrived = checks.state_index(out.next_obs)[0], checks.state_index(out.obs)[0]
            coin = (uniform[1] < 0.5).astype(jnp.int32) if double else jnp.int32(0)
            entry = (coin, s, action) if double else (s, action)
            if counts:
                visits = visits.at[entry].add(1.0)

            next_action = action
            if config.target == "sarsa":
                # One draw for the true successor, one for where acting goes on: the same unless one ended.
                both = jnp.stack([successor, arrived])
                drawn = ops.inverse_cdf(behaviour(q, visits, both, epsilon, hparams), uniform[:2])
                next_action = drawn[0]
                carry = dataclasses.replace(carry, action=jnp.where(ended[0], drawn[1], drawn[0]))
            reward = with_bonus(out.reward[0], visits, s, action, hparams)
            discount = hparams.gamma * (1.0 - out.terminated[0])
            following = targets(q, visits, successor, next_action, coin, epsilon, hparams)
            td_error = reward + discount * following - q[entry]
            alpha = hparams.learning_rate * learning
            if config.step_size == "visits":
                alpha = alpha * visits[entry] ** -hparams.step_size_exponent

            change = jnp.abs(alpha * td_error)
            if traced:
                trace = carry.trace * (hparams.gamma * hparams.lam)
                if config.target == "q_learning":
                    trace = jnp.where(q[s, action] >= best(q[s], s).max(), trace, 0.0)
                trace = (
                    trace.at[s, action].set(1.0)
                    if config.trace == "replacing"
                    else trace.at[s, action].add(1.0)
                )
                q = q + alpha * td_error * trace
                change = change * trace.max()
                carry = dataclasses.replace(carry, trace=jnp.where(ended[0], 0.0, trace))
            else:
                q = q.at[entry].add(alpha * td_error)
            if config.planning_updates:
                model = planning.remember(carry.model, s, action, out.reward[0], out.terminated[0], successor)
                alpha = hparams.learning_rate * learning
                q, planned = plan(q, visits, uniform[1:], model, hparams, alpha)
                carry, change = dataclasses.replace(carry, model=model), jnp.maximum(change, planned)

            episode_return, length = run.episode_return + out.reward, run.episode_length + 1
            run = rollout.RolloutState(
                env_state,
                out.obs,
                (),
                jnp.where(ended, 0.0, episode_return),
                jnp.where(ended, 0, length),
            )
            carry = dataclasses.replace(carry, params=q, visits=visits, rollout=run)
            return carry, (ended, episode_return, length, td_error, change)

        # Drawn all at once, which costs a fraction of drawing them step by step.
        env_keys = jax.random.split(env_key, config.unroll_length)
        uniforms = jax.random.uniform(uniform_key, (config.unroll_length, num_uniforms))
        state, (ended, episode_return, length, td_error, change) = jax.lax.scan(
            body, state, (env_keys, uniforms)
        )
        change = change.max()
        state = dataclasses.replace(
            check_convergence(state, change, hparams),
            env_steps=ops.counter.add(state.env_steps, config.unroll_length),
            key=next_key,
        )
        return state, rollout.episode_metrics(ended, episode_return, length) | {
            "loss": 0.5 * jnp.square(td_error).mean(),
            "td_error": jnp.abs(td_error).mean(),
            "q": combined(state.params).max(-1).mean(),
            "largest_change": change,
            "converged": state.converged.astype(jnp.float32),
            "epsilon": epsilon,
        }

    def check_convergence(state: State, change: Array, hparams: HParams) -> State:
        largest = jnp.maximum(state.largest_change, change)
        window = jnp.where(largest > 0.0, state.window_env_steps + config.unroll_length, 0.0)
        full = window >= hparams.tolerance_env_steps
        return dataclasses.replace(
            state,
            converged=state.converged | (full & (largest < hparams.tolerance)),
            # A window that saw a change is followed by one that need not: the tiniest number says so.
            largest_change=jnp.where(full, jnp.finfo(jnp.float32).tiny, largest),
            window_env_steps=jnp.where(full, 0.0, window),
        )

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy of the table (first among equals), or, with greedy=False, an ε-greedy one."""
        return Policy(act, (combined(state.params), jnp.float32(0.0 if greedy else epsilon)))

    def act(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        q, epsilon = acting
        s = checks.state_index(obs)
        return ops.epsilon_greedy(key, q[s], epsilon, None if mask is None else mask[s]), memory, {"q": q[s]}

    return Algorithm(init, step, policy, config.unroll_length)


def train_until_converged(algo: Algorithm, state: State, hparams: HParams, *, max_steps: int) -> State:
    """Call ``algo.step`` until ``state.converged``, at most ``max_steps`` times; for ``hparams.tolerance`` > 0.

    Pure: under ``jax.vmap`` every learner stops by itself, and the call ends with the last of them.

    Raises:
        ValueError: ``max_steps`` is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"train_until_converged(max_steps={max_steps}): must be at least 1.")

    def unfinished(carry: tuple[State, Array]) -> Array:
        return ~carry[0].converged & (carry[1] < max_steps)

    def body(carry: tuple[State, Array]) -> tuple[State, Array]:
        return algo.step(carry[0], hparams)[0], carry[1] + 1

    return jax.lax.while_loop(unfinished, body, (state, jnp.int32(0)))[0]
