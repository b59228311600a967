"""Distributions over returns, and the entropy-regularised targets of Munchausen learning.

``K`` is the number of atoms or quantiles that are learned and the last axis, ``M`` that of a target, ``A`` the
number of actions. Sums over atoms have the batch's first axis last, where a processor's vector units are: as the last
axis themselves they would be added one at a time. Nothing here is reduced over ``[...]``, and no gradient is stopped:
callers do both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jrl.ops import checks
from jrl.ops.losses import huber, select_action
from jrl.types import Array

AT_ONCE = 3  # atoms whose mass is distributed in one pass over the result


def categorical_mean(logits: Array, support: Array) -> Array:
    """Mean of a distribution over fixed atoms.

    ``Σ_k softmax(logits)_k z_k``.

    Source: Bellemare et al. 2017, "A Distributional Perspective on Reinforcement Learning",
    https://arxiv.org/abs/1707.06887.

    Args:
        logits: floating ``[..., K]``.
        support: the atoms z, floating ``[K]``, ascending, in the unit of the return.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: an array is not floating, or there is not one atom a logit.
    """
    checks.floating(logits=logits, support=support)
    checks.shape(support=(support, (logits.shape[-1],)))
    mass, total = _mass(logits)
    support = _batch_last(jnp.broadcast_to(support, logits.shape))
    return _batch_first(jnp.sum(mass * support, axis=-2) / total[..., 0, :], logits.ndim - 1)


def categorical_probability(logits: Array) -> Array:
    """Probabilities of a distribution over fixed atoms.

    ``softmax(logits)_k``; :func:`jax.nn.softmax` in the layout that the other functions here have.

    Source: Bellemare et al. 2017, section 4.1, https://arxiv.org/abs/1707.06887.

    Args:
        logits: floating ``[..., K]``.

    Returns:
        ``[..., K]``.

    Raises:
        AssertionError: ``logits`` is not floating.
    """
    checks.floating(logits=logits)
    mass, total = _mass(logits)
    return _batch_first(mass / total, logits.ndim)


def categorical_projection(value: Array, probability: Array, support: Array) -> Array:
    """Distribute the mass of arbitrary atoms over the atoms of an evenly spaced support.

    ``p_k = Σ_m probability_m [1 − |clip(value_m, z_1, z_K) − z_k| / Δz]₊``: each atom's mass goes to its two
    neighbours in inverse proportion to their distances. Total mass is preserved, and so is the mean where nothing
    is clipped. With ``value = r + γ z`` it is the projected Bellman update of C51.

    Source: Bellemare et al. 2017, equation 7, https://arxiv.org/abs/1707.06887.

    Args:
        value: floating ``[..., M]``, where the mass is, in any order.
        probability: floating ``[..., M]``.
        support: z, floating ``[K]``, ascending and evenly spaced, ``K >= 2``.

    Returns:
        ``[..., K]``.

    Raises:
        AssertionError: an array is not floating, or the shapes do not fit.
        ValueError: the support has fewer than two atoms.
    """
    checks.floating(value=value, probability=probability, support=support)
    checks.same_shape(value=value, probability=probability)
    if support.ndim != 1 or support.shape[0] < 2:
        raise ValueError(
            f"categorical_projection: support of shape {support.shape}; give at least two atoms, [K]."
        )
    spacing = (support[-1] - support[0]) / (support.shape[0] - 1)
    # Distances in atoms from the first one. A few atoms of the value at once, one after the other: on a CPU eight times
    # as fast as a sum along the last axis. A scatter to two neighbours would be in no certain order on a GPU.
    position = (jnp.clip(value, support[0], support[-1]) - support[0]) / spacing
    position, probability = (jnp.moveaxis(x, -1, 0) for x in (position, probability))
    atoms = jax.lax.broadcasted_iota(position.dtype, (support.shape[0], *position.shape[1:]), 0)

    def distribute(first: Array, mass: Array, count: int) -> Array:
        for m in range(count):
            share = jnp.maximum(0.0, 1.0 - jnp.abs(position[first + m][None] - atoms))
            mass += share * probability[first + m][None]
        return mass

    rounds, rest = divmod(position.shape[0], AT_ONCE)
    mass = jax.lax.fori_loop(
        0, rounds, lambda i, mass: distribute(AT_ONCE * i, mass, AT_ONCE), jnp.zeros_like(atoms)
    )
    return jnp.moveaxis(distribute(jnp.int32(AT_ONCE * rounds), mass, rest), 0, -1)


def categorical_cross_entropy(logits: Array, target: Array) -> Array:
    """Cross-entropy of a distribution relative to a target.

    ``−Σ_k target_k log softmax(logits)_k``.

    Source: Bellemare et al. 2017, algorithm 1, https://arxiv.org/abs/1707.06887.

    Args:
        logits: floating ``[..., K]``.
        target: probabilities, floating ``[..., K]``.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: shapes differ or an array is not floating.
    """
    checks.floating(logits=logits, target=target)
    checks.same_shape(logits=logits, target=target)
    shifted = _batch_last(logits)
    shifted -= jax.lax.stop_gradient(shifted.max(-2, keepdims=True))
    log_total = jnp.log(jnp.sum(jax.lax.optimization_barrier(jnp.exp(shifted)), axis=-2, keepdims=True))
    return _batch_first(-jnp.sum(_batch_last(target) * (shifted - log_total), axis=-2), logits.ndim - 1)


def _mass(logits: Array) -> tuple[Array, Array]:
    """Return ``exp(logits − max)``, batch last ``[..., K, N]``, and its sum ``[..., 1, N]``."""
    logits = _batch_last(logits)
    best = jax.lax.stop_gradient(logits.max(-2, keepdims=True))
    # Behind a barrier: within a sum XLA would compute the exponentials again, and one at a time.
    mass = jax.lax.optimization_barrier(jnp.exp(logits - best))
    return mass, mass.sum(-2, keepdims=True)


def _batch_last(x: Array) -> Array:
    """Return ``[..., K, N]`` of ``x [N, ..., K]``; ``[K, 1]`` of ``[K]``."""
    return x[:, None] if x.ndim == 1 else jnp.moveaxis(x, 0, -1)


def _batch_first(x: Array, rank: int) -> Array:
    """Return ``x [..., N]`` with its last axis first, or without it where there was no batch."""
    return jnp.moveaxis(x, -1, 0) if x.ndim == rank else x[..., 0]


def quantile_midpoints(num: int) -> Array:
    """Fractions whose quantiles stand for equal shares of a distribution.

    ``τ_i = (2 i − 1) / (2 K)``, ``i = 1 … K``.

    Source: Dabney et al. 2018, "Distributional Reinforcement Learning with Quantile Regression", lemma 2,
    https://arxiv.org/abs/1710.10044.

    Args:
        num: K, static.

    Returns:
        float32 ``[K]``.

    Raises:
        ValueError: ``num`` is below 1.
    """
    if num < 1:
        raise ValueError(f"quantile_midpoints(num={num}): there is at least one quantile.")
    return (jnp.arange(num, dtype=jnp.float32) + 0.5) / num


def quantile_huber_loss(quantile: Array, fraction: Array, target: Array, delta: Array | float = 1.0) -> Array:
    """Quantile regression with a loss that is smooth at zero.

    ``Σ_i mean_j |τ_i − [u_ij < 0]| L_δ(u_ij) / δ``, ``u_ij = target_j − quantile_i`` and ``L_δ`` the Huber loss. As
    ``δ`` goes to 0 its minimiser is the ``τ_i`` quantile of the target.

    Source: Dabney et al. 2018, equation 10, https://arxiv.org/abs/1710.10044 (QR-DQN); Dabney et al. 2018,
    "Implicit Quantile Networks", equation 3, https://arxiv.org/abs/1806.06923.

    Args:
        quantile: floating ``[..., K]``, learned.
        fraction: τ, floating ``[..., K]`` or ``[K]``.
        target: floating ``[..., M]``, samples (or quantiles of equal weight) of the target distribution.
        delta: δ, in the unit of the return, above 0.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: an array is not floating, or the shapes do not fit.
    """
    checks.floating(quantile=quantile, fraction=fraction, target=target)
    fraction = jnp.broadcast_to(fraction, quantile.shape) if fraction.ndim == 1 else fraction
    checks.same_shape(quantile=quantile, fraction=fraction)
    checks.shape(target=(target, (*quantile.shape[:-1], target.shape[-1])))
    error = target[..., None, :] - quantile[..., :, None]
    weight = jnp.where(error < 0.0, 1.0 - fraction[..., None], fraction[..., None])
    return jnp.sum(jnp.mean(weight * huber(error, delta), axis=-1), axis=-1) / delta


def scaled_log_policy(q: Array, temperature: Array | float) -> Array:
    """Log-probabilities of the Boltzmann policy, times its temperature.

    ``τ log π(·|s) = q − max q − τ log Σ_b exp((q_b − max q) / τ)``: finite for any temperature above 0.

    Source: Vieillard et al. 2020, "Munchausen Reinforcement Learning", appendix B.1,
    https://arxiv.org/abs/2007.14430.

    Args:
        q: floating ``[..., A]``; disallowed actions already masked.
        temperature: τ, in the unit of ``q``, above 0.

    Returns:
        ``[..., A]``, at most 0.

    Raises:
        AssertionError: ``q`` is not floating.
    """
    checks.floating(q=q)
    behind = q - jnp.max(q, axis=-1, keepdims=True)
    return behind - temperature * jax.nn.logsumexp(behind / temperature, axis=-1, keepdims=True)


def soft_value(q: Array, temperature: Array | float) -> Array:
    """Entropy-regularised value of the Boltzmann policy.

    ``Σ_a π(a|s) (q_a − τ log π(a|s)) = τ log Σ_a exp(q_a / τ)``; as τ goes to 0 it is ``max q``.

    Source: Haarnoja et al. 2017, "Reinforcement Learning with Deep Energy-Based Policies", equation 3,
    https://arxiv.org/abs/1702.08165.

    Args:
        q: floating ``[..., A]``; disallowed actions already masked.
        temperature: τ, in the unit of ``q``, above 0.

    Returns:
        ``[...]``.

    Raises:
        AssertionError: ``q`` is not floating.
    """
    checks.floating(q=q)
    best = jnp.max(q, axis=-1)
    return best + temperature * jax.nn.logsumexp((q - best[..., None]) / temperature, axis=-1)


def munchausen_bonus(
    q: Array, action: Array, temperature: Array | float, coef: Array | float, lowest: Array | float
) -> Array:
    """What Munchausen learning adds to the reward: the scaled log-probability of the action taken.

    ``α clip(τ log π(a|s), l₀, 0)``, π the Boltzmann policy of ``q``.

    Source: Vieillard et al. 2020, "Munchausen Reinforcement Learning", equation 3, https://arxiv.org/abs/2007.14430
    (τ 0.03, α 0.9, l₀ −1).

    Args:
        q: floating ``[..., A]``, of the state acted in, by the target network.
        action: integer ``[...]``, taken there.
        temperature: τ, in the unit of ``q``, above 0.
        coef: α, in [0, 1].
        lowest: l₀, below 0.

    Returns:
        ``[...]``, at most 0.

    Raises:
        AssertionError: ``q`` is not floating, ``action`` is not integer, or the shapes do not fit.
    """
    log_prob = select_action(scaled_log_policy(q, temperature), action)
    return coef * jnp.clip(log_prob, lowest, 0.0)
