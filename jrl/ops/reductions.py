"""Reductions over a short last axis, as actions are: written out where a reduction would be a kernel of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jrl.types import Array

MAX_UNROLLED = 8  # entries
UNROLLED_ON = "gpu"  # on a CPU a reduction is fused like all else


def total(x: Array) -> Array:
    """Return the sum over the last axis, ``[..., A] -> [...]``, in the dtype of ``x``."""
    if _is_short(x):
        return functools.reduce(jnp.add, jnp.unstack(x, axis=-1))
    return jnp.sum(x, axis=-1, dtype=x.dtype)


def largest(x: Array) -> Array:
    """Return the maximum over the last axis, ``[..., A] -> [...]``."""
    if _is_short(x):
        return functools.reduce(jnp.maximum, jnp.unstack(x, axis=-1))
    return jnp.max(x, axis=-1)


def _is_short(x: Array) -> bool:
    return x.shape[-1] <= MAX_UNROLLED and jax.default_backend() == UNROLLED_ON
