"""A random permutation of indices without a sort.

``jax.random.permutation`` sorts random keys, which took a quarter of PPO's time on CPU. A Feistel network is
a bijection whatever its round function is, costs a few integer operations an index, and needs no memory.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

NUM_ROUNDS = 6
# Below this either half of the network is too narrow to mix; a sort of so few indices is cheap.
MIN_SIDE = 8


def shuffled_indices(key: jax.Array, n: int, num: int | None = None) -> jax.Array:
    r"""Return a pseudo-random permutation of ``0 … n-1``, int32 ``[n]``, or ``num`` independent ones, ``[num, n]``.

    Writes an index as ``(l, r)`` with ``l < a``, ``r < b``, ``a b = n`` and applies, in turn,
    ``l ← (l + F_i(r)) mod a`` and ``r ← (r + F_i(l)) mod b``: an unbalanced Feistel network on mixed radices,
    each round a bijection of ``Z_a × Z_b``. ``F_i`` is an integer hash of its argument and a random word.

    Source: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988;
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002; the hash is the finaliser of
    MurmurHash3.

    It is not uniform over all ``n!`` permutations (neither is a sort of 32-bit keys for large ``n``): single
    positions are uniform, pairs and minibatch membership nearly so (``tests/ops/test_shuffle.py``). Where
    ``n`` has no factor between 8 and √n, for instance a prime, it falls back to a sort.

    Args:
        key: a typed key.
        n: number of indices, static.
        num: number of permutations, static; None for one without the leading axis.

    Raises:
        ValueError: ``n < 1`` or ``num < 1``.
    """
    if n < 1:
        raise ValueError(f"shuffled_indices(n={n}): n must be at least 1.")
    if num is None:
        return shuffled_indices(key, n, 1)[0]
    if num < 1:
        raise ValueError(f"shuffled_indices(num={num}): num must be at least 1.")
    a = _largest_factor_up_to_root(n)
    if a < MIN_SIDE:
        index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (num, n))
        return jax.random.permutation(key, index, axis=1, independent=True)
    b = n // a
    words = jax.random.bits(key, (NUM_ROUNDS * 2 * num,), jnp.uint32).reshape(NUM_ROUNDS, 2, num, 1)
    index = jnp.arange(n, dtype=jnp.uint32)[None]
    left, right = index // b, index % b
    for to_left, to_right in words:
        left = (left + _hash(right, to_left) % a) % a
        right = (right + _hash(left, to_right) % b) % b
    return (left * b + right).astype(jnp.int32)


def _hash(x: jax.Array, word: jax.Array) -> jax.Array:
    x = x ^ word
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _largest_factor_up_to_root(n: int) -> int:
    return next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
