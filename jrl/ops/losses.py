"""Losses and diagnostics of policy-gradient and value-based learning.

Arrays have any shape ``[...]`` unless the docstring says otherwise; ``A`` is the number of actions and the
last axis of ``q``. Means are over all entries.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrl.ops import checks, reductions
from jrl.types import Array


def policy_gradient_loss(log_prob: Array, advantage: Array) -> Array:
    """The loss whose gradient is the policy gradient.

    ``−mean A log π(a|s)``.

    Source: Sutton et al. 2000, "Policy Gradient Methods for Reinforcement Learning with Function Approximation",
    https://papers.nips.cc/paper/1713.

    Args:
        log_prob: floating ``[...]``, of the action taken under the policy being learned.
        advantage: floating ``[...]``; its gradient is not stopped here.

    Returns:
        A scalar.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(log_prob=log_prob, advantage=advantage)
    checks.same_shape(log_prob=log_prob, advantage=advantage)
    return -jnp.mean(log_prob * advantage)


def ppo_clip_loss(log_prob: Array, old_log_prob: Array, advantage: Array, clip_eps: Array | float) -> Array:
    """PPO's clipped surrogate, as a loss.

    ``−mean min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)`` with ``ρ = exp(log_prob − old_log_prob)``.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7,
    https://arxiv.org/abs/1707.06347.

    Args:
        log_prob: floating ``[...]``, of the action taken under the policy being learned.
        old_log_prob: floating ``[...]``, under the policy that acted.
        advantage: floating ``[...]``, usually standardised.
        clip_eps: the clip range ε.

    Returns:
        A scalar.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    checks.same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))


def ppo_kl_loss(
    log_prob: Array, old_log_prob: Array, advantage: Array, kl: Array, kl_coef: Array | float
) -> Array:
    """PPO's surrogate with a KL penalty in place of the clipping, as a loss.

    ``−mean ρ A + β KL(old ‖ new)`` with ``ρ = exp(log_prob − old_log_prob)``.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 8,
    https://arxiv.org/abs/1707.06347.

    Args:
        log_prob: floating ``[...]``, of the action taken under the policy being learned.
        old_log_prob: floating ``[...]``, under the policy that acted.
        advantage: floating ``[...]``, usually standardised.
        kl: the divergence in nats, averaged over states, a scalar.
        kl_coef: the penalty's weight β.

    Returns:
        A scalar.

    Raises:
        AssertionError: shapes differ, ``kl`` is no scalar, or an array is not floating.
    """
    checks.floating(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage, kl=kl)
    checks.same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    checks.shape(kl=(kl, ()))
    return -jnp.mean(jnp.exp(log_prob - old_log_prob) * advantage) + kl_coef * kl


def adapted_kl_coef(kl_coef: Array | float, kl: Array, target_kl: Array | float) -> Array:
    """The weight of PPO's KL penalty for the next update.

    ``β / 2`` where ``KL < target / 1.5``, ``2 β`` where ``KL > 1.5 target``, else ``β``; kept within
    ``[10⁻⁶, 10⁶]``, as halving for ever would end at a 0 that cannot be doubled.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 4,
    https://arxiv.org/abs/1707.06347.

    Args:
        kl_coef: β, ``[]``.
        kl: the divergence in nats that the last update ended with, ``[]``.
        target_kl: what it should be, above 0.

    Returns:
        The new β, ``[]``.

    Raises:
        Nothing.
    """
    factor = jnp.where(kl > 1.5 * target_kl, 2.0, jnp.where(kl < target_kl / 1.5, 0.5, 1.0))
    return jnp.clip(kl_coef * factor, 1e-6, 1e6)


def clip_fraction(log_prob: Array, old_log_prob: Array, clip_eps: Array | float) -> Array:
    """Fraction of samples whose ratio has left the clip range.

    ``mean [|ρ − 1| > ε]`` with ``ρ = exp(log_prob − old_log_prob)``.

    Source: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 12,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

    Args:
        log_prob: floating ``[...]``, under the policy being learned.
        old_log_prob: floating ``[...]``, under the policy that acted.
        clip_eps: the clip range ε.

    Returns:
        A scalar in [0, 1].

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(log_prob=log_prob, old_log_prob=old_log_prob)
    checks.same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    return jnp.mean(jnp.abs(jnp.expm1(log_prob - old_log_prob)) > clip_eps, dtype=log_prob.dtype)


def approx_kl(log_prob: Array, old_log_prob: Array) -> Array:
    """Estimate ``KL(old ‖ new)`` from samples of the old policy: unbiased, and no term is negative.

    ``mean((ρ − 1) − log ρ)`` with ``ρ = exp(log_prob − old_log_prob)``.

    Source: Schulman 2020, "Approximating KL Divergence" (estimator k3),
    http://joschu.net/blog/kl-approx.html.

    Args:
        log_prob: floating ``[...]``, under the policy being learned.
        old_log_prob: floating ``[...]``, under the policy that acted.

    Returns:
        A scalar in nats.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(log_prob=log_prob, old_log_prob=old_log_prob)
    checks.same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    log_ratio = log_prob - old_log_prob
    # expm1: near ρ = 1 the estimate is about log_ratio²/2, which ρ − 1 would lose to rounding.
    return jnp.mean(jnp.expm1(log_ratio) - log_ratio)


def value_loss(value: Array, target: Array) -> Array:
    """Half the mean squared error.

    ``½ mean (value − target)²``.

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 9.2,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        value: floating ``[...]``.
        target: floating ``[...]``; its gradient is not stopped here.

    Returns:
        A scalar.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(value=value, target=target)
    checks.same_shape(value=value, target=target)
    return 0.5 * jnp.mean(jnp.square(value - target))


def clipped_value_loss(value: Array, old_value: Array, target: Array, clip_eps: Array | float) -> Array:
    """PPO's pessimistic value loss: no credit for moving further than ε from the old value.

    ``½ mean max((v − G)², (v_old + clip(v − v_old, −ε, ε) − G)²)``.

    Source: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 9,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

    Args:
        value: floating ``[...]``, the estimate being learned.
        old_value: floating ``[...]``, the estimate when the data was collected.
        target: floating ``[...]``.
        clip_eps: the clip range ε, in the unit of the return.

    Returns:
        A scalar.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(value=value, old_value=old_value, target=target)
    checks.same_shape(value=value, old_value=old_value, target=target)
    clipped = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
    return 0.5 * jnp.mean(jnp.maximum(jnp.square(value - target), jnp.square(clipped - target)))


def standardize(x: Array, eps: float = 1e-8, *, mean: Callable[[Array], Array] = jnp.mean) -> Array:
    """Shift to mean 0 and scale to standard deviation 1.

    ``(x − mean x) / (std x + eps)``, with the standard deviation of the population, over all entries.

    Source: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 7,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

    Args:
        x: floating ``[...]``.
        eps: keeps a constant ``x`` finite (it gives 0, whatever its mean rounds to).
        mean: ``[...] -> scalar``; another where ``x`` is a part of what is to be standardised.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: ``x`` is not floating.
    """
    checks.floating(x=x)
    deviation = _deviation(x, mean)
    return deviation / (jnp.sqrt(mean(jnp.square(deviation))) + eps)


def explained_variance(value: Array, target: Array, *, mean: Callable[[Array], Array] = jnp.mean) -> Array:
    """How much of the targets' variance the values explain.

    ``1 − Var(target − value) / Var(target)``; 0 where the target does not vary by more than rounding, to which a target
    that was summed from values comes by itself.

    Source: Kvålseth 1985, "Cautionary Note about R²", https://doi.org/10.1080/00031305.1985.10479448.

    Args:
        value: floating ``[...]``.
        target: floating ``[...]``.
        mean: ``[...] -> scalar``; another where the arrays are parts of larger ones.

    Returns:
        A scalar: 1 for a perfect critic, 0 for a constant, below 0 for a worse one.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(value=value, target=target)
    checks.same_shape(value=value, target=target)
    variance, unexplained = (mean(jnp.square(_deviation(x, mean))) for x in (target, target - value))
    size = mean(jnp.square(target) + jnp.square(value))
    varies = variance > (4.0 * jnp.finfo(target.dtype).eps) ** 2 * size
    return jnp.where(varies, 1.0 - unexplained / jnp.where(varies, variance, 1.0), 0.0)


def _deviation(x: Array, mean: Callable[[Array], Array]) -> Array:
    """``x`` less its mean, exactly 0 where ``x`` is constant."""
    deviation = x - mean(x)
    # The mean of equal numbers is rounded, and leaves them all the same distance from it: they would seem to vary.
    left = mean(deviation)
    constant = mean(jnp.square(deviation - left)) <= jnp.finfo(deviation.dtype).eps * jnp.square(left)
    return jnp.where(constant, 0.0, deviation)


def huber(x: Array, delta: Array | float = 1.0) -> Array:
    """Square near zero, linear beyond ``delta``.

    ``½ x²`` where ``|x| ≤ δ``, else ``δ (|x| − ½ δ)``.

    Source: Huber 1964, "Robust Estimation of a Location Parameter",
    https://doi.org/10.1214/aoms/1177703732; in DQN: Mnih et al. 2015, https://doi.org/10.1038/nature14236.

    Args:
        x: floating ``[...]``, an error.
        delta: where the slope stops growing, above 0.

    Returns:
        ``[...]``, not reduced.

    Raises:
        AssertionError: ``x`` is not floating.
    """
    checks.floating(x=x)
    near = jnp.clip(x, -delta, delta)
    # Equal to the two cases above, with the slope `near` exact everywhere and no branch to differentiate.
    return near * (x - 0.5 * near)


def select_action(q: Array, action: Array) -> Array:
    """Entry of each action.

    ``q(s, a)``.

    Source: notation only.

    Args:
        q: ``[..., A]``.
        action: integer ``[...]`` in ``0 … A-1``.

    Returns:
        ``[...]``; 0 for an action out of range.

    Raises:
        AssertionError: ``action`` is not integer or has not the shape of ``q`` without ``A``.
    """
    checks.selects(action, q, "q")
    # Not a gather: its gradient is a scatter, which is slower than this select at the sizes of an action
    # space. Not a product with the one-hot row: an infinite entry elsewhere would give nan.
    chosen = jax.nn.one_hot(action, q.shape[-1], dtype=bool)
    return reductions.total(jnp.where(chosen, q, 0))


def q_target(reward: Array, discount: Array, next_q: Array) -> Array:
    """Q-learning target.

    ``stop_gradient(r + discount · max_a next_q)``.

    Source: Watkins and Dayan 1992, "Q-learning", https://doi.org/10.1007/BF00992698; Mnih et al. 2015,
    https://doi.org/10.1038/nature14236.

    Args:
        reward: floating ``[...]``, the discounted sum over the ``k`` steps of the window.
        discount: floating ``[...]``, ``γ^k (1 − terminated)``.
        next_q: floating ``[..., A]``, of the true successor; disallowed actions already masked.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(reward=reward, discount=discount, next_q=next_q)
    next_value = jnp.max(next_q, axis=-1)
    checks.same_shape(reward=reward, discount=discount, next_value=next_value)
    return jax.lax.stop_gradient(reward + discount * next_value)


def double_q_target(reward: Array, discount: Array, next_q_online: Array, next_q_target: Array) -> Array:
    """Double Q-learning target: one network chooses the action, the other values it.

    ``stop_gradient(r + discount · next_q_target[argmax_a next_q_online])``.

    Source: van Hasselt et al. 2016, "Deep Reinforcement Learning with Double Q-learning",
    https://arxiv.org/abs/1509.06461.

    Args:
        reward: floating ``[...]``, the discounted sum over the ``k`` steps of the window.
        discount: floating ``[...]``, ``γ^k (1 − terminated)``.
        next_q_online: floating ``[..., A]``, of the true successor; disallowed actions already masked.
        next_q_target: floating ``[..., A]``, of the true successor by the target network.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(reward=reward, discount=discount, next_q_online=next_q_online)
    checks.floating(next_q_target=next_q_target)
    checks.same_shape(next_q_online=next_q_online, next_q_target=next_q_target)
    next_value = select_action(next_q_target, jnp.argmax(next_q_online, axis=-1))
    checks.same_shape(reward=reward, discount=discount, next_value=next_value)
    return jax.lax.stop_gradient(reward + discount * next_value)


def td_error(q: Array, action: Array, target: Array) -> Array:
    """Temporal-difference error of the action taken.

    ``target − q(s, a)``.

    Source: Sutton and Barto 2018, "Reinforcement Learning: An Introduction", section 6.5,
    http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        q: floating ``[..., A]``.
        action: integer ``[...]``.
        target: floating ``[...]``; its gradient is not stopped here.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: shapes differ, ``action`` is not integer, or another array is not floating.
    """
    checks.floating(q=q, target=target)
    checks.same_shape(action=action, target=target)
    return target - select_action(q, action)
