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


def shuffled_indices(key: jax.Array, n: int) -> jax.Array:
    r"""Return a pseudo-random permutation of ``0 … n-1``, int32 ``[n]``.

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

    Raises:
        ValueError: ``n < 1``.
    """
    if n < 1:
        raise ValueError(f"shuffled_indices(n={n}): n must be at least 1.")
    a = _largest_factor_up_to_root(n)
    if a < MIN_SIDE:
        return jax.random.permutation(key, n).astype(jnp.int32)
    b = n // a
    words = jax.random.bits(key, (NUM_ROUNDS, 2), jnp.uint32)
    index = jnp.arange(n, dtype=jnp.uint32)
    left, right = index // b, index % b
    for i in range(NUM_ROUNDS):
        left = (left + _hash(right, words[i, 0]) % a) % a
        right = (right + _hash(left, words[i, 1]) % b) % b
    return (left * b + right).astype(jnp.int32)


def _hash(x: jax.Array, word: jax.Array) -> jax.Array:
    x = x ^ word
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _largest_factor_up_to_root(n: int) -> int:
    return next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
