"""What this device does at best: matrix products, tanh, arithmetic, random bits and copies per second.

Each is a loop of one operation within one compiled program, so that no dispatch is timed; the best of
several short runs counts. Matrix products and copies are measured at the sizes of the work in question and at a large
one, since small ones reach less and what fits a cache more.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.bench.work import Shape, Work

NUM_SHAPES = 3  # products are measured at so many shapes, those with the most operations
CHAINS = (1, 8)  # operations on an array each time it is read
RUNS = 20  # and each of them short, so that on a busy machine one is undisturbed


def roofline(work: Work, seconds: float) -> dict[str, Any]:
    """Compare measured ``seconds`` with the least that ``work`` takes at the rates measured here.

    The least is the larger of two times: that of the bytes, and that of the operations, which is the sum over
    products, transcendentals, elementwise operations and random bits, since they share the same units.

    Returns:
        ``work``, ``rates`` per second, the ``seconds`` of each part, ``bound_seconds``, what it is
        ``limited_by`` (bytes, or the operations that take most of it), the share ``reached`` (bound over
        measured), and ``reached_of_large_product``, the same with the rate of a large matrix product in
        place of the network's own shapes.
    """
    product, size = product_rate(work), _size()
    rates = {
        "products": product,
        "large_product": matmul(_large_product()),
        "transcendentals": tanh(size),
        "elementwise": arithmetic(size),
        "random_bits": random_bits(size),
        "bytes": copy(_power_of_two(work.array_bytes)),
        "bytes_large": copy(_large_copy()),
    }
    parts = {
        "products": work.flops / product,
        "transcendentals": work.transcendentals / rates["transcendentals"],
        "elementwise": work.elementwise / rates["elementwise"],
        "random_bits": work.random_bits / rates["random_bits"],
        "bytes": work.bytes / rates["bytes"],
    }
    operations = sum(parts.values()) - parts["bytes"]
    largest = max((name for name in parts if name != "bytes"), key=lambda name: parts[name])
    ideal = operations - parts["products"] + work.flops / rates["large_product"]
    bound = max(operations, parts["bytes"])
    return {
        "work": {
            "flops": work.flops,
            "transcendentals": work.transcendentals,
            "elementwise": work.elementwise,
            "random_bits": work.random_bits,
            "bytes": work.bytes,
            "products": {"x".join(map(str, shape)): work.products[shape] for shape in _largest(work)},
        },
        "rates": {name: float(f"{rate:.4g}") for name, rate in rates.items()},
        "seconds": {name: float(f"{part:.4g}") for name, part in parts.items()},
        "bound_seconds": float(f"{bound:.4g}"),
        "limited_by": "bytes" if parts["bytes"] > operations else largest,
        "reached": round(bound / seconds, 4),
        "reached_of_large_product": round(max(ideal, parts["bytes"]) / seconds, 4),
    }


def product_rate(work: Work) -> float:
    """Return operations per second of ``work``'s products, measured at the shapes that have most of them."""
    shapes = _largest(work)
    if not shapes:
        return matmul(_large_product())
    return sum(work.products[s] for s in shapes) / sum(work.products[s] / matmul(s) for s in shapes)


def _largest(work: Work) -> list[Shape]:
    return sorted(work.products, key=lambda shape: -work.products[shape])[:NUM_SHAPES]


# ---------------------------------------------------------------------------------------- one operation each


@functools.cache
def matmul(shape: Shape) -> float:
    """Return operations per second of float32 products of a :data:`~jrl.bench.work.Shape`, the best of three.

    The three layouts are those of a forward pass, of a gradient by the inputs and of one by the weights.
    """
    b, m, n, k = shape
    batch = (b,) if b > 1 else ()
    layouts = (("mk", "kn", (m, k), (k, n)), ("mk", "nk", (m, k), (n, k)), ("km", "kn", (k, m), (k, n)))

    def seconds(left: str, right: str, left_shape: tuple, right_shape: tuple) -> float:
        equation = f"...{left},...{right}->...mn"

        def body(carry: Any) -> Any:
            x, y, out = carry
            # The next product depends on the last one, or the loop would be computed once.
            x = x.at[(0,) * x.ndim].add(1e-30 * out[(0,) * out.ndim])
            return x, y, jnp.einsum(equation, x, y)

        start = (jnp.ones((*batch, *left_shape)), jnp.ones((*batch, *right_shape)), jnp.zeros((*batch, m, n)))
        return _seconds(body, start)

    return 2.0 * b * m * n * k / min(seconds(*layout) for layout in layouts)


def peak() -> float:
    """Return operations per second of one large float32 product: what a utilisation is measured against."""
    return matmul(_large_product())


@functools.cache
def tanh(size: int) -> float:
    """Return tanh per second."""
    return _chained(jnp.tanh, size)


@functools.cache
def arithmetic(size: int) -> float:
    """Return additions and multiplications per second."""
    return 2 * _chained(lambda x: x * 0.999 + 0.001, size)


def _chained(function: Callable[[jax.Array], jax.Array], size: int) -> float:
    """Return applications per second, one at a time or several: they wait for memory, or for each other."""

    def rate(times: int) -> float:
        def body(x: jax.Array) -> jax.Array:
            for _ in range(times):
                x = function(x)
            return x

        return size * times / _seconds(body, jnp.linspace(-2.0, 2.0, size))

    return max(rate(times) for times in CHAINS)


@functools.cache
def random_bits(size: int) -> float:
    """Return random bits per second of jax's default generator."""

    def body(carry: Any) -> Any:
        index = carry[0]
        key = jax.random.fold_in(jax.random.key(0), index)
        return index + 1, jax.random.bits(key, (size,), jnp.uint32)

    return 32.0 * size / _seconds(body, (jnp.int32(0), jnp.zeros((size,), jnp.uint32)))


@functools.cache
def copy(num_bytes: int) -> float:
    """Return bytes read and written per second where an array of ``num_bytes`` is read and written again."""
    size = max(1, num_bytes // 4)
    return 8.0 * size / _seconds(lambda x: x + 1.0, jnp.zeros((size,)))


def _seconds(body: Callable[[Any], Any], start: Any) -> float:
    def loop(state: Any, count: jax.Array) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, state: body(state), state)

    run = jax.jit(loop, donate_argnums=0).lower(start, jnp.int32(0)).compile()
    # An accelerator is told to begin from afar, which takes a while.
    shortest = 0.002 if _on_cpu() else 0.01
    state, count = jax.block_until_ready(run(start, jnp.int32(1))), 1

    def fastest(state: Any, count: int, runs: int) -> tuple[Any, float]:
        best = float("inf")
        for _ in range(runs):
            began = time.perf_counter()
            state = jax.block_until_ready(run(state, jnp.int32(count)))
            best = min(best, time.perf_counter() - began)
        return state, best

    while True:
        # Of several: one that was disturbed would end the search with a loop too short to tell anything.
        state, taken = fastest(state, count, 3)
        if taken >= shortest / 2:
            break
        count = min(100 * count, int(count * shortest / max(taken, 1e-6)) + 1)
    return fastest(state, count, RUNS)[1] / count


def _on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _size() -> int:
    return 2**16 if _on_cpu() else 2**24  # fits a core's cache; fills an accelerator


def _large_product() -> Shape:
    return (1, 512, 512, 512) if _on_cpu() else (1, 8192, 8192, 8192)


def _large_copy() -> int:
    return 2**26 if _on_cpu() else 2**30


def _power_of_two(num_bytes: float) -> int:
    """Round up, so that like sizes share one measurement; of less a loop would measure its own overhead."""
    return min(max(2**16, 2 ** max(0, int(num_bytes) - 1).bit_length()), _large_copy())
