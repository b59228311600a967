"""A transition as one row of 32-bit words, so that a batch is one gather whatever the transition is made of.

On a replay larger than the processor's caches each item drawn costs about one cache miss an array read; six
arrays would cost six. Rows hold the bits, not the values: reading gives back exactly what was written, unless the
layout keeps floats in fewer bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.types import Array, PyTree

WORD = 4  # bytes


class Layout(NamedTuple):
    """Where the leaves of one tree lie in a row; static and hashable.

    Leaves of 32 and 64 bits come first, each in words of its own, then narrower ones (bool, uint8, bfloat16)
    byte by byte, filled up to a whole word. A row holds ``dtypes``; read, a leaf has its own of ``given`` again.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    given: tuple[np.dtype, ...]

    @property
    def words(self) -> int:
        """Words of a row."""
        wide, narrow = self._bytes()
        return wide // WORD + -(-narrow // WORD)

    def _bytes(self) -> tuple[int, int]:
        sizes = [math.prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True)]
        wide = sum(size for size, d in zip(sizes, self.dtypes, strict=True) if d.itemsize >= WORD)
        return wide, sum(sizes) - wide

    def pack(self, tree: PyTree) -> Array:
        """Return the rows, uint32 ``[N, words]``, of a tree with leaves ``[N, ...]``, cast to the layout's dtypes."""
        words, narrow = [], []
        leaves = self.treedef.flatten_up_to(tree)
        for leaf, dtype in zip(leaves, self.dtypes, strict=True):
            flat = _kept(leaf, dtype).reshape(leaf.shape[0], -1)
            if dtype.itemsize >= WORD:
                words.append(_bits(flat, jnp.uint32))
            else:
                narrow.append(_bits(flat.astype(jnp.uint8) if _is_bool(dtype) else flat, jnp.uint8))
        if narrow:
            used = sum(part.shape[1] for part in narrow)
            narrow.append(jnp.zeros((narrow[0].shape[0], -used % WORD), jnp.uint8))
            filled = jnp.concatenate(narrow, axis=1)
            filled = filled.reshape(filled.shape[0], -1, WORD)
            words.append(jax.lax.bitcast_convert_type(filled, jnp.uint32))
        return jnp.concatenate(words, axis=1)

    def unpack(self, rows: Array) -> PyTree:
        """Return the tree, leaves ``[N, ...]``, that rows ``[N, words]`` hold."""
        count, wide = rows.shape[0], self._bytes()[0] // WORD
        narrow = jax.lax.bitcast_convert_type(rows[:, wide:], jnp.uint8).reshape(count, -1)
        word, byte, leaves = 0, 0, []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = math.prod(shape) * dtype.itemsize
            if dtype.itemsize >= WORD:
                flat, word = rows[:, word : word + size // WORD], word + size // WORD
            else:
                flat, byte = narrow[:, byte : byte + size], byte + size
            if _is_bool(dtype):
                leaves.append((flat != 0).reshape(count, *shape))
                continue
            per_item = dtype.itemsize // flat.dtype.itemsize
            flat = flat.reshape(count, -1, per_item) if per_item > 1 else flat
            leaves.append(jax.lax.bitcast_convert_type(flat, dtype).reshape(count, *shape))
        leaves = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.given, strict=True)]
        return self.treedef.unflatten(leaves)


def layout(spec: PyTree, float_dtype: Any = None) -> Layout:
    """Return the layout of a tree whose leaves have the ``shape`` and ``dtype`` of one item.

    Args:
        spec: the tree.
        float_dtype: what floats of more bits are kept in, rounded to the nearest and at most its largest one; None
            keeps them as they are.

    Raises:
        TypeError: a leaf's dtype is not a bool, an integer or a float of 8 to 64 bits.
    """
    leaves, treedef = jax.tree.flatten(spec)
    for leaf in leaves:
        if not _is_number(leaf.dtype):
            raise TypeError(
                f"a transition with a leaf of dtype {leaf.dtype} cannot be kept in a replay, which holds bool, integer "
                "and float leaves of 8 to 64 bits: convert it in the environment, or store jax.random.key_data of keys."
            )
    given = tuple(jnp.dtype(leaf.dtype) for leaf in leaves)
    kept = tuple(_narrower(dtype, float_dtype) for dtype in given)
    return Layout(treedef, tuple(tuple(leaf.shape) for leaf in leaves), kept, given)


def _narrower(dtype: np.dtype, float_dtype: Any) -> np.dtype:
    if float_dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return min(dtype, jnp.dtype(float_dtype), key=lambda one: one.itemsize)


def _kept(leaf: Array, dtype: np.dtype) -> Array:
    """Return ``leaf`` as ``dtype``; what is too large for a narrower float becomes its largest, and not infinite."""
    if jnp.issubdtype(dtype, jnp.floating) and leaf.dtype.itemsize > dtype.itemsize:
        most = jnp.finfo(dtype).max.astype(leaf.dtype)
        leaf = jnp.where(jnp.isfinite(leaf), jnp.clip(leaf, -most, most), leaf)
    return leaf.astype(dtype)


def _is_bool(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.bool_)


def _is_number(dtype: Any) -> bool:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits >= 8  # int4 has a byte for its itemsize
    return _is_bool(dtype) or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 8)


def _bits(flat: Array, unit: Any) -> Array:
    """Return ``[N, k]`` as ``[N, k · itemsize / unit]`` of the same bits."""
    bits = jax.lax.bitcast_convert_type(flat, unit)
    return bits.reshape(flat.shape[0], -1)
