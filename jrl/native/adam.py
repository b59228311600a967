"""A step of Adam in one C++ kernel, for CPUs: XLA makes a dozen passes over the parameters for one.

Used by :func:`jrl.optim.adam` with ``kernels="native"``; compiled at first use (:mod:`jrl.native.build`). All arrays
float32; equal to optax's to rounding, and under ``jax.vmap`` the same bits for each member as alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.native import build

NORM, UPDATE = "jrl_adam_norm", "jrl_adam_update"
"""Its kernels in :mod:`jrl.native.build`."""


class Numbers(NamedTuple):
    """What a step depends on beside the gradient and its moments, float32 ``[]`` each; may be traced.

    Attributes:
        norm: of the gradient.
        max_norm: to which it is scaled down.
        learning_rate: step size.
        first: ``1 − b₁^t``, by which the first moment is divided, ``t`` counting from 1.
        second: ``1 − b₂^t``.
    """

    norm: jax.Array | float
    max_norm: jax.Array | float
    learning_rate: jax.Array | float
    first: jax.Array
    second: jax.Array


def norm(grads: Sequence[jax.Array]) -> jax.Array:
    """Return the L2 norm over all arrays, ``[]``.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    return build.call(NORM, [()], *grads)[0]


def update(
    grads: Sequence[jax.Array],
    first: jax.Array,
    second: jax.Array,
    numbers: Numbers,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return what is to be added to the parameters, and both moments.

    ``g' = g min(1, max_norm / norm)``, ``m = b₁ m + (1 − b₁) g'``, ``v = b₂ v + (1 − b₂) g'²``, and of these
    ``−learning_rate (m / (1 − b₁^t)) / (√(v / (1 − b₂^t)) + ε)``.

    Source: Kingma and Ba, 2015, algorithm 1, https://arxiv.org/abs/1412.6980.

    Args:
        grads: of any shapes, ``P`` numbers in all.
        first: m, ``[P]``, in the order of ``grads``.
        second: v, ``[P]``.
        numbers: of this step.
        b1: b₁.
        b2: b₂.
        eps: ε.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    shapes = [first.shape, second.shape, *(grad.shape for grad in grads)]
    rates = {"b1": np.float64(b1), "b2": np.float64(b2), "eps": np.float64(eps)}
    args = first, second, *(jnp.float32(number) for number in numbers), *grads
    places = {0: 0, 1: 1} | {len(args) - len(grads) + i: 2 + i for i in range(len(grads))}
    first, second, *updates = build.call(UPDATE, shapes, *args, aliases=places, attributes=rates)
    return updates, first, second


# -------------------------------------------------------------------------------------------------- in XLA


def reference_norm(*grads: jax.Array) -> jax.Array:
    """Return what :func:`norm` computes, in XLA."""
    return jnp.sqrt(sum(jnp.sum(grad**2) for grad in grads))


def reference_update(first: jax.Array, second: jax.Array, *rest: jax.Array) -> tuple[jax.Array, ...]:
    """Return the moments and updates that :func:`update` computes, in XLA, with its default rates."""
    numbers, grads = Numbers(*rest[:5]), rest[5:]
    grad = jnp.concatenate([grad.ravel() for grad in grads])
    grad *= jnp.minimum(1.0, numbers.max_norm / numbers.norm)
    first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
    step = -numbers.learning_rate * (first / numbers.first) / (jnp.sqrt(second / numbers.second) + 1e-5)
    return first, second, step
