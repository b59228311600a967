"""Finite Markov decision processes as dense arrays, and their exact solutions.

All functions take one :class:`TabularMDP` and are pure: ``jax.vmap`` solves thousands at once. ``S`` is the
number of states, ``A`` of actions; a policy is a matrix of probabilities ``[S, A]``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jrl.ops import checks
from jrl.types import Array, Key


class TabularMDP(NamedTuple):
    """A finite Markov decision process with known dynamics.

    Rows of ``P`` may sum to less than 1: what is missing is the probability that the episode terminates,
    after which nothing is earned. A terminal state needs no row of its own, and ``R + γ P V`` is right as it
    stands.

    Attributes:
        P: floating ``[S, A, S]``, ``P[s, a, s']`` the probability of going on in ``s'``.
        R: floating ``[S, A]``, expected reward.
        gamma: discount factor γ, a number.
    """

    P: Array
    R: Array
    gamma: Array | float


class Solution(NamedTuple):
    """What the solvers return.

    Attributes:
        value: ``[S]``, V*.
        q: ``[S, A]``, Q*, one backup of ``value``.
        policy: ``[S, A]``, the greedy policy of ``q``, probabilities 0 and 1.
        residual: ``[]``, the Bellman residual of ``value``.
        iterations: int32 ``[]``, sweeps over all states, or evaluations of a policy.
    """

    value: Array
    q: Array
    policy: Array
    residual: Array
    iterations: Array


def q_from_v(mdp: TabularMDP, value: Array) -> Array:
    """One backup of a state value.

    ``Q(s, a) = R(s, a) + γ Σ_s' P(s'|s, a) V(s')``.

    Source: Bellman 1957, "Dynamic Programming"; Sutton and Barto 2018, equation 4.6,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        mdp: the process.
        value: floating ``[S]``.

    Returns:
        ``[S, A]``.

    Raises:
        AssertionError: shapes do not fit or an array is not floating.
    """
    num_states, _ = _sizes(mdp)
    checks.floating(value=value)
    checks.shape(value=(value, (num_states,)))
    return mdp.R + mdp.gamma * jnp.einsum("sat,t->sa", mdp.P, value, precision=lax.Precision.HIGHEST)


def v_from_q(q: Array, policy: Array | None = None) -> Array:
    """State values of action values: of the greedy policy, or of the given one.

    ``V(s) = max_a Q(s, a)``, or ``Σ_a π(a|s) Q(s, a)``. The first is V* where Q is Q*, and never V^π of
    another policy.

    Source: Sutton and Barto 2018, section 3.6, http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        q: floating ``[..., A]``.
        policy: probabilities of the shape of ``q``; None is greedy.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(q=q)
    if policy is None:
        return jnp.max(q, axis=-1)
    checks.floating(policy=policy)
    checks.same_shape(q=q, policy=policy)
    return jnp.sum(policy * q, axis=-1)


def greedy_policy(q: Array) -> Array:
    """Probability 1 for the best action, the first among equals.

    ``π(a|s) = [a = argmax_b Q(s, b)]``.

    Source: Sutton and Barto 2018, equation 4.9, http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        q: floating ``[..., A]``.

    Returns:
        Of the shape and dtype of ``q``.

    Raises:
        AssertionError: ``q`` is not floating.
    """
    checks.floating(q=q)
    q = jnp.asarray(q)
    return jax.nn.one_hot(jnp.argmax(q, axis=-1), q.shape[-1], dtype=q.dtype)


def bellman_residual(mdp: TabularMDP, value: Array, policy: Array | None = None) -> Array:
    """How far a value is from satisfying the Bellman equation.

    ``max_s |V(s) − max_a Q(s, a)|`` with ``Q`` one backup of ``V``; with a policy ``Σ_a π(a|s) Q(s, a)`` takes
    the place of the maximum. ``V`` is within ``residual / (1 − γ)`` of the true value.

    Source: Williams and Baird 1993, "Tight Performance Bounds on Greedy Policies Based on Imperfect Value
    Functions".

    Args:
        mdp: the process.
        value: floating ``[S]``.
        policy: ``[S, A]``; None takes the optimality equation.

    Returns:
        A scalar.

    Raises:
        AssertionError: shapes do not fit or an array is not floating.
    """
    return jnp.max(jnp.abs(v_from_q(q_from_v(mdp, value), policy) - value))


def evaluate_policy(mdp: TabularMDP, policy: Array) -> Array:
    """Solve for the value of a policy.

    ``(I − γ P_π) V = R_π`` with ``P_π(s, s') = Σ_a π(a|s) P(s'|s, a)``, by factorisation and one step of
    iterative refinement, which brings the residual to the rounding of ``V`` itself.

    Source: Sutton and Barto 2018, section 4.1, http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        mdp: the process; with ``γ = 1`` every policy must terminate.
        policy: floating ``[S, A]``.

    Returns:
        ``[S]``.

    Raises:
        AssertionError: shapes do not fit or an array is not floating.
    """
    num_states, num_actions = _sizes(mdp)
    checks.floating(policy=policy)
    checks.shape(policy=(policy, (num_states, num_actions)))
    transition = jnp.einsum("sa,sat->st", policy, mdp.P, precision=lax.Precision.HIGHEST)
    reward = jnp.sum(policy * mdp.R, axis=-1)
    factors = jax.scipy.linalg.lu_factor(jnp.eye(num_states, dtype=reward.dtype) - mdp.gamma * transition)
    value = jax.scipy.linalg.lu_solve(factors, reward)
    backup = reward + mdp.gamma * jnp.matmul(transition, value, precision=lax.Precision.HIGHEST)
    return value + jax.scipy.linalg.lu_solve(factors, backup - value)


def value_iteration(
    mdp: TabularMDP, *, tolerance: Array | float = 1e-6, max_iterations: Array | int = 100_000
) -> Solution:
    """Back up all states at once until nothing changes.

    ``V ← max_a [R + γ P V]`` until ``max |ΔV| ≤ tolerance``, or until rounding alone moves it: the change is a
    unit or two in the last place of the largest value and has ceased to shrink.

    Source: Bellman 1957, "A Markovian Decision Process", https://doi.org/10.1512/iumj.1957.6.56038.

    Args:
        mdp: the process.
        tolerance: in the unit of the reward.
        max_iterations: sweeps after which it gives up; ``residual`` then says how far it came.

    Returns:
        A :class:`Solution`.

    Raises:
        AssertionError: shapes do not fit or an array is not floating.
    """
    num_states, _ = _sizes(mdp)
    mdp = _as_jax(mdp)
    start = jnp.zeros((num_states,), mdp.R.dtype)

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        value, change, previous, iterations = carry
        rounding = 2 * jnp.finfo(value.dtype).eps * jnp.max(jnp.abs(value))
        settled = (change <= rounding) & (change >= previous)
        return (change > tolerance) & ~settled & (iterations < max_iterations)

    def sweep(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        value, change, _, iterations = carry
        backup = v_from_q(q_from_v(mdp, value))
        return backup, jnp.max(jnp.abs(backup - value)), change, iterations + 1

    unknown = jnp.full((), jnp.inf, mdp.R.dtype)
    first = (start, unknown, unknown, jnp.int32(0))
    value, _, _, iterations = lax.while_loop(unfinished, sweep, first)
    return _solution(mdp, value, iterations)


def policy_iteration(mdp: TabularMDP, *, max_iterations: Array | int = 1_000) -> Solution:
    """Evaluate a policy exactly, be greedy, and again, until no action changes.

    An action is changed only where another is better by more than rounding: equally good policies would
    otherwise follow each other for ever.

    Source: Howard 1960, "Dynamic Programming and Markov Processes"; Sutton and Barto 2018, section 4.3,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        mdp: the process; with ``γ = 1`` every policy must terminate.
        max_iterations: evaluations after which it gives up.

    Returns:
        A :class:`Solution`.

    Raises:
        AssertionError: shapes do not fit or an array is not floating.
    """
    _, num_actions = _sizes(mdp)
    mdp = _as_jax(mdp)

    def evaluate(action: Array) -> Array:
        return evaluate_policy(mdp, jax.nn.one_hot(action, num_actions, dtype=mdp.R.dtype))

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        _, changed, iterations = carry
        return changed & (iterations < max_iterations)

    def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        action, _, iterations = carry
        q = q_from_v(mdp, evaluate(action))
        current = jnp.take_along_axis(q, action[:, None], axis=1)[:, 0]
        rounding = 32 * jnp.finfo(q.dtype).eps * jnp.max(jnp.abs(q))
        better = jnp.max(q, axis=-1) > current + rounding
        improved = jnp.where(better, jnp.argmax(q, axis=-1).astype(jnp.int32), action)
        return improved, jnp.any(better), iterations + 1

    first = (jnp.argmax(mdp.R, axis=-1).astype(jnp.int32), jnp.bool_(True), jnp.int32(0))
    action, _, iterations = lax.while_loop(unfinished, improve, first)
    return _solution(mdp, evaluate(action), iterations)


def random_mdp(
    key: Key, num_states: int, num_actions: int, gamma: Array | float, *, branching: int | None = None
) -> TabularMDP:
    """Draw a process: standard normal rewards, transition probabilities uniform on the simplex.

    With ``branching = b`` each row has ``b`` possible successors, drawn without replacement.

    Source: Archibald, McKinnon and Thomas 1995, "On the Generation of Markov Decision Processes",
    https://doi.org/10.1057/jors.1995.50 (known as Garnet problems).

    Args:
        key: consumed.
        num_states: ``S``, static.
        num_actions: ``A``, static.
        gamma: discount factor.
        branching: successors of a state and action, static; None means all.

    Raises:
        ValueError: ``branching`` is no whole number from 1 to ``num_states``.
    """
    if branching is not None and branching not in range(1, num_states + 1):
        raise ValueError(
            f"random_mdp(branching={branching}): a state has between 1 and num_states={num_states} successors, "
            "a whole number of them."
        )
    weight_key, successor_key, reward_key = jax.random.split(key, 3)
    shape = (num_states, num_actions, num_states)
    weight = jax.random.exponential(weight_key, shape)
    if branching is not None:
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(successor_key, shape), axis=-1), axis=-1)
        weight = jnp.where(rank < branching, weight, 0.0)
    reward = jax.random.normal(reward_key, (num_states, num_actions))
    return TabularMDP(weight / weight.sum(-1, keepdims=True), reward, jnp.asarray(gamma, reward.dtype))


def _sizes(mdp: TabularMDP) -> tuple[int, int]:
    checks.floating(P=mdp.P, R=mdp.R)
    num_states, num_actions = mdp.R.shape[-2:] if jnp.ndim(mdp.R) >= 2 else (0, 0)
    checks.shape(R=(mdp.R, (num_states, num_actions)), P=(mdp.P, (num_states, num_actions, num_states)))
    checks.shape(gamma=(mdp.gamma, ()))
    return num_states, num_actions


def _as_jax(mdp: TabularMDP) -> TabularMDP:
    """Arrays of NumPy as JAX holds them, float32 for float64 but for x64 mode; those of JAX as they are."""
    return mdp._replace(P=jnp.asarray(mdp.P), R=jnp.asarray(mdp.R))


def _solution(mdp: TabularMDP, value: Array, iterations: Array) -> Solution:
    q = q_from_v(mdp, value)
    residual = jnp.max(jnp.abs(v_from_q(q) - value))
    return Solution(value, q, greedy_policy(q), residual, iterations)
