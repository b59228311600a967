"""A counter of environment steps that survives 2**31: two uint32 words, since JAX has no int64 by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

WORD = 2**32


def zero() -> jax.Array:
    """Return a counter at 0, uint32 ``[2]`` (low word, high word)."""
    return jnp.zeros((2,), jnp.uint32)


def add(counter: jax.Array, amount: int) -> jax.Array:
    """Return ``counter + amount``, carrying into the high word.

    Args:
        counter: uint32 ``[..., 2]``.
        amount: a Python int, ``0 <= amount < 2**32``.

    Raises:
        ValueError: ``amount`` is no integer, or does not fit one word.
    """
    if not isinstance(amount, int) or not 0 <= amount < WORD:
        raise ValueError(
            f"counter.add(amount={amount}): must be an integer of at most 32 bits; add more in parts."
        )
    low = counter[..., 0] + jnp.uint32(amount)
    high = counter[..., 1] + (low < counter[..., 0]).astype(jnp.uint32)
    return jnp.stack([low, high], axis=-1)


def to_float(counter: jax.Array) -> jax.Array:
    """Return the count as float32 ``[...]``, for schedules: exact to a relative 2**-24."""
    return counter[..., 1].astype(jnp.float32) * float(WORD) + counter[..., 0].astype(jnp.float32)


def to_int(counter: jax.Array) -> int:
    """Return the count of one concrete counter as a Python int (host side)."""
    low, high = np.asarray(counter).tolist()
    return low + high * WORD
