"""Distributions over continuous actions, as records of arrays; what they answer is that of
:mod:`jrl.ops.distributions`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.ops import checks
from jrl.types import Array, Key

_QUADRATURE_NODES, _QUADRATURE_WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


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
