"""The C++ kernel of Adam takes optax's steps, whatever the vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrl import optim
from jrl.bench import work
from jrl.native import adam

SHAPES = {"kernel": (5, 7), "bias": (7,), "scale": (), "head": [(3, 3), (16,)]}


def tree(seed, members=()):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(key, (*members, *s)) for key, s in zip(keys, leaves, strict=True)]
    )


def steps(kernels, start, max_grad_norm, num=20):
    """The parameters after every step, and the optimiser's last state; of gradients that do not follow from them."""
    optimizer = optim.adam(1e-2, max_grad_norm=max_grad_norm, kernels=kernels)

    def step(carry, t):
        params, state = carry
        grads = jax.tree.map(lambda x: jnp.sin(3 * x + t) * (1 + t), start)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optim.global_norm(grads, kernels))

    return jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(num, dtype=jnp.float32))


@pytest.mark.parametrize("max_grad_norm", [None, 1e9, 1.0])
def test_steps_are_those_of_optax(max_grad_norm):
    ours, theirs = (steps(kernels, tree(0), max_grad_norm) for kernels in ("native", "xla"))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_members_side_by_side_are_those_alone_bit_for_bit():
    params = tree(1, members=(3,))
    together = jax.jit(jax.vmap(lambda params: steps("native", params, 1.0, 3)))(params)
    for i in range(3):
        alone = jax.jit(lambda params: steps("native", params, 1.0, 3))(
            jax.tree.map(lambda leaf, i=i: leaf[i], params)
        )
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), together, alone)


def test_what_it_was_given_is_not_overwritten():
    """Although its results may take the memory of its arguments."""
    grads, first, second = [jnp.ones(9)], jnp.ones(9), jnp.ones(9)
    numbers = adam.Numbers(*(jnp.float32(1) for _ in adam.Numbers._fields))
    _, first_after, second_after = adam.update(grads, first, second, numbers, eps=1e-5)
    for given in (*grads, first, second):
        np.testing.assert_array_equal(given, np.ones(9))
    np.testing.assert_allclose(first_after, np.ones(9), rtol=1e-6)
    np.testing.assert_allclose(second_after, np.ones(9), rtol=1e-6)


def test_gradients_of_any_size_are_those_of_xla():
    """From none over one whose square is 0 to one whose square is infinite: square roots are made of estimates."""
    sizes = np.concatenate([[0.0, 1e-30, 3e19], np.logspace(-18, 18, 60)]).astype(np.float32)
    numbers = adam.Numbers(*(jnp.float32(x) for x in (1, np.inf, 1e-3, 0.1, 0.001)))
    first, second = np.zeros_like(sizes), np.zeros_like(sizes)
    found = adam.update([jnp.asarray(sizes)], jnp.asarray(first), jnp.asarray(second), numbers, eps=1e-5)
    expected = jax.jit(adam.reference_update)(first, second, *numbers, sizes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (found[1], found[2], found[0][0]), expected
    )


def test_a_gradient_that_is_no_number_is_seen():
    optimizer = optim.adam(1e-2, max_grad_norm=1.0, kernels="native")
    params = tree(2)
    grads = jax.tree.map(jnp.ones_like, params) | {"bias": jnp.full(7, jnp.nan)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(updates))


def test_large_networks_and_other_numbers_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(optim, "FLAT_UP_TO", 10)
    ours, theirs = (steps(kernels, tree(0), 1.0, 3) for kernels in ("native", "xla"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    monkeypatch.undo()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(0))
    optimizer = optim.adam(1e-2, max_grad_norm=1.0, kernels="native")
    updates, _ = optimizer.update(half, optimizer.init(half), half)
    assert updates["bias"].dtype == jnp.bfloat16


def test_an_optimiser_of_ones_own_stays():
    def own(hparams, learning_rate):
        return optax.sgd(learning_rate)

    assert optim.by_kernels(own, "native") is own
    assert optim.by_kernels(optim.default_optimizer, "xla") is optim.default_optimizer
    assert optim.by_kernels(optim.default_optimizer, "native") is not optim.default_optimizer


def test_its_work_is_counted_as_that_of_xla():
    grads = jax.tree.leaves(tree(0, members=(2,)))
    size = sum(leaf.size for leaf in grads)
    assert work.count(jax.vmap(lambda *grads: adam.norm(grads)), *grads).elementwise >= 2 * size
    moments = jnp.ones((2, size // 2))
    numbers = adam.Numbers(*(jnp.ones(2) for _ in adam.Numbers._fields))

    def update(numbers, first, second, *grads):
        return adam.update(grads, first, second, numbers, eps=1e-5)

    counted = work.count(jax.vmap(update), numbers, moments, moments, *grads)
    assert counted.transcendentals == size
    assert counted.elementwise >= 10 * size
