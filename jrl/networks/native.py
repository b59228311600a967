"""A whole multilayer perceptron in one C++ kernel, for CPUs: where XLA's products of small matrices are slow.

XLA calls a library for each layer's product and writes what is between two layers to memory. Here a block of rows goes
through all layers while it is in the cache, in the vectors that this processor has. The source, ``native.cc``, is
compiled when it is first used (:mod:`jrl.networks.native_build`). Nothing uses it unless asked to: by
``kernels="native"`` in a ``Config``, or by calling :func:`mlp`.

Each device of the CPU computes its own calls on its own thread, so that two devices use two cores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.networks.fused import Layer, reference
from jrl.networks.native_build import load, target

ACTIVATIONS = ("tanh", "relu")
"""What it computes, by the number that the source has for it."""

NAMES = ("jrl_mlp_forward", "jrl_mlp_backward")
"""What XLA knows its calls as; the name of a build follows (:func:`jrl.networks.native_build.target`)."""

MOST_LAYERS = 8  # as the source has it


def check(sizes: Sequence[int], activation: str, *, layer_norm: bool = False) -> None:
    """Refuse a network that the kernel does not compute, by its layers' outputs; compile it and load it for another.

    Raises:
        ValueError: too few or too many layers, another activation, layer norm, or JAX computes on no CPU.
        RuntimeError: as :func:`jrl.networks.native_build.load`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r}: kernels='native' computes {' and '.join(ACTIVATIONS)}; use one of them or "
            "kernels='xla'."
        )
    if layer_norm:
        raise ValueError(
            "layer_norm=True: kernels='native' has no layer norm; use layer_norm=False or kernels='xla'."
        )
    if not 2 <= len(sizes) <= MOST_LAYERS:
        raise ValueError(
            f"{len(sizes)} layers: kernels='native' computes 2 to {MOST_LAYERS}, the last one included; use "
            "kernels='xla'."
        )
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"kernels='native' on {jax.default_backend()}: it is for CPUs; use kernels='xla', which has one for GPUs."
        )
    load()


def mlp(layers: Sequence[Layer], x: jax.Array, activation: str) -> jax.Array:
    """Return ``W_k act(… act(x W_1 + b_1) …) + b_k``: float32 ``[..., F] -> [..., K]``.

    Equal to the layers one by one, to rounding (tanh to 6 units in the last place, XLA's to 5), and the same bits for
    a row in whatever batch it is. Differentiable in reverse mode, once; under ``jax.vmap`` each member has its own
    weights.

    Args:
        layers: two to eight.
        x: float32 ``[..., F]``.
        activation: ``"tanh"`` or ``"relu"``.

    Raises:
        ValueError, RuntimeError: as :func:`check`.
        TypeError: a number that is not float32.
    """
    layers = tuple(Layer(*layer) for layer in layers)
    check([layer.bias.shape[-1] for layer in layers], activation)
    other = {str(leaf.dtype) for leaf in jax.tree.leaves((layers, x))} - {"float32"}
    if other:
        raise TypeError(
            f"native.mlp of {', '.join(sorted(other))}: it computes in float32; cast with astype."
        )
    y = _run(ACTIVATIONS.index(activation), layers, x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


# -------------------------------------------------------------------------------------------------- calls


def _call(
    name: str, activation: int, outputs: Sequence[tuple[int, ...]], *args: jax.Array
) -> list[jax.Array]:
    load()
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs]
    call: Any = jax.ffi.ffi_call(target(name), shapes, vmap_method="broadcast_all")
    return call(*args, activation=np.int64(activation))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(activation: int, layers: tuple[Layer, ...], x: jax.Array) -> jax.Array:
    """Return the output ``[N, K]`` of ``x [N, F]``."""
    outputs = [(x.shape[0], layers[-1].bias.shape[0])]
    return _call("forward", activation, outputs, x, *jax.tree.leaves(layers))[0]


def _run_forward(activation: int, layers: tuple[Layer, ...], x: jax.Array) -> tuple[jax.Array, tuple]:
    lanes = load().jrl_lanes()
    sizes = [layer.bias.shape[0] for layer in layers]
    outputs = [(x.shape[0], sizes[-1]), *((x.shape[0], -(-size // lanes) * lanes) for size in sizes[:-1])]
    y, *hidden = _call("forward", activation, outputs, x, *jax.tree.leaves(layers))
    return y, (layers, x, hidden)


def _run_backward(activation: int, residuals: tuple, grad: jax.Array) -> tuple[tuple[Layer, ...], jax.Array]:
    layers, x, hidden = residuals
    kernels = [layer.kernel for layer in layers]
    outputs = [leaf.shape for leaf in jax.tree.leaves(layers)]
    grads = _call("backward", activation, outputs, x, grad, *kernels, *hidden)
    # Of observations, seldom asked for: where it is not, nothing of this is compiled.
    _, pull = jax.vjp(lambda x: reference(ACTIVATIONS[activation], True, layers, x), x)
    return jax.tree.unflatten(jax.tree.structure(layers), grads), pull(grad)[0]


_run.defvjp(_run_forward, _run_backward)
