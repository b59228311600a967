"""The factors of a noisy network's noise in one C++ kernel, for CPUs; compiled at first use.

XLA draws random bits on a CPU by a loop of many small steps, which takes longer than its numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jrl.native import build
from jrl.types import Array, Key

FACTORS = "jrl_noise_factors"
"""Its kernels in :mod:`jrl.native.build`."""


def factors(key: Key, shape: tuple[int, ...]) -> Array:
    """Return ``f(ε)``, ``f(x) = sign(x) √|x|``, of the ``ε`` of :func:`jax.random.normal`, to rounding; float32.

    Source: Fortunato et al. 2018, section 3.1, https://arxiv.org/abs/1706.10295.

    Args:
        key: for which :func:`jrl.native.threefry.draws` is True.
        shape: of fewer than 2^32 numbers.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    return build.call(FACTORS, [shape], jax.random.key_data(key))[0]


def reference(key: Key, shape: tuple[int, ...]) -> Array:
    """Return what :func:`factors` does, in XLA."""
    noise = jax.random.normal(key, shape, jnp.float32)
    # sign(x) sqrt(|x|), by a division: XLA computes it once, where it would repeat what is cheaper for every weight.
    # Not by the root itself, which would become a product with its inverse.
    return noise / jnp.maximum(jnp.sqrt(jnp.abs(noise)), jnp.finfo(noise.dtype).tiny)
