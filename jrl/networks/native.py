"""A whole multilayer perceptron in one C++ kernel, for CPUs: where XLA's products of small matrices are slow.

XLA calls a library for each layer's product and writes what is between two layers to memory. Here a block of rows goes
through all layers while it is in the cache, in the vectors that this processor has. Nothing uses it unless asked to: by
``kernels="native"`` in a ``Config``, or by calling :func:`mlp`. The source, ``jrl/native/mlp.cc``, is compiled when it
is first used (:mod:`jrl.native.build`).

Each device of the CPU computes its own calls on its own thread, so that two devices use two cores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jrl.native import build
from jrl.networks.fused import Layer
from jrl.networks.mlp import ACTIVATIONS as FUNCTIONS
from jrl.types import PyTree

ACTIVATIONS = ("tanh", "relu")
"""What it computes, by the number that the source has for it."""

FORWARD, BACKWARD = NAMES = "jrl_mlp_forward", "jrl_mlp_backward"
"""Its kernels in :mod:`jrl.native.build`."""

MOST_LAYERS = 8  # as the source has it


class Norm(NamedTuple):
    """Layer norm before an activation: ``scale (z − mean(z)) / √(var(z) + 1e-6) + bias``, float32 ``[K]`` both.

    Source: Ba et al., 2016, https://arxiv.org/abs/1607.06450; ε is flax's.
    """

    scale: jax.Array
    bias: jax.Array


def check(sizes: Sequence[int], activation: str) -> None:
    """Refuse a network that the kernel does not compute, by its layers' outputs; compile it and load it for another.

    Raises:
        ValueError: too few or too many layers, another activation, or JAX computes on no CPU.
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r}: kernels='native' computes {' and '.join(ACTIVATIONS)}; use one of them or "
            "kernels='xla'."
        )
    if not 2 <= len(sizes) <= MOST_LAYERS:
        raise ValueError(
            f"{len(sizes)} layers: kernels='native' computes 2 to {MOST_LAYERS}, the last one included; use "
            "kernels='xla'."
        )
    build.require()


def mlp(layers: Sequence[Layer], x: jax.Array, activation: str, norms: Sequence[Norm] = ()) -> jax.Array:
    """Return ``W_k act(… act(x W_1 + b_1) …) + b_k``: float32 ``[..., F] -> [..., K]``.

    Equal to the layers one by one, to rounding (tanh to 6 units in the last place, XLA's to 5), and the same bits
    for a row in whatever batch it is. Differentiable in reverse mode, once, by one call for whatever is asked of:
    the parameters, ``x``, or both; under ``jax.vmap`` each member has its own weights. A wide ``x`` that is nearly
    all zeros, as boards and one-hot vectors are, takes a fraction of the time.

    Args:
        layers: two to eight.
        x: float32 ``[..., F]``.
        activation: ``"tanh"`` or ``"relu"``.
        norms: layer norm before each activation, one for each layer but the last; or none.

    Raises:
        ValueError, RuntimeError: as :func:`check`; another number of norms.
        TypeError: a number that is not float32.
    """
    layers, norms = tuple(Layer(*layer) for layer in layers), tuple(Norm(*norm) for norm in norms)
    check([layer.bias.shape[-1] for layer in layers], activation)
    if norms and len(norms) != len(layers) - 1:
        raise ValueError(
            f"{len(norms)} norms of {len(layers)} layers: give one for each layer but the last, or none."
        )
    other = {str(leaf.dtype) for leaf in jax.tree.leaves((layers, norms, x))} - {"float32"}
    if other:
        raise TypeError(
            f"native.mlp of {', '.join(sorted(other))}: it computes in float32; cast with astype."
        )
    y = _run(activation, layers, norms, x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def reference(activation: str, layers: Sequence[Layer], norms: Sequence[Norm], x: jax.Array) -> jax.Array:
    """Return what :func:`mlp` computes, layer by layer, in XLA."""
    for i, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        if i + 1 == len(layers):
            break
        if norms:
            x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norms[i].scale + norms[i].bias
        x = FUNCTIONS[activation](x)
    return x


# -------------------------------------------------------------------------------------------------- calls


def _call(
    name: str,
    activation: str,
    norms: Sequence[Norm],
    outputs: Sequence[tuple[int, ...]],
    *args: jax.Array,
    **attributes: bool,
) -> list[jax.Array]:
    numbers = {"activation": ACTIVATIONS.index(activation), "norm": bool(norms), **attributes}
    return build.call(
        name, outputs, *args, attributes={name: np.int64(value) for name, value in numbers.items()}
    )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a gradient is asked of."""

    parameters: bool
    input: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(activation: str, layers: tuple[Layer, ...], norms: tuple[Norm, ...], x: jax.Array) -> jax.Array:
    """Return the output ``[N, K]`` of ``x [N, F]``."""
    outputs = [(x.shape[0], layers[-1].bias.shape[0])]
    return _call(FORWARD, activation, norms, outputs, x, *jax.tree.leaves((layers, norms)))[0]


def _run_forward(activation: str, layers: PyTree, norms: PyTree, x: Any) -> tuple[jax.Array, tuple]:
    # Each leaf says whether it is differentiated: a loss asks for the parameters' gradients and not for the
    # observations', a policy that is to raise a critic's values for the actions' and not for the critic's.
    params = layers, norms
    asked = _Asked(any(leaf.perturbed for leaf in jax.tree.leaves(params)), x.perturbed)
    (layers, norms), x = jax.tree.map(lambda leaf: leaf.value, (params, x))
    lanes, rows = build.load().jrl_lanes(), x.shape[0]
    *hidden, last = [layer.bias.shape[0] for layer in layers]
    # Of each hidden layer its activations in whole vectors, or with layer norm what they are made of.
    kept = [(rows, -(-size // lanes) * lanes) for size in hidden] + [(rows,) for _ in norms]
    y, *residuals = _call(
        FORWARD, activation, norms, [(rows, last), *kept], x, *jax.tree.leaves((layers, norms))
    )
    return y, (asked, layers, norms, x, residuals)


def _run_backward(activation: str, residuals: tuple, grad: jax.Array) -> tuple:
    asked, layers, norms, x, kept = residuals
    params = layers, norms
    kernels, hidden = [layer.kernel for layer in layers], len(layers) - 1
    outputs = [leaf.shape for leaf in jax.tree.leaves(params) if asked.parameters]
    args = [*kernels, *kept[:hidden], *jax.tree.leaves(norms), *kept[hidden:]]
    grads = _call(
        BACKWARD,
        activation,
        norms,
        outputs + [x.shape] * asked.input,
        x,
        grad,
        *args,
        parameters=asked.parameters,
        input=asked.input,
    )
    of_x = grads.pop() if asked.input else None
    of_params = jax.tree.unflatten(jax.tree.structure(params), grads) if asked.parameters else (None, None)
    return *of_params, of_x


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)
