"""A sum tree of priorities with wide nodes: O(log n) sampling and updates, no drift, never a zero item.

Level 0 holds the priorities, each node of level ``l + 1`` the sum of ``WIDTH`` nodes of level ``l``. Parents
are recomputed from their children, not incremented, so rounding never accumulates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

WIDTH = 16

Tree = tuple[jax.Array, ...]


def init(capacity: int) -> Tree:
    """Return a tree of ``capacity`` zero priorities: float32 levels, the last of size 1."""
    levels = [jnp.zeros((_padded(capacity),), jnp.float32)]
    while levels[-1].shape[0] > 1:
        nodes = levels[-1].shape[0] // WIDTH
        levels.append(jnp.zeros((_padded(nodes) if nodes > 1 else 1,), jnp.float32))
    return tuple(levels)


def total(tree: Tree) -> jax.Array:
    """Return the sum of all priorities, float32 ``[]``."""
    return tree[-1][0]


def update(tree: Tree, index: jax.Array, priority: jax.Array) -> Tree:
    """Set the priorities at ``index`` (int32 ``[N]``; of equal ones, one of the values wins) and their sums."""
    levels = [tree[0].at[index].set(priority)]
    for level in tree[1:]:
        index = index // WIDTH
        children = levels[-1].reshape(-1, WIDTH)[index]
        levels.append(level.at[index].set(children.sum(-1)))
    return tuple(levels)


def update_block(tree: Tree, start: jax.Array, priority: jax.Array) -> Tree:
    """Set contiguous priorities from ``start`` to ``priority`` (float32 ``[size]``), and their sums."""
    leaves, size = jax.lax.dynamic_update_slice(tree[0], priority, (start,)), priority.shape[0]
    levels = [leaves]
    for level in tree[1:]:
        # One node more than the block is wide: it may straddle a boundary. Clamping keeps the slice inside;
        # a parent outside the block is recomputed to the value it had.
        nodes = levels[-1].shape[0] // WIDTH
        size = min(-(-size // WIDTH) + 1, nodes)
        start = jnp.minimum(start // WIDTH, nodes - size)
        children = jax.lax.dynamic_slice(levels[-1], (start * WIDTH,), (size * WIDTH,))
        sums = children.reshape(-1, WIDTH).sum(-1)
        levels.append(jax.lax.dynamic_update_slice(level, sums, (start,)))
    return tuple(levels)


def sample(key: jax.Array, tree: Tree, num: int) -> tuple[jax.Array, jax.Array]:
    """Draw ``num`` items, one from each of ``num`` equal strata of the total, ``P(i) = p_i / Σ p``.

    An item of priority 0 is never drawn while one above 0 exists: rounding may push the target past the last
    child that has mass, so the descent picks the last child of positive mass at or before it.

    Returns:
        Indices int32 ``[num]`` and their priorities float32 ``[num]``.
    """
    strata = (jnp.arange(num) + jax.random.uniform(key, (num,), jnp.float32)) / num
    target = strata * total(tree)
    index, priority = jnp.zeros((num,), jnp.int32), jnp.broadcast_to(total(tree), (num,))
    for level in reversed(tree[:-1]):
        # The priority comes from the children at hand, not by a second gather from the leaves: nothing but this
        # gather may read the leaves, or XLA copies them before their next update.
        child, target, priority = _descend(level.reshape(-1, WIDTH)[index], target)
        index = index * WIDTH + child
    return index, priority


def _descend(children: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return, of children ``[N, WIDTH]``, the last of positive mass whose interval has begun at ``target``.

    Written out child by child, which XLA makes elementwise loops over ``N`` of: on a CPU a cumulative sum along
    the children takes three times as long.

    Returns:
        The child int32 ``[N]``, the target relative to where its interval starts, and its mass.
    """
    found = jnp.zeros(target.shape, bool)
    chosen, begin, mass = jnp.zeros(target.shape, jnp.int32), jnp.zeros_like(target), children[:, 0]
    start = jnp.zeros_like(target)
    for child in range(WIDTH):
        width = children[:, child]
        here = (width > 0) & (~found | (start <= target))
        chosen, begin, mass = (
            jnp.where(here, new, old) for new, old in ((child, chosen), (start, begin), (width, mass))
        )
        found |= here
        start = start + width
    # One array behind a barrier: else XLA would run the descent again for everything that uses its results,
    # the transitions' gather among them.
    packed = jnp.stack([chosen.astype(jnp.float32), target - begin, mass])
    packed = jax.lax.optimization_barrier(packed)
    return packed[0].astype(jnp.int32), packed[1], packed[2]


def _padded(n: int) -> int:
    return -(-n // WIDTH) * WIDTH
