"""Distributions over discrete actions, as records of arrays: pytrees that cross jit, vmap and grad.

Every record has any leading batch shape ``[...]`` and answers ``sample(key)``, ``log_prob(action)``,
``entropy()``, ``mode()`` and ``kl(other)`` with one number (or action) per batch entry, in nats.
Categorical ones compute in float32 or wider, whatever the network's dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.ops import checks, reductions
from jrl.ops.losses import select_action
from jrl.types import Array, Key

# Up to this many actions a chain of additions is compiled to one loop; beyond, a cumulative sum.
_MAX_CHAIN = 32


def masked(logits: Array, mask: Array) -> Array:
    """Disallow actions.

    ``logits`` where ``mask``, else the lowest finite number of the dtype: the probability is exactly 0, while
    log-probabilities, entropies, divergences and gradients stay finite (−inf would make them nan).

    Source: Huang and Ontañón 2022, "A Closer Look at Invalid Action Masking in Policy Gradient Algorithms",
    https://arxiv.org/abs/2006.14171.

    Args:
        logits: floating ``[..., A]``; action values serve too.
        mask: bool ``[..., A]``, True = allowed.

    Returns:
        ``[..., A]``. A row that allows nothing becomes constant: uniform over all actions, without gradient.

    Raises:
        AssertionError: shapes differ, ``logits`` is not floating or ``mask`` is not bool.
    """
    checks.floating(logits=logits)
    checks.flags(mask=mask)
    checks.same_shape(logits=logits, mask=mask)
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


class Categorical(NamedTuple):
    """One choice among ``A``.

    ``p(a) = exp(logits_a) / Σ_b exp(logits_b)``.

    Source: Bridle 1990, "Probabilistic Interpretation of Feedforward Classification Network Outputs",
    https://doi.org/10.1007/978-3-642-76153-9_28.

    Attributes:
        logits: floating ``[..., A]``, not necessarily normalised; disallow actions with :func:`masked`.
    """

    logits: Array

    def sample(self, key: Key) -> Array:
        """Draw by inverting the distribution function; an action of probability 0 is never drawn.

        ``a = min {a : Σ_{b ≤ a} p(b) > u}``, ``u`` uniform in [0, 1).

        Source: Devroye 1986, "Non-Uniform Random Variate Generation", section III.2,
        http://luc.devroye.org/rnbookindex.html.

        Args:
            key: one key for the whole batch, which costs one uniform number per row (with a resolution of
                2^-23 in float32: rarer actions are drawn as often as rounding allows).

        Returns:
            int32 ``[...]``.

        Raises:
            AssertionError: the logits are not floating.
        """
        weight = _weights(self.logits)
        return inverse_cdf(weight, jax.random.uniform(key, weight.shape[:-1], weight.dtype))

    def log_prob(self, action: Array) -> Array:
        """Log-probability of an action.

        ``log p(a)``.

        Source: as the class.

        Args:
            action: integer ``[...]``.

        Returns:
            ``[...]``; a masked action has the lowest finite number.

        Raises:
            AssertionError: ``action`` is not integer or has not the batch shape.
        """
        centred = _centred(self.logits)
        return select_action(centred, action) - jnp.log(reductions.total(jnp.exp(centred)))

    def entropy(self) -> Array:
        """Entropy in nats.

        ``−Σ_a p(a) log p(a)``.

        Source: Shannon 1948, https://doi.org/10.1002/j.1538-7305.1948.tb01338.x.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: the logits are not floating.
        """
        log_p, possible = _log_probs(self.logits)
        # A masked entry must not meet a product, forwards or backwards: its logarithm is near −max.
        log_p = jnp.where(possible, log_p, 0.0)
        return -reductions.total(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0))

    def mode(self) -> Array:
        """Most probable action, the first among equals.

        ``argmax_a p(a)``.

        Source: notation only.

        Returns:
            int32 ``[...]``.

        Raises:
            Nothing.
        """
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def kl(self, other: Categorical) -> Array:
        """Divergence from ``other`` in nats.

        ``Σ_a p(a) (log p(a) − log p_other(a))``.

        Source: Kullback and Leibler 1951, https://doi.org/10.1214/aoms/1177729694.

        Args:
            other: of the same shape.

        Returns:
            ``[...]``; huge but finite where ``other`` masks an action that this one allows.

        Raises:
            AssertionError: shapes differ.
        """
        checks.same_shape(logits=self.logits, other_logits=other.logits)
        log_p, possible = _log_probs(self.logits)
        gap = jnp.where(possible, log_p - _log_probs(other.logits)[0], 0.0)
        return reductions.total(jnp.exp(jnp.where(possible, log_p, -jnp.inf)) * gap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiCategorical:
    """Several independent choices at once, the policy of a ``MultiDiscrete(ns)`` space.

    ``p(a) = Π_i p_i(a_i)``, each factor a :class:`Categorical` over ``ns[i]`` actions.

    Source: Tavakoli et al. 2018, "Action Branching Architectures", https://arxiv.org/abs/1711.08946.

    Attributes:
        logits: floating ``[..., sum(ns)]``, the factors one after the other; :func:`masked` applies, but each
            factor should allow at least one action.
        ns: sizes of the factors, static.
    """

    logits: Array
    ns: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def sample(self, key: Key) -> Array:
        """Draw every factor, with one uniform number for each; an action of probability 0 is never drawn.

        ``a_i ~ p_i``.

        Source: as :meth:`Categorical.sample`.

        Args:
            key: one key for the whole batch.

        Returns:
            int32 ``[..., len(ns)]``.

        Raises:
            AssertionError: the last axis of the logits is not ``sum(ns)``.
        """
        return self._factors().sample(key)

    def log_prob(self, action: Array) -> Array:
        """Log-probability of a vector of actions.

        ``Σ_i log p_i(a_i)``.

        Source: as the class.

        Args:
            action: integer ``[..., len(ns)]``.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: ``action`` is not integer or has not this shape.
        """
        return jnp.sum(self._factors().log_prob(action), axis=-1)

    def entropy(self) -> Array:
        """Entropy in nats.

        ``Σ_i H(p_i)``.

        Source: as :meth:`Categorical.entropy`.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: the last axis of the logits is not ``sum(ns)``.
        """
        return jnp.sum(self._factors().entropy(), axis=-1)

    def mode(self) -> Array:
        """Most probable vector of actions.

        ``argmax_a p(a)``.

        Source: notation only.

        Returns:
            int32 ``[..., len(ns)]``.

        Raises:
            AssertionError: the last axis of the logits is not ``sum(ns)``.
        """
        return self._factors().mode()

    def kl(self, other: MultiCategorical) -> Array:
        """Divergence from ``other`` in nats.

        ``Σ_i KL(p_i ‖ p_other,i)``.

        Source: as :meth:`Categorical.kl`.

        Args:
            other: of the same shape and sizes.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: shapes differ.
        """
        return jnp.sum(self._factors().kl(other._factors()), axis=-1)

    def _factors(self) -> Categorical:
        """One categorical with a batch axis over the factors, the shorter ones padded with masked actions."""
        widest, batch = max(self.ns), self.logits.shape[:-1]
        checks.shape(logits=(self.logits, (*batch, sum(self.ns))))
        if min(self.ns) == widest:
            return Categorical(self.logits.reshape(*batch, len(self.ns), widest))
        parts = jnp.split(self.logits, list(itertools.accumulate(self.ns))[:-1], axis=-1)
        room = [[(0, 0)] * len(batch) + [(0, widest - n)] for n in self.ns]
        # −inf, not the masks' lowest finite number: padding stays impossible where a factor is all masked.
        padded = [jnp.pad(p, w, constant_values=-jnp.inf) for p, w in zip(parts, room, strict=True)]
        return Categorical(jnp.stack(padded, axis=-2))


def _centred(logits: Array) -> Array:
    checks.floating(logits=logits)
    # In half precision the masks' lowest number is so small that a shift makes it −inf.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits - jax.lax.stop_gradient(reductions.largest(logits))[..., None]


def _weights(logits: Array) -> Array:
    return jnp.exp(_centred(logits))


def _log_probs(logits: Array) -> tuple[Array, Array]:
    """Log-probabilities, and where they are of positive probability."""
    centred = _centred(logits)
    weight = jnp.exp(centred)
    return centred - jnp.log(reductions.total(weight))[..., None], weight > 0.0


def inverse_cdf(weight: Array, uniform: Array) -> Array:
    """Invert a discrete distribution function; an entry of weight 0 is never returned.

    ``min {a : Σ_{b ≤ a} w_b > u Σ_b w_b}``.

    Source: Devroye 1986, "Non-Uniform Random Variate Generation", section III.2,
    http://luc.devroye.org/rnbookindex.html.

    Args:
        weight: floating ``[..., A]``, at least 0, not necessarily normalised, not all 0.
        uniform: ``[...]``, in [0, 1): then its product with the whole is at least one rounding below the whole,
            so that there always is an entry.

    Returns:
        int32 ``[...]``.

    Raises:
        AssertionError: ``weight`` is not floating or ``uniform`` has not its batch shape.
    """
    checks.floating(weight=weight)
    checks.shape(uniform=(uniform, weight.shape[:-1]))
    if weight.shape[-1] <= _MAX_CHAIN:
        # Added from left to right, the sums never decrease and stay equal over a zero weight.
        chain = list(itertools.accumulate(weight[..., i] for i in range(weight.shape[-1])))
        below = [(total <= uniform * chain[-1]).astype(jnp.int32) for total in chain]
        return functools.reduce(jnp.add, below)
    # Here the order of additions is the compiler's, and a sum may grow by rounding over a zero weight.
    partial = jnp.where(weight > 0.0, jnp.cumsum(weight, axis=-1), 0.0)
    threshold = uniform * jnp.max(partial, axis=-1)
    return jnp.argmax(partial > threshold[..., None], axis=-1).astype(jnp.int32)
