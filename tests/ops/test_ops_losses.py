"""Losses against loops over single samples, and against pinned numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

SHAPES = [(7,), (2, 5)]


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def draw(seed, shape, count):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_ppo_losses_and_diagnostics(shape):
    new, old, advantage = draw(0, shape, 3)
    new = old + 0.3 * (new - old)
    surrogate, outside, kl = [], [], []
    rows = zip(*(np.asarray(x, np.float64).ravel() for x in (new, old, advantage)), strict=True)
    for lp, lp_old, adv in rows:
        ratio = np.exp(lp - lp_old)
        surrogate.append(min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv))
        outside.append(abs(ratio - 1) > 0.2)
        kl.append((ratio - 1) - np.log(ratio))

    @jax.jit
    def all_three(new, old, advantage):
        return (
            ops.ppo_clip_loss(new, old, advantage, 0.2),
            ops.clip_fraction(new, old, 0.2),
            ops.approx_kl(new, old),
        )

    for actual, desired in zip(all_three(new, old, advantage), (surrogate, outside, kl), strict=True):
        close(actual, np.mean(desired) * (-1 if desired is surrogate else 1))


def test_ppo_gradient_is_that_of_the_policy_gradient_at_ratio_one_and_zero_beyond_the_clip():
    old, advantage = draw(1, (6,), 2)
    grad = jax.grad(ops.ppo_clip_loss)
    close(grad(old, old, advantage, 0.2), -advantage / 6)
    beyond = old + jnp.sign(advantage)
    close(grad(beyond, old, advantage, 0.2), jnp.zeros(6))


def test_the_kl_penalty_and_its_coefficient():
    new, old, advantage = draw(4, (6,), 3)
    expected = -np.mean(np.exp(np.float64(new) - np.float64(old)) * np.float64(advantage)) + 0.7 * 0.3
    close(ops.ppo_kl_loss(new, old, advantage, jnp.float32(0.3), 0.7), expected)
    for kl, coefficient in ((0.031, 6.0), (0.029, 3.0), (0.014, 3.0), (0.013, 1.5), (0.0, 1.5)):
        close(ops.adapted_kl_coef(3.0, jnp.float32(kl), 0.02), coefficient)
    close(ops.adapted_kl_coef(1e-6, jnp.float32(0.0), 0.02), 1e-6)


def test_approx_kl_keeps_its_precision_near_zero_and_is_never_negative():
    small = jnp.full(4, 1e-4)
    np.testing.assert_allclose(ops.approx_kl(small, jnp.zeros(4)), 5e-9, rtol=0.05)
    new, old = draw(2, (50,), 2)
    assert ops.approx_kl(new, old) > 0
    assert ops.approx_kl(new, new) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_value_losses(shape):
    value, old, target = draw(3, shape, 3)
    plain, clipped = [], []
    rows = zip(*(np.asarray(x, np.float64).ravel() for x in (value, old, target)), strict=True)
    for v, v_old, g in rows:
        plain.append(0.5 * (v - g) ** 2)
        near = v_old + min(max(v - v_old, -0.3), 0.3)
        clipped.append(0.5 * max((v - g) ** 2, (near - g) ** 2))
    close(ops.value_loss(value, target), np.mean(plain))
    close(ops.clipped_value_loss(value, old, target, 0.3), np.mean(clipped))


def test_standardize_and_explained_variance():
    x, value = draw(4, (4, 8), 2)
    unit = ops.standardize(3 * x + 5)
    close(unit.mean(), 0.0)
    close(unit.std(), 1.0)
    np.testing.assert_array_equal(ops.standardize(jnp.full(5, 3.0)), 0.0)
    close(ops.explained_variance(value, x), 1 - np.var(np.asarray(x - value)) / np.var(np.asarray(x)))
    close(ops.explained_variance(x, x), 1.0)
    close(ops.explained_variance(jnp.zeros_like(x), x), 0.0)
    constant = jnp.ones_like(x)
    assert ops.explained_variance(x, constant) == 0.0
    assert np.isfinite(jax.grad(ops.explained_variance)(x, constant)).all()


@pytest.mark.parametrize("number", [0.1, -7.7, 100.1, 123456.7])
def test_what_is_constant_does_not_vary_by_the_rounding_of_its_mean(number):
    constant, value = jnp.full(1000, number), jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_array_equal(jax.jit(ops.standardize)(constant), 0.0)
    assert jax.jit(ops.explained_variance)(value, constant) == 0.0
    # A reward that is always the same, as the target of one step: an advantage and the value that it was taken from.
    assert jax.jit(ops.explained_variance)(value, (constant - value) + value) == 0.0
    assert jnp.isnan(ops.standardize(constant.at[0].set(jnp.nan))).all()
    little = constant.at[0].add(abs(number) * 1e-4)
    np.testing.assert_allclose(ops.standardize(little, 0.0)[0], np.sqrt(999), rtol=0.05)


@pytest.mark.parametrize("delta", [1.0, 0.5])
def test_huber(delta):
    x = jnp.asarray([-3.0, -delta, -0.2, 0.0, 0.1, delta, 2.0])
    desired = [0.5 * v * v if abs(v) <= delta else delta * (abs(v) - 0.5 * delta) for v in np.asarray(x)]
    close(ops.huber(x, delta), desired)
    slope = jax.vmap(jax.grad(ops.huber), (0, None))(x, delta)
    close(slope, np.clip(x, -delta, delta))


@pytest.mark.parametrize("shape", SHAPES)
def test_q_targets_and_td_error(shape):
    reward, discount = draw(5, shape, 2)
    q, online, target_q = draw(6, (*shape, 3), 3)
    action = jnp.asarray(np.random.default_rng(7).integers(3, size=shape))

    @jax.jit
    def all_three(reward, discount, q, online, target_q, action):
        single = ops.q_target(reward, discount, target_q)
        double = ops.double_q_target(reward, discount, online, target_q)
        return single, double, ops.td_error(q, action, single)

    single, double, error = all_three(reward, discount, q, online, target_q, action)
    for i in np.ndindex(*shape):
        best, chosen = max(target_q[i]), target_q[i][int(np.argmax(online[i]))]
        close(single[i], reward[i] + discount[i] * best)
        close(double[i], reward[i] + discount[i] * chosen)
        close(error[i], single[i] - q[i][action[i]])


def test_gradients_flow_through_the_chosen_action_only():
    q, next_q = draw(8, (5, 3), 2)
    action, ones = jnp.array([0, 1, 2, 1, 0]), jnp.ones(5)

    def loss(q, next_q):
        return ops.td_error(q, action, ops.double_q_target(ones, ones, next_q, next_q)).sum()

    grad_q, grad_next = jax.grad(loss, (0, 1))(q, next_q)
    np.testing.assert_array_equal(grad_q, -np.eye(3)[np.asarray(action)])
    np.testing.assert_array_equal(grad_next, 0.0)


def test_masked_successors_are_not_chosen_and_a_terminal_all_masked_one_is_harmless():
    next_q = ops.masked(jnp.array([[9.0, 1.0], [5.0, 5.0]]), jnp.array([[False, True], [False, False]]))
    reward, discount = jnp.ones(2), jnp.array([0.5, 0.0])
    np.testing.assert_array_equal(ops.q_target(reward, discount, next_q), [1.5, 1.0])
    np.testing.assert_array_equal(ops.double_q_target(reward, discount, next_q, next_q), [1.5, 1.0])


def test_pinned_values():
    ratio = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5]))
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0])
    close(ops.ppo_clip_loss(ratio, jnp.zeros(4), advantage, 0.2), -(1.2 + 0.5 - 1.5 - 0.8) / 4)
    close(ops.clip_fraction(ratio, jnp.zeros(4), 0.2), 1.0)
    close(ops.value_loss(jnp.array([1.0, 3.0]), jnp.zeros(2)), 2.5)
    close(ops.clipped_value_loss(jnp.array([1.0]), jnp.zeros(1), jnp.array([1.0]), 0.25), 0.5 * 0.75**2)
    close(ops.huber(jnp.array([0.5, -3.0])), [0.125, 2.5])


def test_vmapped_equals_looped():
    new, old, advantage = draw(9, (4, 6), 3)
    swept = jax.vmap(ops.ppo_clip_loss, (0, 0, 0, 0))(new, old, advantage, jnp.array([0.1, 0.2, 0.3, 0.4]))
    for i in range(4):
        close(swept[i], ops.ppo_clip_loss(new[i], old[i], advantage[i], 0.1 * (i + 1)))


def test_errors_name_the_argument():
    x = jnp.ones(3)
    with pytest.raises(AssertionError, match=r"target \[3, 1\]"):
        ops.value_loss(x, x[:, None])
    with pytest.raises(AssertionError, match="action must be integer"):
        ops.td_error(jnp.ones((3, 2)), x, x)
    with pytest.raises(AssertionError, match=r"action \[3\] must be q \[4, 2\] without its last axis"):
        ops.select_action(jnp.ones((4, 2)), jnp.zeros(3, int))
