"""The C++ kernels of distributions over returns are another way to compute C51's head, whatever the vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import rainbow
from jrl.algos import q_functions
from jrl.bench import work
from jrl.native import categorical

SIZES = [(6, 3, 51), (1, 2, 2), (5, 1, 8), (4, 2, 33)]  # N, A, K: with whole vectors and without


def drawn(n, a, k, members=()):
    """Logits, Q, rewards, discounts, support, actions and a target; some values are beyond the support."""
    rng = np.random.default_rng(k)  # JAX would compile a program for each of the shapes
    logits = 4 * rng.normal(size=(*members, n, a, k))
    q = rng.normal(size=(*members, n, a))
    reward = 3 * rng.normal(size=(*members, n))
    discount = rng.choice([0.0, 0.9, 0.99], (*members, n))
    support = np.broadcast_to(np.linspace(-5.0, 7.0, k), (*members, k))
    action = jnp.asarray(rng.integers(0, a, (*members, n)), jnp.int32)
    target = rng.dirichlet(np.ones(k), (*members, n))
    target[..., 0] = 0.0
    logits, q, reward, discount, support, target = (
        jnp.asarray(leaf, jnp.float32) for leaf in (logits, q, reward, discount, support, target)
    )
    return logits, q, reward, discount, support, action, target


def everything(head, support, logits, q, reward, discount, action, target):
    """All that a head returns, and the gradients of its mean and its loss."""
    mean, pull = jax.vjp(head(support).mean, logits)
    (loss, error), pull_loss = jax.vjp(lambda x: head(support).loss(x, action, target), logits)
    weight = jnp.linspace(0.5, 2.0, loss.size).reshape(loss.shape)
    return (
        mean,
        pull(jnp.ones_like(mean)),
        head(support).target(reward, discount, logits, mean),
        head(support).target(reward, discount, logits, mean, q),
        loss,
        error,
        pull_loss((weight, jnp.zeros_like(error))),
    )


def ours(support):
    return q_functions.categorical(support, "native")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_head_of_c51(size):
    logits, q, reward, discount, support, action, target = drawn(*size)
    args = support, logits, q, reward, discount, action, target
    # Positions among 51 atoms are exact to 4e-6 of an atom.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        *(
            jax.jit(lambda *args, head=head: everything(head, *args))(*args)
            for head in (ours, q_functions.categorical)
        ),
    )


def test_it_is_exact_to_rounding():
    """Against NumPy in double precision, a wide range of logits and a target that is nearly 0 in places."""
    n, k = 200, 51
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=20.0, size=(n, 1, k)).astype(np.float32)
    target = rng.dirichlet(np.full(k, 0.05), n).astype(np.float32)
    support = np.linspace(-100, 100, k, dtype=np.float32)
    x, t = logits[:, 0].astype(np.float64), target.astype(np.float64)
    log_p = x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    entropy = -np.where(t > 0, t * np.log(np.where(t > 0, t, 1.0)), 0.0).sum(-1)
    loss, error = categorical.loss(logits, jnp.zeros(n, jnp.int32), target)
    np.testing.assert_allclose(loss, -(t * log_p).sum(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(error, -(t * log_p).sum(-1) - entropy, rtol=1e-6, atol=2e-6)
    mean = categorical.mean(logits[:, 0], support)
    np.testing.assert_allclose(mean, (np.exp(log_p) * support).sum(-1), rtol=1e-6, atol=1e-5)


def test_its_target_keeps_the_mass_at_the_edges_and_picks_as_argmax_does():
    support = jnp.linspace(-1.0, 1.0, 5)
    logits = jnp.log(jnp.eye(5)[None, :2] + 1e-30).repeat(4, 0)  # certain of -1, or of -0.5
    q = jnp.array([[0.0, 1.0], [1.0, 1.0], [jnp.nan, 1.0], [-jnp.inf, -jnp.inf]])
    reward, discount = jnp.array([0.25, 9.0, -9.0, 0.0]), jnp.ones(4)
    found = categorical.target(logits, q, reward, discount, support)
    expected = [[0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_number_is_no_index():
    """A member that diverges reads and writes nothing that is not its own, and is seen to."""
    logits, q, reward, discount, support, action, target = drawn(3, 2, 9)
    broken = reward.at[1].set(jnp.nan)
    found = categorical.target(logits, q, broken, discount, support)
    assert np.isnan(found[1]).any()
    whole = categorical.target(logits, q, reward, discount, support)
    np.testing.assert_array_equal(found[::2], whole[::2])
    loss, error = categorical.loss(logits.at[1].set(jnp.nan), action, target)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    np.testing.assert_array_equal(np.isnan(error), [False, True, False])
    mean = categorical.mean(logits.at[1, 1, 3].set(jnp.inf), support)
    np.testing.assert_array_equal(np.isnan(mean), [[False, False], [False, True], [False, False]])


def test_members_side_by_side_are_those_alone_bit_for_bit():
    logits, q, reward, discount, support, action, target = drawn(5, 3, 11, members=(4,))
    args = support, logits, q, reward, discount, action, target

    def member(*args):
        return everything(ours, *args)

    together = jax.jit(jax.vmap(member))(*args)
    for i in range(4):
        alone = jax.jit(member)(*(leaf[i] for leaf in args))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), together, alone)


def test_a_step_of_rainbow_is_the_same():
    def step(kernels):
        config = rainbow.Config(
            num_envs=4,
            unroll_length=2,
            batch_size=8,
            capacity=64,
            warmup_env_steps=16,
            hidden_sizes=(16, 12),
            num_atoms=11,
            kernels=kernels,
        )
        algo, hparams = rainbow.make(jrl.make("CartPole-v1"), config), rainbow.HParams()
        state, metrics = jax.jit(algo.step)(jax.jit(algo.init)(jax.random.key(0), hparams), hparams)
        return state.params, {name: metrics[name] for name in ("loss", "td_error", "q", "grad_norm")}

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), step("native"), step("xla")
    )


def test_its_work_is_counted_as_that_of_xla():
    logits, q, reward, discount, support, action, target = drawn(5, 3, 11, members=(2,))
    for function, reference, args in (
        (categorical.mean, categorical.reference_mean, (logits[:, :, 0], support)),
        (categorical.target, categorical.reference_target, (logits, q, reward, discount, support)),
        (categorical.loss, categorical.reference_loss, (logits, action, target)),
    ):
        found, expected = (work.count(jax.vmap(one), *args) for one in (function, reference))
        assert found.transcendentals == expected.transcendentals > 0
        assert found.elementwise == expected.elementwise > 0
