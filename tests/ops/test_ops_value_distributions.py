"""Value distributions against loops over single atoms, by identities, and against pinned numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

SUPPORT = jnp.linspace(-2.0, 4.0, 7)  # spacing 1


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-6)


def mass(seed, shape, spread=3.0):
    """Atoms and their probabilities, ``[..., M]``."""
    rng = np.random.default_rng(seed)
    probability = rng.random(shape)
    return (
        jnp.asarray(rng.normal(1.0, spread, shape), jnp.float32),
        jnp.asarray(probability / probability.sum(-1, keepdims=True), jnp.float32),
    )


def project(value, probability, support):
    """Algorithm 1 of the C51 paper, one atom at a time."""
    value, probability, support = (np.asarray(x, np.float64) for x in (value, probability, support))
    spacing = support[1] - support[0]
    out = np.zeros((*value.shape[:-1], len(support)))
    for row in np.ndindex(value.shape[:-1]):
        for v, p in zip(value[row], probability[row], strict=True):
            b = (min(max(v, support[0]), support[-1]) - support[0]) / spacing
            lower, upper = int(np.floor(b)), int(np.ceil(b))
            if lower == upper:
                out[row][lower] += p
            else:
                out[row][lower] += p * (upper - b)
                out[row][upper] += p * (b - lower)
    return out


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 11)])
def test_projection_equals_a_loop_over_atoms_and_keeps_the_mass(shape):
    value, probability = mass(0, shape)
    value = value.at[..., 0].set(SUPPORT[2]).at[..., 1].set(100.0).at[..., 2].set(-100.0)
    projected = jax.jit(ops.categorical_projection)(value, probability, SUPPORT)
    close(projected, project(value, probability, SUPPORT))
    close(projected.sum(-1), np.ones(shape[:-1]))


def test_projection_keeps_the_mean_where_nothing_is_clipped_and_the_distribution_where_atoms_fit():
    value, probability = mass(1, (4, 6), spread=0.5)
    inside = jnp.clip(value, SUPPORT[0], SUPPORT[-1])
    projected = ops.categorical_projection(inside, probability, SUPPORT)
    close((projected * SUPPORT[None]).sum(-1), (inside * probability).sum(-1))
    _, probability = mass(2, (4, 7))
    same = ops.categorical_projection(jnp.broadcast_to(SUPPORT, (4, 7)), probability, SUPPORT)
    close(same, probability)
    # Contracted to one point: a terminated step, whose value is its reward.
    terminal = ops.categorical_projection(jnp.full((1, 7), 1.25), probability[:1], SUPPORT)
    close(terminal, [[0, 0, 0, 0.75, 0.25, 0, 0]])


def test_projection_refuses_what_is_no_support():
    with pytest.raises(ValueError, match=r"support of shape \(1,\); give at least two atoms"):
        ops.categorical_projection(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(1))
    with pytest.raises(AssertionError, match=r"must share one shape: value \[2, 3\], probability \[2, 4\]"):
        ops.categorical_projection(jnp.zeros((2, 3)), jnp.zeros((2, 4)), SUPPORT)


def test_categorical_mean_and_cross_entropy():
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    _, target = mass(4, (2, 3, 7))
    mean, entropy, p_target, support = (
        np.zeros((2, 3)),
        np.zeros((2, 3)),
        np.asarray(target),
        np.asarray(SUPPORT),
    )
    for row in np.ndindex(2, 3):
        p = np.exp(np.asarray(logits, np.float64)[row])
        p /= p.sum()
        mean[row] = sum(p[k] * float(support[k]) for k in range(7))
        entropy[row] = -sum(float(p_target[row][k]) * np.log(p[k]) for k in range(7))
    close(ops.categorical_mean(logits, SUPPORT), mean)
    close(ops.categorical_cross_entropy(logits, target), entropy)
    # The gradient in the logits is the difference of the distributions: 0 at the target.
    grad = jax.grad(lambda x: ops.categorical_cross_entropy(x, target).sum())(logits)
    close(grad, jax.nn.softmax(logits) - target)


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_quantile_huber_loss_equals_a_loop(delta):
    rng = np.random.default_rng(5)
    quantile, target = (rng.normal(size=(3, n)).astype(np.float32) for n in (4, 6))
    fraction = rng.random((3, 4)).astype(np.float32)
    expected = np.zeros(3)
    for row in range(3):
        for i in range(4):
            for j in range(6):
                u = float(target[row, j]) - float(quantile[row, i])
                loss = 0.5 * u * u if abs(u) <= delta else delta * (abs(u) - 0.5 * delta)
                expected[row] += abs(float(fraction[row, i]) - (u < 0)) * loss / delta / 6
    close(jax.jit(ops.quantile_huber_loss)(quantile, fraction, target, delta), expected)
    shared = ops.quantile_huber_loss(quantile, fraction[0], target, delta)
    close(shared[0], expected[0])


def test_the_minimiser_of_a_sharp_quantile_loss_is_the_quantile():
    """Gradient descent on five quantiles of 1,001 samples ends at the empirical ones."""
    target = jnp.asarray(np.random.default_rng(6).exponential(size=(1, 1001)), jnp.float32)
    fraction = ops.quantile_midpoints(5)
    close(fraction, [0.1, 0.3, 0.5, 0.7, 0.9])

    def descend(quantile, i):
        grad = jax.grad(lambda q: ops.quantile_huber_loss(q, fraction, target, 1e-3)[0])(quantile)
        return quantile - 0.5 * 0.99**i * grad, None

    quantile, _ = jax.lax.scan(descend, jnp.zeros((1, 5)), jnp.arange(800.0))
    np.testing.assert_allclose(quantile[0], np.quantile(target, fraction), atol=0.02)


def test_no_quantiles_are_refused():
    with pytest.raises(ValueError, match=r"num=0.*at least one quantile"):
        ops.quantile_midpoints(0)


@pytest.mark.parametrize("temperature", [0.03, 1.0])
def test_munchausen_terms_equal_a_loop_and_each_other(temperature):
    rng = np.random.default_rng(7)
    q = rng.normal(size=(6, 4)).astype(np.float32)
    action = rng.integers(0, 4, 6).astype(np.int32)
    log_policy, value, bonus = np.zeros((6, 4)), np.zeros(6), np.zeros(6)
    for row in range(6):
        x = np.asarray(q[row], np.float64)
        total = sum(np.exp((x[a] - x.max()) / temperature) for a in range(4))
        log_policy[row] = x - x.max() - temperature * np.log(total)
        policy = np.exp(log_policy[row] / temperature)
        value[row] = sum(policy[a] * (x[a] - log_policy[row, a]) for a in range(4))
        bonus[row] = 0.9 * min(max(log_policy[row, int(action[row])], -1.0), 0.0)
    close(ops.scaled_log_policy(q, temperature), log_policy)
    close(ops.soft_value(q, temperature), value)
    close(ops.munchausen_bonus(q, action, temperature, 0.9, -1.0), bonus)
    close(ops.soft_value(q, 1e-6), q.max(-1))


def test_munchausen_terms_of_masked_actions_are_finite():
    q = ops.masked(jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([[True, True, False]]))
    log_policy = ops.scaled_log_policy(q, 0.03)
    policy = jnp.exp(log_policy / 0.03)
    assert np.isfinite(log_policy).all()
    assert policy[0, 2] == 0
    close((policy * (jnp.asarray([[1.0, 2.0, 3.0]]) - log_policy)).sum(-1), ops.soft_value(q, 0.03))


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.1])
def test_rescaling_is_its_definition_and_undone_by_its_inverse(eps):
    x = jnp.asarray([-1e4, -30.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 30.0, 1e4], jnp.float32)
    wide = np.asarray(x, np.float64)
    scaled = jax.jit(ops.rescale_value)(x, eps)
    close(scaled, np.sign(wide) * (np.sqrt(np.abs(wide) + 1) - 1) + eps * wide)
    np.testing.assert_allclose(ops.unscale_value(scaled, eps), x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.1])
def test_small_values_are_rescaled_as_exactly_as_large_ones(eps):
    x = jnp.asarray([-1e-8, -1e-5, 0.0, 1e-8, 1e-6, 1e-4, 1e-2], jnp.float32)
    scaled = ops.rescale_value(x, eps)
    np.testing.assert_allclose(ops.unscale_value(scaled, eps), x, rtol=1e-6)
    # The slope of the inverse is the inverse of the slope, at 0 too.
    slope = jax.vmap(jax.grad(ops.rescale_value), (0, None))(x, eps)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(ops.unscale_value), (0, None))(scaled, eps), 1 / slope, rtol=1e-6
    )
