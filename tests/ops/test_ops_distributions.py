"""Distributions: frequencies, densities against NumPy, closed forms against sums and samples, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

BATCH_SHAPES = [(), (3,), (2, 3)]


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def probabilities(logits):
    weight = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def close(actual, desired, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def chi_square(counts, expected):
    possible = expected > 0
    assert np.all(counts[~possible] == 0)
    return np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])


# -------------------------------------------------------------------------------------------- categorical


@pytest.mark.parametrize("num_actions", [1, 2, 6, 40])  # 40 takes the cumulative sum
def test_categorical_frequencies(num_actions):
    rows = 20_000
    logits = draw(0, num_actions)
    if num_actions > 2:
        logits = ops.masked(logits, jnp.arange(num_actions) % 3 != 1)
    many = ops.Categorical(jnp.broadcast_to(logits, (rows, num_actions)))
    action = jax.jit(lambda d, key: d.sample(key))(many, jax.random.key(1))
    assert action.shape == (rows,)
    assert action.dtype == jnp.int32
    expected = rows * probabilities(logits)
    degrees = max(np.sum(expected > 0) - 1, 1)
    statistic = chi_square(np.bincount(action, minlength=num_actions), expected)
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)  # about five standard deviations


@pytest.mark.parametrize("num_actions", [4, 40])
def test_the_largest_and_the_smallest_uniform_draw_possible_actions(num_actions, monkeypatch):
    """Zero weights at both ends; the extreme uniforms must still land between them."""
    mask = jnp.zeros((200, num_actions), bool).at[:, 1 : num_actions - 2].set(True)
    logits = ops.masked(5 * draw(2, 200, num_actions), mask)
    for extreme, index in ((0.0, 1), (1.0 - 2.0**-24, num_actions - 3)):
        monkeypatch.setattr(
            jax.random, "uniform", lambda key, shape, dtype, x=extreme: jnp.full(shape, x, dtype)
        )
        action = ops.Categorical(logits).sample(jax.random.key(0))
        assert np.take_along_axis(np.asarray(mask), np.asarray(action)[:, None], 1).all()
        if index == 1:
            np.testing.assert_array_equal(action, 1)


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_categorical_against_sums(batch):
    p, other = ops.Categorical(draw(3, *batch, 5)), ops.Categorical(draw(4, *batch, 5))
    action = jnp.asarray(np.random.default_rng(5).integers(5, size=batch))

    @jax.jit
    def all_four(p, other, action):
        return p.log_prob(action), p.entropy(), p.mode(), p.kl(other)

    log_prob, entropy, mode, kl = all_four(p, other, action)
    prob, prob_other = probabilities(p.logits), probabilities(other.logits)
    close(log_prob, np.log(np.take_along_axis(prob, np.asarray(action)[..., None], -1))[..., 0])
    close(entropy, -np.sum(prob * np.log(prob), -1))
    np.testing.assert_array_equal(mode, prob.argmax(-1))
    assert mode.dtype == jnp.int32
    close(kl, np.sum(prob * np.log(prob / prob_other), -1))
    close(p.kl(p), np.zeros(batch))


def test_categorical_does_not_mind_a_common_offset():
    logits = jnp.array([0.1, -0.4, 0.7])
    action = jnp.int32(1)
    # A power of two, small enough for the offset sum itself to be nearly exact.
    near, far = ops.Categorical(logits), ops.Categorical(logits + 1024.0)
    close(far.log_prob(action), near.log_prob(action), rtol=2e-4)
    close(far.entropy(), near.entropy(), rtol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_masks_leave_everything_finite(dtype):
    mask = jnp.array([[True, False, True, False], [False, False, True, False], [False] * 4])
    raw, action = draw(6, 3, 4).astype(dtype), jnp.array([0, 2, 1])

    def losses(raw, scale):
        p = ops.Categorical(ops.masked(raw, mask))
        other = ops.Categorical(ops.masked(raw * 2, mask))
        return scale * (p.log_prob(action) + p.entropy() + p.kl(other)).sum().astype(jnp.float32)

    # A scale above 1 would turn 0 · (almost −max) into 0 · −inf on the way back.
    loss, grad = jax.jit(jax.value_and_grad(losses))(raw, 1000.0)
    assert np.isfinite(loss)
    assert np.isfinite(grad.astype(jnp.float32)).all()
    np.testing.assert_array_equal(grad[~mask].astype(jnp.float32), 0.0)

    p = ops.Categorical(ops.masked(raw, mask))
    close(p.entropy()[1:], [0.0, np.log(4)])  # nothing allowed: uniform over all
    disallowed = p.log_prob(jnp.array([1, 1, 1]))
    assert np.isfinite(disallowed).all()
    np.testing.assert_array_equal(np.exp(disallowed[:2]), 0.0)
    assert np.isfinite(p.kl(ops.Categorical(raw))).all()
    assert np.isfinite(ops.Categorical(raw).kl(p)).all()


def test_categorical_gradients_against_the_closed_form():
    logits, action = draw(7, 4, 3), jnp.array([0, 1, 2, 1])
    grad = jax.jit(jax.grad(lambda x: ops.Categorical(x).log_prob(action).sum()))(logits)
    close(grad, np.eye(3)[np.asarray(action)] - probabilities(logits))
    grad = jax.jit(jax.grad(lambda x: ops.Categorical(x).entropy().sum()))(logits)
    p = probabilities(logits)
    entropy = -np.sum(p * np.log(p), -1, keepdims=True)
    close(grad, -p * (np.log(p) + entropy))


def test_categorical_vmapped_equals_looped():
    logits, keys = draw(8, 3, 5, 4), jax.random.split(jax.random.key(0), 3)
    sample = jax.jit(lambda d, key: d.sample(key))
    together = jax.jit(jax.vmap(sample))(ops.Categorical(logits), keys)
    for i in range(3):
        np.testing.assert_array_equal(together[i], sample(ops.Categorical(logits[i]), keys[i]))


# -------------------------------------------------------------------------------------- several categoricals


@pytest.mark.parametrize("ns", [(3, 3), (2, 4, 1)])
@pytest.mark.parametrize("batch", [(), (5,)])
def test_multi_categorical_is_a_product(ns, batch):
    logits, other_logits = draw(9, *batch, sum(ns)), draw(10, *batch, sum(ns))
    cuts = np.cumsum(ns)[:-1]

    @jax.jit
    def whole(p, other, key):
        action = p.sample(key)
        return action, p.log_prob(action), p.entropy(), p.mode(), p.kl(other)

    @jax.jit
    def factors(logits, other_logits, action):
        parts = [ops.Categorical(x) for x in jnp.split(logits, cuts, -1)]
        others = [ops.Categorical(x) for x in jnp.split(other_logits, cuts, -1)]
        return (
            sum(q.log_prob(action[..., i]) for i, q in enumerate(parts)),
            sum(q.entropy() for q in parts),
            jnp.stack([q.mode() for q in parts], -1),
            sum(q.kl(o) for q, o in zip(parts, others, strict=True)),
        )

    p, other = ops.MultiCategorical(logits, ns), ops.MultiCategorical(other_logits, ns)
    action, *answers = whole(p, other, jax.random.key(0))
    assert action.shape == (*batch, len(ns))
    assert action.dtype == jnp.int32
    assert np.all(np.asarray(action) < np.asarray(ns))
    for actual, desired in zip(answers, factors(logits, other_logits, action), strict=True):
        close(actual, desired)


def test_multi_categorical_frequencies():
    ns, rows = (2, 3), 20_000
    logits = ops.masked(draw(11, 5), jnp.array([True, True, True, False, True]))
    action = np.asarray(
        ops.MultiCategorical(jnp.broadcast_to(logits, (rows, 5)), ns).sample(jax.random.key(3))
    )
    first, second = probabilities(logits[:2]), probabilities(logits[2:])
    counts = np.bincount(action[:, 0] * 3 + action[:, 1], minlength=6)
    assert chi_square(counts, rows * np.outer(first, second).ravel()) < 3 + 5 * np.sqrt(6)


def test_multi_categorical_with_masks_and_padding_is_finite_under_vmap_and_grad():
    ns = (2, 4)
    mask = jnp.array([[True, True, False, True, True, False], [False, False, True, False, False, False]])
    action = jnp.array([[1, 2], [0, 0]])

    def loss(logits, mask, action):
        p = ops.MultiCategorical(ops.masked(logits, mask), ns)
        other = ops.MultiCategorical(ops.masked(2 * logits, mask), ns)
        return 1000 * (p.log_prob(action) + p.entropy() + p.kl(other))

    values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(draw(12, 2, 6), mask, action)
    assert np.isfinite(values).all()
    assert np.isfinite(grads).all()
    # A factor that allows nothing is uniform over its own actions, never over the padding.
    padded = ops.MultiCategorical(ops.masked(jnp.zeros((500, 6)), jnp.zeros((500, 6), bool)), ns)
    sampled = padded.sample(jax.random.key(0))
    assert set(np.unique(sampled[:, 0])) == {0, 1}
    close(padded.entropy(), np.full(500, np.log(8)))


def test_multi_categorical_crosses_jit_with_static_sizes():
    p = ops.MultiCategorical(draw(13, 5), (2, 3))
    back = jax.jit(lambda d: d)(p)
    assert back.ns == (2, 3)
    assert len(jax.tree.leaves(p)) == 1
    with pytest.raises(AssertionError, match=r"logits must have shape \[6\], got \[5\]"):
        ops.MultiCategorical(draw(13, 5), (2, 4)).entropy()


# ------------------------------------------------------------------------------------------------- normals


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_normal_against_the_density(batch):
    mean, log_std, action = draw(14, *batch, 4), 0.3 * draw(15, *batch, 4), draw(16, *batch, 4)
    other = ops.Normal(draw(17, *batch, 4), 0.3 * draw(18, *batch, 4))

    @jax.jit
    def all_three(p, other, action):
        return p.log_prob(action), p.entropy(), p.kl(other)

    p = ops.Normal(mean, log_std)
    log_prob, entropy, kl = all_three(p, other, action)
    std, std_o = np.exp(log_std, dtype=np.float64), np.exp(other.log_std, dtype=np.float64)
    density = np.exp(-0.5 * ((action - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    close(log_prob, np.log(density).sum(-1))
    close(entropy, 0.5 * np.log(2 * np.pi * np.e * std**2).sum(-1))
    gap = (std**2 + np.square(mean - other.mean)) / (2 * std_o**2)
    close(kl, (np.log(std_o / std) + gap - 0.5).sum(-1))
    np.testing.assert_array_equal(p.mode(), mean)
    close(p.kl(p), np.zeros(batch))


@pytest.mark.parametrize("kind", [ops.Normal, lambda m, s: ops.TanhNormal(m, s, -1.0, 1.0)])
def test_a_state_independent_log_std_is_the_same_as_a_repeated_one(kind):
    mean, log_std = draw(19, 5, 3), draw(20, 3)
    shared, repeated = kind(mean, log_std), kind(mean, jnp.broadcast_to(log_std, (5, 3)))
    key = jax.random.key(0)
    action = shared.sample(key)
    np.testing.assert_array_equal(action, repeated.sample(key))
    np.testing.assert_array_equal(shared.log_prob(action), repeated.log_prob(action))
    np.testing.assert_array_equal(shared.entropy(), repeated.entropy())
    np.testing.assert_array_equal(shared.kl(repeated), repeated.kl(shared))


def test_normal_sample_moments():
    mean, log_std = jnp.array([1.0, -2.0]), jnp.log(jnp.array([0.5, 2.0]))
    x = ops.Normal(jnp.broadcast_to(mean, (20_000, 2)), log_std).sample(jax.random.key(0))
    np.testing.assert_allclose(x.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(x.std(0), np.exp(log_std), rtol=0.03)


LOW, HIGH = jnp.array([-2.0, 0.0]), jnp.array([2.0, 0.5])


def test_tanh_normal_density_integrates_to_one_and_matches_the_change_of_variables():
    p = ops.TanhNormal(jnp.array([0.4]), jnp.array([-0.3]), -2.0, 1.0)
    grid = np.linspace(-2, 1, 4001)
    middle = (grid[1:] + grid[:-1]) / 2
    log_prob = jax.jit(jax.vmap(p.log_prob))(jnp.asarray(middle, jnp.float32)[:, None])
    assert abs(np.sum(np.exp(log_prob)) * (grid[1] - grid[0]) - 1) < 1e-4
    inner = np.arctanh((middle + 2) / 1.5 - 1)
    std = np.exp(-0.3)
    normal = np.exp(-0.5 * ((inner - 0.4) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    desired = np.log(normal / (1.5 * (1 - np.tanh(inner) ** 2)))
    close(log_prob[10:-10], desired[10:-10], rtol=1e-3, atol=1e-3)


def test_tanh_normal_sample_and_log_prob_agree_with_log_prob():
    p = ops.TanhNormal(draw(21, 500, 2), 0.3 * draw(22, 500, 2), LOW, HIGH)
    key = jax.random.key(0)
    action, log_prob = jax.jit(lambda d, key: d.sample_and_log_prob(key))(p, key)
    np.testing.assert_allclose(action, p.sample(key), rtol=1e-5, atol=1e-6)
    assert np.all((np.asarray(action) >= np.asarray(LOW)) & (np.asarray(action) <= np.asarray(HIGH)))
    np.testing.assert_allclose(log_prob, jax.jit(lambda d, a: d.log_prob(a))(p, action), rtol=2e-3, atol=2e-3)
    close(p.mode(), np.asarray(LOW) + np.asarray(HIGH - LOW) * (np.tanh(p.mean) + 1) / 2)


def test_tanh_normal_far_out_stays_finite_and_in_the_box():
    mean = jnp.array([[60.0, -60.0], [1e4, -1e4]])

    def total(mean, log_std):
        p = ops.TanhNormal(mean, log_std, LOW, HIGH)
        action, log_prob = p.sample_and_log_prob(jax.random.key(0))
        inside = p.log_prob(jax.lax.stop_gradient(action))
        return (log_prob + p.entropy() + inside).sum(), action

    (_, action), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(mean, jnp.zeros(2))
    assert np.all((np.asarray(action) >= np.asarray(LOW)) & (np.asarray(action) <= np.asarray(HIGH)))
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (0.5, 1.0), (-1.5, 2.0), (3.0, 5.0)])
def test_tanh_normal_entropy_against_an_integral(mean, std):
    p = ops.TanhNormal(jnp.array([mean, mean]), jnp.log(jnp.array([std, std])), LOW, HIGH)
    x = np.linspace(mean - 10 * std, mean + 10 * std, 200_001)
    weight = np.exp(-0.5 * ((x - mean) / std) ** 2)
    log_slope = 2 * (np.log(2) - x - np.logaddexp(0, -2 * x))
    slope = np.sum(weight * log_slope) / np.sum(weight)
    desired = 2 * (0.5 * np.log(2 * np.pi * np.e * std**2) + slope) + np.log(2.0) + np.log(0.25)
    np.testing.assert_allclose(p.entropy(), desired, atol=2 * (0.0002 if std <= 2 else 0.03))


def test_tanh_normal_divergence_does_not_depend_on_the_box():
    mean, log_std = draw(23, 2, 4, 2), 0.2 * draw(24, 2, 4, 2)
    p, q = (ops.TanhNormal(m, s, LOW, HIGH) for m, s in zip(mean, log_std, strict=True))
    close(p.kl(q), ops.Normal(p.mean, p.log_std).kl(ops.Normal(q.mean, q.log_std)))
    many = ops.TanhNormal(jnp.broadcast_to(p.mean[0], (20_000, 2)), p.log_std[0], LOW, HIGH)
    same = ops.TanhNormal(jnp.broadcast_to(q.mean[0], (20_000, 2)), q.log_std[0], LOW, HIGH)

    @jax.jit
    def log_ratio(many, same, key):
        action = many.sample(key)
        return many.log_prob(action) - same.log_prob(action)

    estimate = log_ratio(many, same, jax.random.key(0))
    error = 5 * np.std(estimate) / np.sqrt(20_000)
    assert abs(estimate.mean() - p.kl(q)[0]) < error + 0.01
