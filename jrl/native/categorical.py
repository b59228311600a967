"""Distributions over fixed atoms (C51) in C++ kernels, for CPUs: mean, projected target, and loss.

XLA passes over an array once for each of a distribution's many steps, which takes more than half of an update of C51 on
a CPU; here a row goes through all of them while it is in the cache. Used with ``kernels="native"`` in a ``Config``;
compiled at first use (:mod:`jrl.native.build`). ``N`` transitions, ``A`` actions, ``K >= 2`` atoms; all
arrays float32 but actions; equal to :mod:`jrl.ops`'s functions to rounding, and under ``jax.vmap`` the same bits for
each member as alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jrl.native import build
from jrl.ops import value_distributions as ops

MEAN, TARGET, LOSS = (f"jrl_categorical_{what}" for what in ("mean", "target", "loss"))
"""Its kernels in :mod:`jrl.native.build`."""


@jax.custom_vjp
def mean(logits: jax.Array, support: jax.Array) -> jax.Array:
    """Return :func:`jrl.ops.categorical_mean` of ``logits [..., K]`` on the atoms ``support [K]``, ``[...]``.

    Differentiable in reverse mode, once.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    (result,) = build.call(MEAN, [rows.shape[:1]], rows, support)
    return result.reshape(logits.shape[:-1])


mean.defvjp(
    lambda logits, support: (mean(logits, support), (logits, support)),
    lambda residuals, grad: jax.vjp(ops.categorical_mean, *residuals)[1](grad),
)


def target(
    logits: jax.Array, q: jax.Array, reward: jax.Array, discount: jax.Array, support: jax.Array
) -> jax.Array:
    """Return the distribution of ``reward + discount z`` on the atoms ``support``, ``[N, K]``; no gradient passes.

    ``z`` is the return of the action that is best by ``q``: the projected Bellman update of C51, by
    :func:`jrl.ops.categorical_projection`.

    Source: Bellemare et al. 2017, algorithm 1, https://arxiv.org/abs/1707.06887.

    Args:
        logits: of the successors, ``[N, A, K]``.
        q: what chooses the action, ``[N, A]``; disallowed actions already masked.
        reward: ``[N]``.
        discount: 0 at a terminal state, ``[N]``.
        support: the atoms, ascending and evenly spaced, ``[K]``.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    args = jax.lax.stop_gradient((logits, q, reward, discount, support))
    shape = logits.shape[0], logits.shape[-1]
    return build.call(TARGET, [shape], *args)[0]


@jax.custom_vjp
def loss(logits: jax.Array, action: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of the action's distribution relative to ``target``, and their divergence, ``[N]`` both.

    ``−Σ_k target_k log softmax(logits_a)_k`` as :func:`jrl.ops.categorical_cross_entropy`, and that less the target's
    entropy. Differentiable in reverse mode, once, by the logits alone; no gradient comes from the divergence.

    Source: Bellemare et al. 2017, algorithm 1, https://arxiv.org/abs/1707.06887.

    Args:
        logits: ``[N, A, K]``.
        action: integer ``[N]``, in ``0 … A − 1``.
        target: probabilities, ``[N, K]``.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    cross_entropy, divergence, _ = _loss(logits, action, target)
    return cross_entropy, divergence


def _loss(logits: jax.Array, action: jax.Array, target: jax.Array) -> list[jax.Array]:
    outputs = [action.shape, action.shape, logits.shape]
    args = logits, action.astype(jnp.int32), target
    return build.call(LOSS, outputs, *args)


def _loss_forward(logits: jax.Array, action: jax.Array, target: jax.Array) -> tuple[tuple, tuple]:
    cross_entropy, divergence, slope = _loss(logits, action, target)
    return (cross_entropy, divergence), (slope, action, target)


def _loss_backward(residuals: tuple, grads: tuple[jax.Array, jax.Array]) -> tuple:
    slope, action, target = residuals
    none = np.zeros(action.shape, jax.dtypes.float0)
    return slope * grads[0][:, None, None], none, jnp.zeros_like(target)


loss.defvjp(_loss_forward, _loss_backward)


# -------------------------------------------------------------------------------------------------- in XLA


reference_mean = ops.categorical_mean


def reference_target(
    logits: jax.Array, q: jax.Array, reward: jax.Array, discount: jax.Array, support: jax.Array
) -> jax.Array:
    """Return what :func:`target` computes, in XLA."""
    best = jnp.take_along_axis(logits, jnp.argmax(q, axis=-1)[:, None, None], axis=1)[:, 0]
    value = reward[:, None] + discount[:, None] * support
    return ops.categorical_projection(value, ops.categorical_probability(best), support)


def reference_loss(
    logits: jax.Array, action: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what :func:`loss` computes and the first one's gradient by the logits, ``[N, A, K]``, in XLA."""

    def crossed(logits: jax.Array) -> jax.Array:
        taken = jnp.take_along_axis(logits, action[:, None, None], axis=1)[:, 0]
        return ops.categorical_cross_entropy(taken, target)

    cross_entropy, pull = jax.vjp(crossed, logits)
    entropy = -jax.scipy.special.xlogy(target, target).sum(-1)
    return cross_entropy, cross_entropy - entropy, pull(jnp.ones_like(cross_entropy))[0]
