"""JAX's default random number generator by C++ kernels, for CPUs; the same words, compiled at first use.

XLA draws on a CPU by a loop of many small steps, which takes longer than its numbers, and some time to compile, in
each place that draws. The keys of this implementation are Threefry's (:data:`jax.random.key`'s default), and all that
is drawn from them or split off is what Threefry would give.

Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend import random

from jrl.native import build
from jrl.ops import keys
from jrl.types import Array, Key

BITS, SPLIT = "jrl_threefry_bits", "jrl_threefry_split"
"""Its kernels in :mod:`jrl.native.build`."""

NAME, PLAIN = "jrl_native_threefry", "threefry2x32"


def draws(key: Key) -> bool:
    """Return whether the kernels have a key's bits: those of JAX's default generator in its default layout."""
    partitionable = getattr(jax.config, "jax_threefry_partitionable", True)
    return bool(partitionable) and str(jax.random.key_impl(key)) in (PLAIN, NAME)


def split_keys(key: Key, *shapes: tuple[int, ...], kernels: str) -> list[Key]:
    """Return what :func:`jrl.ops.split_keys` does; with ``"native"`` kernels all but the first draw by them.

    The first is what a state keeps for its next step: a key like ``key``, whatever computes.

    Args:
        key: consumed; one for which :func:`draws` is False is split by JAX.
        *shapes: of the parts, ``()`` for a single key.
        kernels: ``"xla"`` or ``"native"``.

    Returns:
        Typed keys with the words that JAX would split off, an array of each shape, in order.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`, where the keys are lowered.
    """
    if kernels != "native" or not draws(key):
        return keys.split_keys(key, *shapes)
    first, *rest = keys.split_keys(_wrap(key, NATIVE), *shapes)
    return [_wrap(first, PLAIN), *rest]


def _wrap(key: Key, impl: object) -> Key:
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=impl)


def _seed(seed: Array) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl=PLAIN))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return build.call(SPLIT, [(*shape, 2)], key, dtype=jnp.uint32)[0]


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    if bit_width == 64:
        high, low = jnp.moveaxis(_split(key, shape), -1, 0).astype(jnp.uint64)
        return high << 32 | low
    return build.call(BITS, [shape], key, dtype=jnp.uint32)[0].astype(f"uint{bit_width}")


def _fold_in(key: Array, data: Array | int) -> Array:
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl=PLAIN), data))


NATIVE = random.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name=NAME,
    tag=NAME,
)
