"""A cheap counter-based random number generator, as an implementation of JAX's typed keys.

Threefry, JAX's own, is a loop of twenty rounds: on a CPU each place that draws costs ten small kernels to compile and a
hundred integer operations a word. Here a word is three integer hashes, which XLA fuses into what uses it. It passes the
tests of ``tests/ops/test_keys.py`` but is no cryptographic generator, and far less studied. jrl draws the initial
weights of its own networks with it; all else uses the key that it is given, so ``algo.init(jrl.ops.hashed(key), …)``
is how to have it everywhere.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from jax.extend import random

from jrl.types import Array, Key

# What a key is used for decides where its counter starts, so that its words are not the words of its children.
BITS, SPLIT, FOLD = 0, 0x9E3779B9, 0x3C6EF372

NAME = "jrl_hashed"


def hashed(key: Key) -> Key:
    """Return a key of this generator, made of the words of ``key`` (any implementation, any shape).

    ``jax.random.split``, ``fold_in``, ``bits`` and all that draws from them work on it as on any other key.

    Raises:
        TypeError: ``key`` is no typed key.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"hashed({key!r}): needs a typed key, as jax.random.key(seed) makes it.")
    # Of implementations with four words (rbg) either half is a key by itself.
    return jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl=HASHED)


def split_keys(key: Key, *shapes: tuple[int, ...]) -> list[Key]:
    """Return keys of several shapes, all from one draw.

    ::

        next_key, unroll_keys, update_keys = split_keys(key, (), (length, 2), (num_updates,))

    As ``jax.random.split`` of them all, cut into parts: on a CPU each draw of Threefry is a loop of its own, so that
    splitting what was split is more to compile and to run than splitting once.

    Args:
        key: consumed.
        *shapes: of the parts, ``()`` for a single key.

    Returns:
        Typed keys of the implementation of ``key``, an array of each shape, in order.

    Raises:
        TypeError: ``key`` is no key, as ``jax.random.split`` says.
    """
    sizes = [math.prod(shape) for shape in shapes]
    keys = jax.random.split(key, sum(sizes))
    ends = itertools.accumulate(sizes)
    return [
        keys[end - size : end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)
    ]


def _hash(x: Array) -> Array:
    """Mix 32 bits, one to one; constants: Wellons, "hash-prospector", https://github.com/skeeto/hash-prospector."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def _words(key: Array, first: int, count: int) -> Array:
    """Return ``h(k₁ ⊕ h(k₀ + h(i)))`` for ``count`` numbers ``i`` from ``first``, uint32 ``[count]``."""
    return _mix(key, jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(first))


def _mix(key: Array, i: Array) -> Array:
    return _hash(key[1] ^ _hash(key[0] + _hash(i)))


def _seed(seed: Array) -> Array:
    low = seed.astype(jnp.uint32)
    high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize == 8 else jnp.zeros_like(low)
    return jnp.stack([_hash(low), _hash(high ^ jnp.uint32(SPLIT))])


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return _words(key, SPLIT, 2 * math.prod(shape)).reshape(*shape, 2)


def _fold_in(key: Array, data: Array | int) -> Array:
    i = jnp.asarray(data).astype(jnp.uint32) + jnp.uint32(FOLD)
    return jnp.stack([_mix(key, i), _mix(key[::-1], i)])


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape)
    if bit_width == 64:
        low, high = _words(key, BITS, 2 * size).astype(jnp.uint64).reshape(2, *shape)
        return low | high << 32
    words = _words(key, BITS, size).reshape(shape)
    return words if bit_width == 32 else (words >> (32 - bit_width)).astype(f"uint{bit_width}")


HASHED = random.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name=NAME,
    tag=NAME,
)
