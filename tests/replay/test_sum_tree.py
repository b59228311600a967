import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.replay import sum_tree


def consistent(tree):
    for below, above in itertools.pairwise(tree):
        sums = np.asarray(below).reshape(-1, sum_tree.WIDTH).sum(-1)
        np.testing.assert_allclose(np.asarray(above)[: len(sums)], sums, rtol=1e-6)
        assert not np.asarray(above)[len(sums) :].any()


@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 300, 4097])
def test_updates_keep_every_sum(capacity):
    rng = np.random.default_rng(capacity)
    tree, leaves = sum_tree.init(capacity), np.zeros(capacity, np.float32)
    update = jax.jit(sum_tree.update)
    for _ in range(5):
        index = rng.permutation(capacity)[: min(capacity, 8)]
        priority = rng.random(len(index)).astype(np.float32)
        leaves[index] = priority
        tree = update(tree, jnp.asarray(index), jnp.asarray(priority))
        consistent(tree)
    np.testing.assert_array_equal(np.asarray(tree[0])[:capacity], leaves)
    np.testing.assert_allclose(sum_tree.total(tree), leaves.sum(), rtol=1e-6)


@pytest.mark.parametrize(("capacity", "size"), [(16, 16), (300, 7), (300, 60), (4096, 33), (10_000, 10)])
def test_a_block_update_equals_single_ones(capacity, size):
    block = jax.jit(sum_tree.update_block)
    one = jax.jit(sum_tree.update)
    tree = expected = one(sum_tree.init(capacity), jnp.arange(capacity), jnp.linspace(0.5, 1.5, capacity))
    for start in {0, 1, 15, capacity // 2, capacity - size}:
        if start + size <= capacity:
            tree = block(tree, jnp.int32(start), start + jnp.arange(2.0, size + 2.0))
            expected = one(expected, start + jnp.arange(size), start + jnp.arange(2.0, size + 2.0))
            consistent(tree)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), tree, expected)


def test_draws_follow_the_priorities():
    priority = np.array([0.0, 1.0, 2.0, 0.0, 3.0] + [0.0] * 40 + [4.0], np.float32)
    tree = sum_tree.update(sum_tree.init(len(priority)), jnp.arange(len(priority)), jnp.asarray(priority))
    keys = jax.random.split(jax.random.key(0), 2000)
    index, drawn = jax.jit(jax.vmap(lambda key: sum_tree.sample(key, tree, 5)))(keys)
    frequency = np.bincount(np.asarray(index).ravel(), minlength=len(priority)) / index.size
    np.testing.assert_allclose(frequency, priority / priority.sum(), atol=0.015)
    np.testing.assert_array_equal(np.asarray(drawn), priority[np.asarray(index)])


def test_an_item_of_priority_zero_is_never_drawn():
    """Priorities over ten orders of magnitude make float32 sums round; none of it may reach an empty item."""
    rng = np.random.default_rng(0)
    capacity = 5000
    priority = (10.0 ** rng.uniform(-6, 4, capacity) * (rng.random(capacity) < 0.3)).astype(np.float32)
    tree = sum_tree.update(sum_tree.init(capacity), jnp.arange(capacity), jnp.asarray(priority))
    keys = jax.random.split(jax.random.key(1), 500)
    index, _ = jax.jit(jax.vmap(lambda key: sum_tree.sample(key, tree, 128)))(keys)
    assert (priority[np.asarray(index)] > 0).all()


def test_the_last_target_of_all_still_finds_an_item(monkeypatch):
    # The largest value that a uniform draw can take, and 1 itself, which rounding of a stratum can give.
    tree = sum_tree.update(sum_tree.init(40), jnp.arange(3), jnp.asarray([0.3, 0.7, 0.1]))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.ones(shape, dtype))
    index, priority = sum_tree.sample(jax.random.key(0), tree, 4)
    assert (np.asarray(priority) > 0).all()
    assert index[-1] == 2
