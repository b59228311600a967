"""What a computation needs: operations and bytes, counted in its jaxpr before XLA has seen it.

XLA's own ``cost_analysis`` counts the body of a loop once, however often it runs, and its bytes are those of
one way to compile. Here the body of a ``scan`` counts as often as it runs, and what no output needs is left
out. Counted are

* *products*: 2·M·N·K for each matrix product (a convolution is one over its patches), by shape;
* *transcendentals*: tanh, exp, log, sin, sqrt and their kin, one an element;
* *elementwise*: all other arithmetic, comparisons and reductions, one an element;
* *random bits*: those drawn, and 64 for each key made;
* *bytes*: operands and results of products, what is gathered, scattered and sliced, and what a scan reads and
  stacks. All else is taken to be fused into these, and what a loop carries to stay where it is.

Of the branches of a ``cond`` the cheapest counts; the body of a ``while`` of unknown length counts once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jrl.native import adam, categorical, noise
from jrl.networks import native

Shape = tuple[int, int, int, int]  # batch, M, N, K


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRANSCENDENTAL = _names(
    "tanh exp exp2 expm1 log log1p logistic sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh "
    "erf erfc erf_inv lgamma digamma pow sqrt rsqrt cbrt"
)
ELEMENTWISE = _names(
    "add add_any sub mul div rem max min neg abs sign square integer_pow floor ceil round clamp nextafter "
    "eq ne lt le gt ge and or xor not is_finite select_n population_count clz "
    "shift_left shift_right_logical shift_right_arithmetic"
)
REDUCTION = _names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin "
    "cumsum cumprod cummax cummin cumlogsumexp reduce_precision"
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and bytes; see the module. ``array_bytes`` is the size of the largest array moved."""

    products: Mapping[Shape, float] = dataclasses.field(default_factory=dict)
    transcendentals: float = 0.0
    elementwise: float = 0.0
    random_bits: float = 0.0
    bytes: float = 0.0
    array_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """Operations of all matrix products."""
        return sum(self.products.values())

    def __add__(self, other: Work) -> Work:
        products = {
            shape: self.products.get(shape, 0.0) + other.products.get(shape, 0.0)
            for shape in {**self.products, **other.products}
        }
        numbers = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        return Work(products, array_bytes=max(self.array_bytes, other.array_bytes), **numbers)

    def __mul__(self, times: float) -> Work:
        products = {shape: flops * times for shape, flops in self.products.items()}
        numbers = {name: getattr(self, name) * times for name in _NUMBERS}
        return Work(products, array_bytes=self.array_bytes, **numbers)

    def __sub__(self, other: Work) -> Work:
        difference = self + other * -1.0
        products = {shape: flops for shape, flops in difference.products.items() if flops > 0}
        return dataclasses.replace(difference, products=products)


REFERENCES: dict[str, tuple[Callable[..., Any], int]] = {
    adam.NORM: (adam.reference_norm, 0),
    adam.UPDATE: (adam.reference_update, 1),
    categorical.MEAN: (categorical.reference_mean, 1),
    categorical.TARGET: (categorical.reference_target, 2),
    categorical.LOSS: (categorical.reference_loss, 1),
}
"""Of kernels: what they compute, in XLA, and the rank of their first output."""

_NUMBERS = ("transcendentals", "elementwise", "random_bits", "bytes")


def count(function: Callable[..., Any], *args: Any) -> Work:
    """Return the work of ``function(*args)``; arguments may be :class:`jax.ShapeDtypeStruct`."""
    return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr(jaxpr: Any) -> Work:
    """Return the work of a jaxpr, all of whose outputs are needed."""
    return _jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def nbytes(tree: Any) -> float:
    """Return the bytes of all arrays (or shapes) in a pytree."""
    return float(sum(_bytes(leaf) for leaf in jax.tree.leaves(tree)))


def _jaxpr(jaxpr: Any, needed: Sequence[bool]) -> Work:
    """Count backwards, so that what neither an output nor another counted equation needs is left out."""
    live = {
        var for var, need in zip(jaxpr.outvars, needed, strict=True) if need and not isinstance(var, Literal)
    }
    work = Work()
    for equation in reversed(jaxpr.eqns):
        used = [var in live for var in equation.outvars]
        if any(used) or equation.effects:
            work += _equation(equation, used)
            live.update(var for var in equation.invars if not isinstance(var, Literal))
    return work


def _equation(equation: Any, used: Sequence[bool]) -> Work:
    name, params = equation.primitive.name, equation.params
    ins, outs = [var.aval for var in equation.invars], [var.aval for var in equation.outvars]
    if name == "scan":
        inner = _open(params["jaxpr"])
        # By the shapes, since the parameters that say so have changed: what is stacked has an axis more outside.
        num_carry = sum(out.shape == var.aval.shape for out, var in zip(outs, inner.outvars, strict=True))
        num_fixed = sum(one.shape == var.aval.shape for one, var in zip(ins, inner.invars, strict=True))
        body = _jaxpr(inner, [True] * num_carry + list(used[num_carry:]))
        stacked = [aval for aval, use in zip(outs[num_carry:], used[num_carry:], strict=True) if use]
        return body * params["length"] + _moved(*ins[num_fixed:], *stacked)
    if name == "while":
        return count_jaxpr(_open(params["cond_jaxpr"])) + count_jaxpr(_open(params["body_jaxpr"]))
    if name == "cond":
        return min((_jaxpr(_open(one), used) for one in params["branches"]), key=_weight)
    if name == "pallas_call":
        # Its programs run side by side, as a batch does, and what is between its inputs and outputs stays on the chip.
        programs = math.prod(params["grid_mapping"].grid)
        kernel = count_jaxpr(params["jaxpr"]) * programs
        products = {(b * programs, *shape): flops for (b, *shape), flops in kernel.products.items()}
        return dataclasses.replace(kernel, products=products, bytes=0.0, array_bytes=0.0) + _moved(
            *ins, *outs
        )
    if name == "ffi_call" and params["target_name"].startswith(native.NAMES):
        return _native(params, ins) + _moved(*ins, *outs)
    if name == "ffi_call" and params["target_name"].startswith(noise.FACTORS):
        key = jax.eval_shape(jax.random.key, 0)
        return count(lambda key: noise.reference(key, outs[0].shape), key) + _moved(*outs)
    if name == "ffi_call" and params["target_name"].startswith(tuple(REFERENCES)):
        return _reference(params["target_name"].rpartition("_")[0], ins, outs) + _moved(*ins, *outs)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            inner = _open(params[key])
            return _jaxpr(inner, used if len(used) == len(inner.outvars) else [True] * len(inner.outvars))
    return _primitive(name, params, ins, outs)


def _reference(name: str, ins: Sequence[Any], outs: Sequence[Any]) -> Work:
    """Return the operations of a call of another kernel of :mod:`jrl.native`: those of XLA's way to do it."""
    function, rank = REFERENCES[name]
    for _ in outs[0].shape[: outs[0].ndim - rank]:
        function = jax.vmap(function)
    return count(function, *ins)


def _native(params: Mapping[str, Any], ins: Sequence[Any]) -> Work:
    """Return the operations of a call of :mod:`jrl.networks.native`: those of the layers one by one, on all of x."""
    attributes = dict(params["attributes"])
    activation, norm = native.ACTIVATIONS[int(attributes["activation"])], bool(attributes["norm"])

    def through(weights: tuple[Any, Any], x: jax.Array) -> jax.Array:
        whole = functools.partial(native.reference, activation)
        for _ in x.shape[:-2]:
            whole = jax.vmap(whole)
        return whole(*weights, x)

    def both(weights: tuple[Any, Any], x: jax.Array, grad: jax.Array) -> Any:
        y, pull = jax.vjp(through, weights, x)
        asked = bool(attributes["parameters"]), bool(attributes["input"])
        return y, [of for of, is_asked in zip(pull(grad), asked, strict=True) if is_asked]

    def of(leaves: Sequence[Any]) -> list[native.Norm]:
        return [native.Norm(*pair) for pair in zip(leaves[::2], leaves[1::2], strict=True)]

    x, *rest = ins
    if params["target_name"].startswith(native.NAMES[0]):
        num = (len(rest) + 2) // 4 if norm else len(rest) // 2
        layers = list(zip(rest[: 2 * num : 2], rest[1 : 2 * num : 2], strict=True))
        work = count(through, (layers, of(rest[2 * num :])), x)
    else:
        grad, *rest = rest
        # Kernels, what was kept of all layers but the last, and with layer norm two arrays and one more of each.
        num = (len(rest) + 4) // 5 if norm else (len(rest) + 1) // 2
        layers = [(k, jax.ShapeDtypeStruct(k.shape[:-2] + k.shape[-1:], k.dtype)) for k in rest[:num]]
        weights = layers, of(rest[2 * num - 1 :][: 2 * (num - 1)] if norm else ())
        work = count(both, weights, x, grad) - count(through, weights, x)
    return dataclasses.replace(work, bytes=0.0, array_bytes=0.0)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _primitive(name: str, params: Mapping[str, Any], ins: Sequence[Any], outs: Sequence[Any]) -> Work:
    if name == "dot_general":
        (contracting, _), (batch, _) = params["dimension_numbers"]
        b = math.prod(ins[0].shape[i] for i in batch)
        k = math.prod(ins[0].shape[i] for i in contracting)
        m, n = ins[0].size // max(b * k, 1), ins[1].size // max(b * k, 1)
        return Work({(b, m, n, k): 2.0 * b * m * n * k}) + _moved(*ins, *outs)
    if name == "conv_general_dilated":
        out_features = ins[1].shape[params["dimension_numbers"].rhs_spec[0]]
        k = ins[1].size // max(out_features, 1)
        m = outs[0].size // max(out_features, 1)
        return Work({(1, m, out_features, k): 2.0 * outs[0].size * k}) + _moved(*ins, *outs)
    if name in TRANSCENDENTAL:
        return Work(transcendentals=outs[0].size)
    if name in ELEMENTWISE:
        return Work(elementwise=outs[0].size)
    if name in REDUCTION:
        return Work(elementwise=ins[0].size)
    if name == "sort":
        return Work(elementwise=ins[0].size * math.log2(max(ins[0].size, 2))) + _moved(*ins, *outs)
    if name == "random_bits":
        return Work(random_bits=float(outs[0].size * params["bit_width"]))
    if name in ("random_split", "random_fold_in", "random_seed"):
        return Work(random_bits=64.0 * outs[0].size)
    if name == "threefry2x32":
        return Work(random_bits=32.0 * sum(out.size for out in outs))
    if name in ("gather", "dynamic_slice"):
        return _moved(outs[0], outs[0])
    if name == "dynamic_update_slice":
        return _moved(ins[1], ins[1])
    if name.startswith("scatter"):
        return _moved(ins[2], ins[2])
    return Work()  # shapes, copies and casts: fused into what uses them


def _moved(*arrays: Any) -> Work:
    sizes = [_bytes(array) for array in arrays]
    return Work(bytes=float(sum(sizes)), array_bytes=float(max(sizes, default=0)))


def _bytes(array: Any) -> int:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(array.shape)
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _weight(work: Work) -> float:
    return work.flops + work.elementwise + 10 * work.transcendentals + work.random_bits + work.bytes
