"""Returns, advantages and off-policy targets over a window of experience.

Arrays are time-major, ``[T, ...]`` with any trailing batch axes. ``value`` is the estimate of the state acted
in and ``next_value`` that of its *true successor* (before any reset), so nothing has to be shifted and the
end of the window needs no case of its own. ``terminated`` zeroes the bootstrap; either flag ends the trace,
because the following row belongs to another episode. Where both flags are true termination decides.

In the equations ``v'`` is ``next_value``, ``end = terminated or truncated``, and ``X'`` is row ``t+1`` of
``X``. ``gamma`` and ``lambda_`` may be traced. No function here stops a gradient: callers do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jrl.ops import checks
from jrl.types import Array


def gae(
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Array | float,
    gae_lambda: Array | float,
) -> tuple[Array, Array]:
    """Generalised advantage estimation.

    ``delta = r + γ (1 − terminated) v' − v``, ``A = delta + γ λ (1 − end) A'``, ``target = A + v``.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", https://arxiv.org/abs/1506.02438; truncation after Pardo et al. 2018, "Time Limits in
    Reinforcement Learning", https://arxiv.org/abs/1712.00378.

    Args:
        reward: floating ``[T, ...]``.
        value: floating ``[T, ...]``, of the state acted in.
        next_value: floating ``[T, ...]``, of the true successor.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        gamma: discount per step.
        gae_lambda: 0 gives the one-step error, 1 the Monte Carlo advantage.

    Returns:
        The advantage and the value target, each ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    _check(reward, terminated, truncated, value=value, next_value=next_value)
    delta = reward + _bootstrap(next_value, terminated, gamma) - value
    advantage = _accumulate(delta, jnp.where(terminated | truncated, 0.0, gamma * gae_lambda))
    return advantage, advantage + value


def lambda_returns(
    reward: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Array | float,
    lambda_: Array | float,
) -> Array:
    """TD(λ) targets.

    ``G = r + γ (1 − terminated) ((1 − λ) v' + λ G')``, with ``v'`` in place of ``G'`` at a truncation and on
    the last row.

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 12.1,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        reward: floating ``[T, ...]``.
        next_value: floating ``[T, ...]``, of the true successor.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        gamma: discount per step.
        lambda_: a number, or ``[T, ...]`` where it differs between steps (the weight of ``G'`` in row ``t``).

    Returns:
        The target of the state acted in, ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    _check(reward, terminated, truncated, next_value=next_value)
    end = terminated | truncated
    one_step = reward + _bootstrap(next_value, terminated, gamma) * jnp.where(end, 1.0, 1.0 - lambda_)
    # Of the last row only where it did not terminate: 0 times what may be infinite would be NaN, in every row.
    # A sum of that one row, as there may be none.
    last = jnp.where(terminated[-1:], 0.0, next_value[-1:]).sum(0)
    return _accumulate(one_step, jnp.where(end, 0.0, gamma * lambda_), last)


def discounted_returns(
    reward: Array, next_value: Array, terminated: Array, truncated: Array, *, gamma: Array | float
) -> Array:
    """Monte Carlo returns, bootstrapped where experience stops without a termination.

    ``G = r + γ (1 − terminated) G'``, with ``v'`` in place of ``G'`` at a truncation and on the last row.

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 3.3,
    http://incompleteideas.net/book/the-book-2nd.html; bootstrapping at a time limit: Pardo et al. 2018,
    https://arxiv.org/abs/1712.00378.

    Args:
        reward: floating ``[T, ...]``.
        next_value: floating ``[T, ...]``, of the true successor; read at truncations and in the last row.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        gamma: discount per step.

    Returns:
        The return of the state acted in, ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    _check(reward, terminated, truncated, next_value=next_value)
    read = (terminated | truncated).at[-1:].set(True)
    next_value = jnp.where(read, next_value, 0.0)
    return lambda_returns(reward, next_value, terminated, truncated, gamma=gamma, lambda_=1.0)


def n_step_returns(
    reward: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Array | float,
    n: int,
) -> Array:
    """Targets of n steps.

    ``G_t = Σ_{i<k} γ^i r_{t+i} + γ^k (1 − terminated_{t+k−1}) v'_{t+k−1}``, where ``k ≤ n`` is the number of
    steps really taken: the window closes at either flag and at the end of the array.

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 7.1,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        reward: floating ``[T, ...]``.
        next_value: floating ``[T, ...]``, of the true successor.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        gamma: discount per step.
        n: steps per window, static, at least 1.

    Returns:
        The target of the state acted in, ``[T, ...]``.

    Raises:
        ValueError: ``n`` is below 1.
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    if n < 1:
        raise ValueError(f"n_step_returns(n={n}): a window needs at least one step.")
    _check(reward, terminated, truncated, next_value=next_value)
    end = terminated | truncated

    # Extending every window by one step at its front needs only the shorter targets of the next row.
    def extend(_: Array, shorter: Array) -> Array:
        following = jnp.concatenate([shorter[1:], next_value[-1:].astype(shorter.dtype)])
        return reward + _bootstrap(jnp.where(end, next_value, following), terminated, gamma)

    one_step = reward + _bootstrap(next_value, terminated, gamma)
    return jax.lax.fori_loop(0, n - 1, extend, one_step)


def vtrace(
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    log_rho: Array,
    *,
    gamma: Array | float,
    lambda_: Array | float = 1.0,
    clip_rho: Array | float = 1.0,
    clip_c: Array | float = 1.0,
    clip_pg_rho: Array | float = 1.0,
) -> tuple[Array, Array]:
    """V-trace value targets and policy-gradient advantages.

    ``delta = min(clip_rho, ρ) (r + γ (1 − terminated) v' − v)``,
    ``target − v = delta + γ (1 − end) λ min(clip_c, ρ) (target' − v')``,
    ``advantage = min(clip_pg_rho, ρ) (r + γ (1 − terminated) target' − v)``, with ``v'`` in place of
    ``target'`` at a truncation and on the last row.

    Source: Espeholt et al. 2018, "IMPALA", section 4 (λ: remark 2),
    https://arxiv.org/abs/1802.01561. As in the paper λ scales the trace only; the advantage bootstraps with
    the target itself.

    Args:
        reward: floating ``[T, ...]``.
        value: floating ``[T, ...]``, of the state acted in.
        next_value: floating ``[T, ...]``, of the true successor.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        log_rho: floating ``[T, ...]``, ``log π(a|s) − log μ(a|s)`` of the action taken (π learned, μ acted).
        gamma: discount per step.
        lambda_: decay of the trace.
        clip_rho: bound of the ratio in ``delta``; it decides which policy's value is learned.
        clip_c: bound of the ratio in the trace; it trades variance for speed.
        clip_pg_rho: bound of the ratio in the advantage.

    Returns:
        The value target and the advantage, each ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    _check(reward, terminated, truncated, value=value, next_value=next_value, log_rho=log_rho)
    end = terminated | truncated
    rho = jnp.exp(log_rho)
    delta = jnp.minimum(clip_rho, rho) * (reward + _bootstrap(next_value, terminated, gamma) - value)
    trace = gamma * lambda_ * jnp.minimum(clip_c, rho)
    target = value + _accumulate(delta, jnp.where(end, 0.0, trace))
    following = jnp.concatenate([target[1:], next_value[-1:].astype(target.dtype)])
    next_target = jnp.where(end, next_value, following)
    error = reward + _bootstrap(next_target, terminated, gamma) - value
    return target, jnp.minimum(clip_pg_rho, rho) * error


def retrace(
    reward: Array,
    q: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    log_rho: Array,
    *,
    gamma: Array | float,
    lambda_: Array | float = 1.0,
) -> Array:
    """Retrace(λ) targets of action values.

    ``target = q + r + γ (1 − terminated) v' − q + γ (1 − end) c' (target' − q')`` with
    ``c = λ min(1, ρ)``: the trace is weighted by the ratio of the *next* action, never of the one evaluated.

    Source: Munos et al. 2016, "Safe and Efficient Off-Policy Reinforcement Learning",
    https://arxiv.org/abs/1606.02647.

    Args:
        reward: floating ``[T, ...]``.
        q: floating ``[T, ...]``, of the action taken in the state acted in.
        next_value: floating ``[T, ...]``, ``Σ_a π(a|s') Q(s', a)`` in the true successor.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        log_rho: floating ``[T, ...]``, ``log π(a|s) − log μ(a|s)`` of the action taken (π learned, μ acted).
        gamma: discount per step.
        lambda_: decay of the trace.

    Returns:
        The target of ``q``, ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    _check(reward, terminated, truncated, q=q, next_value=next_value, log_rho=log_rho)
    c = lambda_ * jnp.minimum(1.0, jnp.exp(log_rho))
    next_c = jnp.concatenate([c[1:], jnp.zeros_like(c[:1])])
    delta = reward + _bootstrap(next_value, terminated, gamma) - q
    return q + _accumulate(delta, jnp.where(terminated | truncated, 0.0, gamma * next_c))


def q_lambda(
    reward: Array,
    next_q: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Array | float,
    lambda_: Array | float,
) -> Array:
    """Peng's Q(λ) targets: the trace goes on after an exploratory action.

    ``G = r + γ (1 − terminated) ((1 − λ) max_a next_q + λ G')``, with ``max_a next_q`` in place of ``G'`` at
    a truncation and on the last row.

    Source: Peng and Williams 1996, "Incremental Multi-Step Q-Learning",
    https://doi.org/10.1007/BF00114731; Gallici et al. 2024 (PQN), https://arxiv.org/abs/2407.04811.

    Args:
        reward: floating ``[T, ...]``.
        next_q: floating ``[T, ..., A]``, of the true successor; disallowed actions already masked.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        gamma: discount per step.
        lambda_: 0 gives one-step Q-learning, 1 the bootstrapped Monte Carlo return.

    Returns:
        The target of the action taken, ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    return lambda_returns(reward, next_q.max(-1), terminated, truncated, gamma=gamma, lambda_=lambda_)


def watkins_q_lambda(
    reward: Array,
    next_q: Array,
    greedy: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Array | float,
    lambda_: Array | float,
) -> Array:
    """Watkins's Q(λ) targets: the trace is cut before an exploratory action.

    ``G = r + γ (1 − terminated) ((1 − λ greedy') max_a next_q + λ greedy' G')``, with ``max_a next_q`` in
    place of ``G'`` at a truncation and on the last row.

    Source: Watkins 1989, "Learning from Delayed Rewards", chapter 7,
    https://www.cs.rhul.ac.uk/~chrisw/thesis.html; Sutton and Barto 2018, section 12.10,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        reward: floating ``[T, ...]``.
        next_q: floating ``[T, ..., A]``, of the true successor; disallowed actions already masked.
        greedy: bool ``[T, ...]``, whether the action taken in row ``t`` was a maximiser in its own state.
        terminated: bool ``[T, ...]``.
        truncated: bool ``[T, ...]``.
        gamma: discount per step.
        lambda_: 0 gives one-step Q-learning; with ``greedy`` true everywhere it is :func:`q_lambda`.

    Returns:
        The target of the action taken, ``[T, ...]``.

    Raises:
        AssertionError: shapes differ, a flag is not bool, or another array is not floating.
    """
    checks.flags(greedy=greedy)
    checks.same_shape(reward=reward, greedy=greedy)
    next_greedy = jnp.concatenate([greedy[1:], jnp.ones_like(greedy[:1])])
    trace = jnp.where(next_greedy, lambda_, 0.0)
    return lambda_returns(reward, next_q.max(-1), terminated, truncated, gamma=gamma, lambda_=trace)


def rescale_value(x: Array, eps: Array | float = 1e-3) -> Array:
    """Squash returns of any size, so that one step size fits small and large ones.

    ``h(x) = sign(x) (sqrt(|x| + 1) − 1) + ε x``.

    Source: Pohlen et al. 2018, "Observe and Look Further", https://arxiv.org/abs/1805.11593; in R2D2: Kapturowski
    et al. 2019, https://openreview.net/forum?id=r1lyTjAqYX.

    Args:
        x: floating ``[...]``.
        eps: ε, at least 0; above 0 it keeps the inverse Lipschitz.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: ``x`` is not floating.
    """
    checks.floating(x=x)
    # sqrt(|x| + 1) − 1 without the difference, which would lose small x to rounding.
    return x / (jnp.sqrt(jnp.abs(x) + 1.0) + 1.0) + eps * x


def unscale_value(x: Array, eps: Array | float = 1e-3) -> Array:
    """Inverse of :func:`rescale_value`.

    ``h⁻¹(x) = sign(x) (((sqrt(1 + 4 ε (|x| + 1 + ε)) − 1) / (2 ε))² − 1)``. As exact for small ``x`` as for large.

    Source: Pohlen et al. 2018, proposition A.2, https://arxiv.org/abs/1805.11593.

    Args:
        x: floating ``[...]``.
        eps: ε, at least 0.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: ``x`` is not floating.
    """
    checks.floating(x=x)
    # h⁻¹ is r² − 1 with r = 1 at 0, here (r − 1) (r + 1), and r − 1 without that difference, which would lose a small x
    # and its slope to rounding; nothing is divided by ε, which may be 0.
    above = x / (0.5 + 0.5 * jnp.sqrt(1.0 + 4.0 * eps * (jnp.abs(x) + 1.0 + eps)) + eps)
    return above * (jnp.abs(above) + 2.0)


def _check(reward: Array, terminated: Array, truncated: Array, **others: Array) -> None:
    checks.floating(reward=reward, **others)
    checks.flags(terminated=terminated, truncated=truncated)
    checks.same_shape(reward=reward, terminated=terminated, truncated=truncated, **others)


def _bootstrap(next_value: Array, terminated: Array, gamma: Array | float) -> Array:
    # A select, not a product: the estimate of a terminal state may be anything, even infinite.
    return gamma * jnp.where(terminated, 0.0, next_value)


def _accumulate(increment: Array, decay: Array, last: Array | float = 0.0) -> Array:
    """Solve ``Y_t = increment_t + decay_t Y_{t+1}`` with ``Y_T = last``, backwards."""
    dtype = jnp.result_type(increment, decay)

    def step(following: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        current = row[0] + row[1] * following
        return current, current

    start = jnp.broadcast_to(jnp.asarray(last, dtype), increment.shape[1:])
    rows = (increment.astype(dtype), decay.astype(dtype))
    # On a CPU 8 or 16 steps per iteration cost more to compile, and ran no faster; on a GPU they are one kernel.
    unroll = 16 if jax.default_backend() == "gpu" else 1
    return jax.lax.scan(step, start, rows, reverse=True, unroll=unroll)[1]
