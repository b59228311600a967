"""A whole multilayer perceptron in one kernel, for GPUs, where what a small network costs is the traffic of its
activations.

Layer by layer, XLA writes each layer's activations to the device's memory and reads them back, in both passes, several
times; a network of 64 units does too little arithmetic to hide that. Here a block of rows goes through all layers
on the chip. Only the inputs are kept for the backward pass, which computes the activations again.

Written for Pallas' Triton backend. Products have the precision of ``jax.default_matmul_precision``, on an accelerator
TF32 unless that says otherwise, as XLA's have; tanh is then rounded likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.networks.mlp import ACTIVATIONS

ALLOWED = True  # set to False before a network is made, and it goes layer by layer
WIDEST = 128  # units: the weights' gradients of a wider layer do not fit the registers
WIDEST_INPUT = 64  # a wider first layer is left to XLA, whose product is then large enough
BLOCK = 64  # rows at a time
CHUNK = 256  # rows that add to one partial gradient
SMALLEST = 16  # Triton's products have no smaller side


class Layer(NamedTuple):
    """``y = x W + b``: kernel float32 ``[F, K]``, bias float32 ``[K]``."""

    kernel: jax.Array
    bias: jax.Array


def enabled() -> bool:
    """Return whether networks use it: on NVIDIA's GPUs from Ampere on, if :data:`ALLOWED`."""
    if jax.default_backend() != "gpu" or not ALLOWED:
        return False
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except (
        ImportError
    ):  # JAX says that it will give up this backend some day: then networks go layer by layer again
        return False
    return float(getattr(jax.devices()[0], "compute_capability", 0)) >= 8.0


def fits(sizes: Sequence[int]) -> bool:
    """Return whether :func:`mlp` takes layers of these outputs, hidden ones and the last."""
    return len(sizes) >= 2 and max(sizes) <= WIDEST


def mlp(layers: Sequence[Layer], x: jax.Array, activation: str) -> jax.Array:
    """Return ``W_k act(… act(x W_1 + b_1) …) + b_k``: float32 ``[..., F] -> [..., K]``.

    Equal to the layers one by one, to rounding. Differentiable in reverse mode, once.

    Args:
        layers: two or more, none with more than :data:`WIDEST` outputs.
        x: float32 ``[..., F]``.
        activation: a name in :data:`jrl.networks.ACTIVATIONS`.

    Raises:
        ValueError: the layers are too few or too wide, or there is no such activation.
    """
    sizes = [layer.bias.shape[-1] for layer in layers]
    if not fits(sizes) or activation not in ACTIVATIONS:
        raise ValueError(
            f"fused.mlp of layers with {sizes} outputs and activation={activation!r}: needs at least two layers of at "
            f"most {WIDEST} outputs and one of {', '.join(ACTIVATIONS)}."
        )
    batch = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    layers = tuple(Layer(*layer) for layer in layers)
    if x.shape[-1] > WIDEST_INPUT:
        y = _run(activation, False, layers[1:], x @ layers[0].kernel + layers[0].bias)
    else:
        y = _run(activation, True, layers, x)
    return y.reshape(*batch, y.shape[-1])


@jax.custom_jvp
def _rounded_tanh(x: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton

    return triton.approx_tanh(x)


@_rounded_tanh.defjvp
def _rounded_tanh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = _rounded_tanh(*primals)
    return y, (1.0 - y * y) * tangents[0]


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation as a kernel computes it.

    Where products round what they take to the 10 bits of TF32, tanh is rounded to as many: the processor has an
    instruction for that, and an exact one takes a third of a small network's time.
    """
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    rounds = precision in (None, "default", "fastest", "tensorfloat32")
    return _rounded_tanh if name == "tanh" and rounds and not _interpret() else ACTIVATIONS[name]


def reference(activation: str, from_input: bool, layers: Sequence[Layer], x: jax.Array) -> jax.Array:
    """Return what the kernel computes, layer by layer; ``x`` is what the activation takes, if not ``from_input``."""
    act = ACTIVATIONS[activation]
    for i, (kernel, bias) in enumerate(layers):
        x = (x if from_input and i == 0 else act(x)) @ kernel + bias
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(activation: str, from_input: bool, layers: tuple[Layer, ...], x: jax.Array) -> jax.Array:
    return _forward(activation, from_input, layers, x)


def _run_forward(activation: str, from_input: bool, layers: tuple[Layer, ...], x: jax.Array) -> tuple:
    return _forward(activation, from_input, layers, x), (layers, x)


def _run_backward(activation: str, from_input: bool, residuals: tuple, grad: jax.Array) -> tuple:
    layers, x = residuals
    grads, x_grad = _backward(activation, from_input, layers, x, grad)
    if from_input:
        # Of observations, seldom asked for: where it is not, nothing of this is compiled.
        _, pull = jax.vjp(lambda x: reference(activation, True, layers, x), x)
        (x_grad,) = pull(grad)
    return grads, x_grad


_run.defvjp(_run_forward, _run_backward)


# -------------------------------------------------------------------------------------------------- kernels


def _padded(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _matrix(ref: Any, first_row: Any, rows: int, num_rows: int, num_columns: int) -> jax.Array:
    """Load ``rows`` rows, and all columns up to a power of two, with zeros beyond what there is."""
    from jax.experimental.pallas import triton

    row = first_row + jnp.arange(rows)
    column = jnp.arange(_padded(num_columns))
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    return triton.load(ref.at[row[:, None], column[None, :]], mask=mask, other=0.0)


def _vector(ref: Any, size: int) -> jax.Array:
    from jax.experimental.pallas import triton

    index = jnp.arange(_padded(size))
    return triton.load(ref.at[index], mask=index < size, other=0.0)


def _store(ref: Any, first_row: Any, value: jax.Array, num_rows: int, num_columns: int) -> None:
    from jax.experimental.pallas import triton

    row = first_row + jnp.arange(value.shape[0])
    column = jnp.arange(value.shape[1])
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    triton.store(ref.at[row[:, None], column[None, :]], value, mask=mask)


def _store_vector(ref: Any, value: jax.Array, size: int) -> None:
    from jax.experimental.pallas import triton

    index = jnp.arange(value.shape[0])
    triton.store(ref.at[index], value, mask=index < size)


def _dot(a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    contracted = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _weights(refs: Sequence[Any]) -> list[Layer]:
    """Load the layers, kernel and bias in turn."""
    layers = []
    for kernel, bias in zip(refs[::2], refs[1::2], strict=True):
        inputs, outputs = kernel.shape
        layers.append(Layer(_matrix(kernel, 0, _padded(inputs), inputs, outputs), _vector(bias, outputs)))
    return layers


def _through(
    act: Callable[[jax.Array], jax.Array], from_input: bool, layers: Sequence[Layer], x: jax.Array
) -> tuple[jax.Array, list[jax.Array], list[Any]]:
    """Return the output, and of each layer the input and what pulls a gradient back through the activation."""
    inputs: list[jax.Array] = []
    pulls: list[Any] = []
    for i, (kernel, bias) in enumerate(layers):
        if from_input and i == 0:
            pulls.append(None)
        else:
            x, pull = jax.vjp(act, x)
            pulls.append(pull)
        inputs.append(x)
        x = _dot(x, kernel) + bias[None, :]
    return x, inputs, pulls


def _params(layers: Sequence[Layer], block: int) -> Any:
    """Return the kernels' settings; measured on an H100, where other numbers of warps took up to three times longer."""
    from jax.experimental.pallas import triton

    widest = max(max(layer.kernel.shape) for layer in layers)
    num_warps = 8 if widest > 64 else 4 if block > SMALLEST else 1
    return triton.CompilerParams(num_warps=num_warps, num_stages=1)


def _interpret() -> bool:
    return jax.default_backend() != "gpu"


def _forward(activation: str, from_input: bool, layers: tuple[Layer, ...], x: jax.Array) -> jax.Array:
    from jax.experimental import pallas

    act = _activation(activation)
    (size, features), outputs = x.shape, layers[-1].bias.shape[0]
    block = min(BLOCK, _padded(size))

    def kernel(x_ref: Any, *refs: Any) -> None:
        first = pallas.program_id(0) * block
        rows = _matrix(x_ref, first, block, size, features)
        y, _, _ = _through(act, from_input, _weights(refs[:-1]), rows)
        _store(refs[-1], first, y, size, outputs)

    return pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((size, outputs), jnp.float32),
        grid=(-(-size // block),),
        compiler_params=_params(layers, block),
        interpret=_interpret(),
        name="mlp_forward",
    )(x, *jax.tree.leaves(layers))


def _backward(
    activation: str, from_input: bool, layers: tuple[Layer, ...], x: jax.Array, grad: jax.Array
) -> tuple[tuple[Layer, ...], jax.Array | None]:
    """Return the gradients of the layers, and that of ``x``, or None if ``from_input``."""
    from jax.experimental import pallas

    act = _activation(activation)
    (size, features), outputs = x.shape, grad.shape[1]
    block = min(BLOCK, _padded(size))
    chunk = min(CHUNK, -(-size // block) * block)
    num_chunks = -(-size // chunk)
    leaves = jax.tree.leaves(layers)

    def kernel(x_ref: Any, grad_ref: Any, *refs: Any) -> None:
        weight_refs, grad_refs, x_grad_refs = (
            refs[: len(leaves)],
            refs[len(leaves) : 2 * len(leaves)],
            refs[2 * len(leaves) :],
        )
        weights = _weights(weight_refs)
        begin = pallas.program_id(0) * chunk

        def body(i: Any, sums: tuple[Layer, ...]) -> tuple[Layer, ...]:
            first = begin + i * block
            rows = _matrix(x_ref, first, block, size, features)
            _, inputs, pulls = _through(act, from_input, weights, rows)
            delta = _matrix(grad_ref, first, block, size, outputs)
            new = list(sums)
            for layer in reversed(range(len(weights))):
                # Rows beyond the last have no gradient, so they add nothing.
                new[layer] = Layer(
                    sums[layer].kernel + _dot(inputs[layer], delta, transpose_a=True),
                    sums[layer].bias + delta.sum(0),
                )
                if pulls[layer] is not None:
                    (delta,) = pulls[layer](_dot(delta, weights[layer].kernel, transpose_b=True))
            for ref in x_grad_refs:
                _store(ref, first, delta, size, features)
            return tuple(new)

        zeros = jax.tree.map(jnp.zeros_like, tuple(weights))
        sums = jax.lax.fori_loop(0, chunk // block, body, zeros)
        for (kernel_ref, bias_ref), total, layer in zip(
            zip(grad_refs[::2], grad_refs[1::2], strict=True), sums, layers, strict=True
        ):
            _store(kernel_ref, 0, total.kernel, *layer.kernel.shape)
            _store_vector(bias_ref, total.bias, layer.bias.shape[0])

    out_shape = [jax.ShapeDtypeStruct((num_chunks, *leaf.shape), jnp.float32) for leaf in leaves]
    out_specs = [
        pallas.BlockSpec((None, *leaf.shape), lambda i, rank=leaf.ndim: (i, *(0,) * rank)) for leaf in leaves
    ]
    if not from_input:
        out_shape.append(jax.ShapeDtypeStruct(x.shape, jnp.float32))
        out_specs.append(pallas.BlockSpec(x.shape, lambda i: (0, 0)))
    grads = pallas.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(num_chunks,),
        out_specs=out_specs,
        compiler_params=_params(layers, block),
        interpret=_interpret(),
        name="mlp_backward",
    )(x, grad, *leaves)
    totals = [leaf[0] if num_chunks == 1 else leaf.sum(0) for leaf in grads[: len(leaves)]]
    return jax.tree.unflatten(jax.tree.structure(layers), totals), None if from_input else grads[-1]
