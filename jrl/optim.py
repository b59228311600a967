"""The optimiser, rebuilt inside the trace from numbers that may be traced and swept."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jrl.ops.schedules import linear_schedule


def adam(
    learning_rate: jax.Array | float, *, max_grad_norm: jax.Array | float, eps: float = 1e-5
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980) on gradients clipped by their global norm.

    The optimiser's state does not depend on the numbers, so they may change at every step: a step is
    ``adam(schedule(t), …).update(grads, opt_state)``.

    Args:
        learning_rate: step size, may be traced.
        max_grad_norm: the gradient is scaled down to this L2 norm over *all* its leaves, may be traced.
        eps: Adam's ε; 1e-5 is what PPO's reference implementations use.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(eps=eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def default_optimizer(hparams: Any, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    """Return :func:`adam` with ``hparams.max_grad_norm``; what ``make(optimizer=…)`` takes."""
    return adam(learning_rate, max_grad_norm=hparams.max_grad_norm)


def annealed_learning_rate(hparams: Any, env_steps: jax.Array) -> jax.Array:
    """Return the learning rate at ``env_steps`` (float32 ``[]``).

    Linear from ``hparams.learning_rate`` to ``hparams.learning_rate_end`` over ``hparams.anneal_env_steps``
    environment steps; constant where that is 0.
    """
    return linear_schedule(
        env_steps,
        start=hparams.learning_rate,
        end=hparams.learning_rate_end,
        begin=0.0,
        duration=hparams.anneal_env_steps,
    )
