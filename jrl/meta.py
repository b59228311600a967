"""Model-agnostic meta-learning (MAML: Finn et al., 2017, https://arxiv.org/abs/1703.03400), as plain functions.

Parameters from which a few gradient steps on a new task go far: ``min_θ E_task L_test(θ_K)`` with
``θ_{k+1} = θ_k − α ∇L_train(θ_k)``. The outer gradient is ``jax.grad`` through the inner loop, which is a scan and
vmapped over tasks; the first-order form treats the inner gradients as constants. Any loss will do:
:mod:`jrl.algos.maml` is the policy gradient's.

Sinusoids, say, with ``tasks`` of leaves ``[M, ...]``::

    objective = functools.partial(meta.objective, loss, loss, learning_rate=0.01, num_steps=1)
    params, _ = stages.fit(key, objective, params, tasks, num_steps=70_000, batch_size=25)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.types import Array, Params, PyTree


def adapt(
    loss: Callable[[Params, PyTree], Any],
    params: Params,
    data: PyTree,
    learning_rate: Array | float,
    *,
    first_order: bool = False,
    has_aux: bool = False,
) -> tuple[Params, Any]:
    """Take ``K`` steps of gradient descent, ``θ_{k+1} = θ_k − α ∇_θ loss(θ_k, data_k)``.

    Differentiable in ``params`` and ``learning_rate``, and in what ``loss`` closes over.

    Args:
        loss: ``(params, data_k) -> scalar``, or with ``has_aux`` ``(scalar, aux)``.
        params: θ_0.
        data: leaves ``[K, ...]``, what each step sees: batches, or keys to draw them with.
        learning_rate: α.
        first_order: take the inner gradients for constants, so that ``dθ_K/dθ_0`` is the identity (FOMAML).
        has_aux: whether ``loss`` returns something beside its value.

    Returns:
        θ_K, and what ``loss`` returned before each step, leaves ``[K, ...]``.
    """

    def step(params: Params, data: PyTree) -> tuple[Params, Any]:
        found, grads = jax.value_and_grad(loss, has_aux=has_aux)(params, data)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        return jax.tree.map(lambda param, grad: param - learning_rate * grad, params, grads), found

    return jax.lax.scan(step, params, data)


def objective(
    train_loss: Callable[[Params, PyTree], Array],
    test_loss: Callable[[Params, PyTree], Array],
    params: Params,
    tasks: tuple[PyTree, PyTree],
    *,
    learning_rate: Array | float,
    num_steps: int,
    first_order: bool = False,
) -> Array:
    """Return the mean over tasks of the test loss after ``num_steps`` steps on all of each task's training data.

    ``1/N Σ_i L_test(θ_K; test_i)``, ``θ_{k+1} = θ_k − α ∇L_train(θ_k; train_i)``.

    Args:
        train_loss: ``(params, train) -> scalar``, of one task.
        test_loss: ``(params, test) -> scalar``, of one task.
        params: θ_0, which all tasks share.
        tasks: ``(train, test)``, leaves ``[N, ...]``.
        learning_rate: α.
        num_steps: K, static; 0 is the loss of one set of parameters for all tasks (pretraining).
        first_order: see :func:`adapt`.
    """

    def one(task: tuple[PyTree, PyTree]) -> Array:
        train, test = task
        steps = jnp.arange(num_steps)
        adapted, _ = adapt(
            lambda params, _: train_loss(params, train), params, steps, learning_rate, first_order=first_order
        )
        return test_loss(adapted, test)

    return jax.vmap(one)(tasks).mean()
