"""The optimiser, rebuilt inside the trace from numbers that may be traced and swept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jrl.native import adam as native
from jrl.native import build
from jrl.ops.schedules import linear_schedule
from jrl.types import PyTree

# Parameters up to which the optimiser works on one vector; beyond it the copies of a large model's gradient cost more
# than what is saved.
FLAT_UP_TO = 2**20

B1, B2 = 0.9, 0.999  # Adam's, as everyone has them


def adam(
    learning_rate: jax.Array | float,
    *,
    max_grad_norm: jax.Array | float | None,
    eps: float = 1e-5,
    kernels: str = "xla",
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980) on gradients clipped by their global norm.

    The optimiser's state does not depend on the numbers, so they may change at every step: a step is
    ``adam(schedule(t), …).update(grads, opt_state)``.

    Small networks' gradients are joined to one vector, in the state too: a few operations in place of a few for every
    leaf, to compile and to launch.

    Args:
        learning_rate: step size, may be traced.
        max_grad_norm: the gradient is scaled down to this L2 norm over *all* its leaves, may be traced; None: never.
        eps: Adam's ε; 1e-5 is what PPO's reference implementations use.
        kernels: ``"xla"``, or ``"native"``: a small network's step is one C++ kernel's, on a CPU
            (:mod:`jrl.native.adam`).

    Raises:
        ValueError: other ``kernels``; native ones where JAX computes on no CPU.
        RuntimeError: native ones without a C++ compiler.
    """
    _check(kernels)
    inner = optax.chain(
        optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(B1, B2, eps),
        optax.scale_by_learning_rate(learning_rate),
    )
    flat = optax.flatten(inner)

    def init(params: PyTree) -> PyTree:
        return (flat if _is_small(params) else inner).init(params)

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        if kernels == "native" and _is_small(grads):
            return native_update(grads, state)
        return (flat if _is_small(grads) else inner).update(grads, state, params)

    def native_update(grads: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        clipping, moments, scaling = state  # as optax.chain has them
        count = optax.safe_increment(moments.count)
        numbers = native.Numbers(
            norm=0.0 if max_grad_norm is None else global_norm(grads, kernels),
            max_norm=jnp.inf if max_grad_norm is None else max_grad_norm,
            learning_rate=learning_rate,
            first=1 - B1**count,
            second=1 - B2**count,
        )
        leaves, structure = jax.tree.flatten(grads)
        updates, mu, nu = native.update(leaves, moments.mu, moments.nu, numbers, b1=B1, b2=B2, eps=eps)
        moments = moments._replace(count=count, mu=mu, nu=nu)
        return jax.tree.unflatten(structure, updates), (clipping, moments, scaling)

    return optax.GradientTransformation(init, update)


def mean_over(f: Callable[[PyTree], PyTree], parts: PyTree) -> PyTree:
    """Return the mean of ``f`` over the leading axis of ``parts``, one part after the other: of a gradient, say.

    What ``f`` needs while it computes, it needs for one part at a time.
    """
    num, first = len(jax.tree.leaves(parts)[0]), jax.tree.map(lambda leaf: leaf[0], parts)
    if num == 1:
        return f(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(f, first))

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, f(part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / num, total)


def global_norm(tree: PyTree, kernels: str = "xla") -> jax.Array:
    """Return the L2 norm over all leaves, float32 ``[]``; of small trees as one vector, which :func:`adam` shares."""
    if kernels == "native" and _is_small(tree):
        return native.norm(jax.tree.leaves(tree))
    return optax.global_norm(ravel_pytree(tree)[0] if _is_small(tree) else tree)


def _is_small(tree: PyTree) -> bool:
    leaves = jax.tree.leaves(tree)
    same = len(leaves) > 1 and all(leaf.dtype == jnp.float32 for leaf in leaves)
    return same and sum(leaf.size for leaf in leaves) <= FLAT_UP_TO


Optimizer = Callable[[Any, jax.Array], optax.GradientTransformation]
"""``(hparams, learning_rate) -> optax transformation``; its state must not depend on either."""


def default_optimizer(hparams: Any, learning_rate: jax.Array | float) -> optax.GradientTransformation:
    """Return :func:`adam` with ``hparams.max_grad_norm``; what ``make(optimizer=…)`` takes."""
    return adam(learning_rate, max_grad_norm=hparams.max_grad_norm)


def by_kernels(optimizer: Optimizer, kernels: str) -> Optimizer:
    """Return ``optimizer``, or the default one computed by ``kernels`` where it is that.

    Raises:
        TypeError: ``optimizer`` is no function, such as an optax transformation that is made already.
        ValueError, RuntimeError: as :func:`adam`.
    """
    if not callable(optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}: each step makes it anew, from numbers that may be traced; "
            "give a function, as in optimizer=lambda hparams, learning_rate: optax.adam(learning_rate)."
        )
    _check(kernels)
    if optimizer is not default_optimizer or kernels == "xla":
        return optimizer
    return lambda hparams, learning_rate: adam(
        learning_rate, max_grad_norm=hparams.max_grad_norm, kernels=kernels
    )


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


def _check(kernels: str) -> None:
    build.check(kernels)
    if kernels == "native":
        build.require()
