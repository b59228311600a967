"""Action distributions as records of arrays: pytrees that cross jit, vmap and grad.

Every record has any leading batch shape ``[...]`` and answers ``sample(key)``, ``log_prob(action)``,
``entropy()``, ``mode()`` and ``kl(other)`` with one number (or action) per batch entry, in nats.
Categorical ones compute in float32 or wider, whatever the network's dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.ops import checks, reductions
from jrl.ops.losses import select_action
from jrl.types import Array, Key

# Up to this many actions a chain of additions is compiled to one loop; beyond, a cumulative sum.
_MAX_CHAIN = 32
_QUADRATURE_NODES, _QUADRATURE_WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


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


class Normal(NamedTuple):
    """Diagonal normal over vectors.

    ``p(a) = Π_i exp(−½ ((a_i − mean_i) / σ_i)²) / (σ_i √(2π))``, ``σ = exp(log_std)``.

    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms",
    https://doi.org/10.1007/BF00992696.

    Attributes:
        mean: floating ``[..., D]``.
        log_std: floating ``[..., D]``, or ``[D]`` for one that does not depend on the state.
    """

    mean: Array
    log_std: Array

    def sample(self, key: Key) -> Array:
        """Draw a vector, differentiable in both parameters.

        ``mean + σ ε``, ``ε ~ N(0, 1)``.

        Source: Kingma and Welling 2014, https://arxiv.org/abs/1312.6114.

        Args:
            key: one key for the whole batch.

        Returns:
            ``[..., D]``.

        Raises:
            AssertionError: the mean is not floating.
        """
        checks.floating(mean=self.mean)
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self._log_std()) * noise

    def log_prob(self, action: Array) -> Array:
        """Log-density, summed over the last axis.

        ``−Σ_i (½ ((a_i − mean_i) / σ_i)² + log σ_i + ½ log 2π)``.

        Source: as the class.

        Args:
            action: floating ``[..., D]``.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: ``action`` has not the shape of the mean.
        """
        return jnp.sum(self._log_density(action), axis=-1)

    def entropy(self) -> Array:
        """Differential entropy in nats.

        ``Σ_i (log σ_i + ½ log 2πe)``.

        Source: Cover and Thomas 2006, "Elements of Information Theory", theorem 8.4.1,
        https://doi.org/10.1002/047174882X.

        Returns:
            ``[...]``.

        Raises:
            Nothing.
        """
        return jnp.sum(self._log_std() + 0.5 * math.log(2.0 * math.pi * math.e), axis=-1)

    def mode(self) -> Array:
        """Most probable vector.

        ``mean``.

        Source: notation only.

        Returns:
            ``[..., D]``.

        Raises:
            Nothing.
        """
        return self.mean

    def kl(self, other: Normal) -> Array:
        """Divergence from ``other`` in nats.

        ``Σ_i (log(σ_o / σ) + (σ² + (mean − mean_o)²) / (2 σ_o²) − ½)``.

        Source: Duchi 2007, "Derivations for Linear Algebra and Optimization",
        https://web.stanford.edu/~jduchi/projects/general_notes.pdf.

        Args:
            other: of the same shape.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: shapes differ.
        """
        checks.same_shape(mean=self.mean, other_mean=other.mean)
        log_ratio = self._log_std() - other._log_std()
        shift = (self.mean - other.mean) * jnp.exp(-other._log_std())
        # expm1: the two widths are usually close, and then the terms cancel.
        return jnp.sum(0.5 * (jnp.expm1(2.0 * log_ratio) + jnp.square(shift)) - log_ratio, axis=-1)

    def _log_std(self) -> Array:
        return jnp.broadcast_to(self.log_std, self.mean.shape)

    def _log_density(self, action: Array) -> Array:
        checks.same_shape(action=action, mean=self.mean)
        log_std = self._log_std()
        scaled = (action - self.mean) * jnp.exp(-log_std)
        return -0.5 * jnp.square(scaled) - log_std - 0.5 * math.log(2.0 * math.pi)


class TanhNormal(NamedTuple):
    """Diagonal normal squashed into a box.

    ``a = low + (high − low) (tanh(x) + 1) / 2``, ``x ~ N(mean, exp(log_std)²)``, and so
    ``log p(a) = log N(x) − Σ_i (log(1 − tanh²(x_i)) + log((high_i − low_i) / 2))``.

    Source: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", appendix C,
    https://arxiv.org/abs/1812.05905.

    Attributes:
        mean: floating ``[..., D]``, before the squashing.
        log_std: floating ``[..., D]`` or ``[D]``, before the squashing.
        low: ``[D]`` or a number, finite.
        high: ``[D]`` or a number, finite and above ``low``.
    """

    mean: Array
    log_std: Array
    low: Array | float
    high: Array | float

    def sample(self, key: Key) -> Array:
        """Draw a vector, differentiable in both parameters.

        ``squash(mean + σ ε)``, ``ε ~ N(0, 1)``.

        Source: as the class.

        Args:
            key: one key for the whole batch.

        Returns:
            ``[..., D]`` in the box, its faces included (by rounding).

        Raises:
            AssertionError: the mean is not floating.
        """
        return self._squash(self._normal().sample(key))

    def sample_and_log_prob(self, key: Key) -> tuple[Array, Array]:
        """Draw a vector together with its log-density, which then needs no inverse and no clipping.

        ``a = squash(x)``, ``log p(a)`` from ``x``.

        Source: as the class.

        Args:
            key: one key for the whole batch; the same draw as :meth:`sample`.

        Returns:
            The action ``[..., D]`` and its log-density ``[...]``.

        Raises:
            AssertionError: the mean is not floating.
        """
        x = self._normal().sample(key)
        return self._squash(x), self._log_prob_of(x)

    def log_prob(self, action: Array) -> Array:
        """Log-density of an action in the box.

        ``log p(a)`` with ``x = atanh(2 (a − low) / (high − low) − 1)``.

        Source: as the class.

        Args:
            action: floating ``[..., D]``. Within a few roundings of a face ``x`` is no longer determined, and
                the action is taken to lie slightly inside: prefer :meth:`sample_and_log_prob` where possible.

        Returns:
            ``[...]``.

        Raises:
            AssertionError: ``action`` has not the shape of the mean.
        """
        checks.same_shape(action=action, mean=self.mean)
        low, high = self._box()
        inside = 1.0 - 4.0 * jnp.finfo(self.mean.dtype).eps
        unit = jnp.clip(2.0 * (action - low) / (high - low) - 1.0, -inside, inside)
        return self._log_prob_of(jnp.arctanh(unit))

    def entropy(self) -> Array:
        """Differential entropy in nats, by quadrature: there is no closed form.

        ``H(N) + Σ_i (log((high_i − low_i) / 2) + E[log(1 − tanh²(x_i))])``, the expectation by the 32-point
        Gauss–Hermite rule. No random numbers; within 0.0002 nats per dimension for σ up to 2, 0.003 at
        3 and 0.03 at 5.

        Source: Golub and Welsch 1969, "Calculation of Gauss Quadrature Rules",
        https://doi.org/10.1090/S0025-5718-69-99647-1.

        Returns:
            ``[...]``, differentiable.

        Raises:
            Nothing.
        """
        dtype = self.mean.dtype
        nodes = jnp.asarray(_QUADRATURE_NODES, dtype)
        weights = jnp.asarray(_QUADRATURE_WEIGHTS / _QUADRATURE_WEIGHTS.sum(), dtype)
        spread = jnp.exp(self._normal()._log_std())
        x = self.mean[..., None] + jnp.tensordot(spread, nodes, axes=0)
        log_slope = jnp.tensordot(_log_slope(x), weights, axes=1)
        return self._normal().entropy() + jnp.sum(log_slope + self._log_scale(), axis=-1)

    def mode(self) -> Array:
        """Image of the normal's mean: the median of each coordinate, and what greedy evaluation plays.

        ``squash(mean)``. The density's own maximum has no closed form, and lies on a face where σ is large.

        Source: as the class.

        Returns:
            ``[..., D]``.

        Raises:
            Nothing.
        """
        return self._squash(self.mean)

    def kl(self, other: TanhNormal) -> Array:
        """Divergence from ``other`` in nats; squashing both the same way does not change it.

        ``KL(N ‖ N_other)``.

        Source: as :meth:`Normal.kl`.

        Args:
            other: of the same shape, *in the same box* (not checked: the bounds may be traced).

        Returns:
            ``[...]``.

        Raises:
            AssertionError: shapes differ.
        """
        return self._normal().kl(other._normal())

    def _normal(self) -> Normal:
        return Normal(self.mean, self.log_std)

    def _box(self) -> tuple[Array, Array]:
        bounds = (jnp.asarray(bound, self.mean.dtype) for bound in (self.low, self.high))
        low, high = (jnp.broadcast_to(bound, self.mean.shape) for bound in bounds)
        return low, high

    def _squash(self, x: Array) -> Array:
        low, high = self._box()
        # The sum can round to just above high.
        return jnp.minimum(low + (high - low) * (0.5 * jnp.tanh(x) + 0.5), high)

    def _log_scale(self) -> Array:
        low, high = self._box()
        return jnp.log(0.5 * (high - low))

    def _log_prob_of(self, x: Array) -> Array:
        return jnp.sum(self._normal()._log_density(x) - _log_slope(x) - self._log_scale(), axis=-1)


def _log_slope(x: Array) -> Array:
    """``log(1 − tanh²(x))``, which computed as written is −inf from |x| = 9 on."""
    return 2.0 * (math.log(2.0) - x - jax.nn.softplus(-2.0 * x))


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
