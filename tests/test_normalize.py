"""Running statistics against NumPy on everything seen, reward scaling against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.normalize import (
    denormalize,
    init_reward_scaling,
    init_statistics,
    normalize,
    scale_reward,
    update_statistics,
    variance,
)
from jrl.types import MaskedObservation

SPEC = {"image": jax.ShapeDtypeStruct((2, 3), jnp.uint8), "speed": jax.ShapeDtypeStruct((), jnp.float32)}


def samples(rng, *lead):
    return {
        "image": rng.integers(0, 255, (*lead, 2, 3)).astype(np.uint8),
        "speed": rng.normal(3.0, 0.5, lead).astype(np.float32),
    }


def test_the_start_changes_nothing():
    statistics = init_statistics(SPEC)
    x = {"image": jnp.ones((4, 2, 3), jnp.uint8), "speed": jnp.array([-3.0, 0.0, 5.0, 20.0])}
    out = normalize(statistics, x)
    np.testing.assert_allclose(out["image"], 1.0, rtol=1e-6)
    assert out["image"].dtype == jnp.float32
    np.testing.assert_allclose(out["speed"], [-3.0, 0.0, 5.0, 10.0], rtol=1e-6)
    np.testing.assert_allclose(normalize(statistics, x, clip=None)["speed"][3], 20.0, rtol=1e-6)


@pytest.mark.parametrize("leads", [[(7,), (3,)], [(4, 5), (2, 3)], [(), (6,), (1, 1, 2)]])
def test_batches_of_any_leading_shape(leads):
    rng = np.random.default_rng(0)
    batches = [samples(rng, *lead) for lead in leads]
    statistics = init_statistics(SPEC)
    for batch in batches:
        statistics = jax.jit(update_statistics)(statistics, batch)
    for name, shape in (("image", (2, 3)), ("speed", ())):
        everything = np.concatenate([b[name].reshape(-1, *shape) for b in batches]).astype(np.float64)
        assert float(statistics.count) == len(everything)
        np.testing.assert_allclose(statistics.mean[name], everything.mean(0), rtol=1e-5)
        np.testing.assert_allclose(variance(statistics)[name], everything.var(0), rtol=1e-4)
        x = batches[0][name]
        np.testing.assert_allclose(
            normalize(statistics, batches[0])[name],
            (x - everything.mean(0)) / everything.std(0),
            rtol=1e-3,
            atol=1e-3,
        )


def test_a_mean_far_above_the_spread():
    rng = np.random.default_rng(1)
    x = rng.normal(1e4, 1.0, (20, 256)).astype(np.float32)
    statistics = init_statistics(jax.ShapeDtypeStruct((), jnp.float32))
    for batch in x:
        statistics = update_statistics(statistics, batch)
    once = update_statistics(init_statistics(jax.ShapeDtypeStruct((), jnp.float32)), x)
    exact = x.astype(np.float64)
    for s in (statistics, once):
        np.testing.assert_allclose(s.mean, exact.mean(), atol=2e-3)
        np.testing.assert_allclose(variance(s), exact.var(), rtol=1e-3)


def test_a_constant_has_no_variance():
    statistics = update_statistics(init_statistics(jax.ShapeDtypeStruct((), jnp.float32)), jnp.full(100, 0.1))
    np.testing.assert_allclose(normalize(statistics, jnp.float32(0.1)), 0.0, atol=1e-2)
    assert abs(float(normalize(statistics, jnp.float32(5.0)))) == 10.0


def test_a_mask_is_left_alone():
    mask = jnp.array([[True, False], [False, True]])
    x = MaskedObservation(jnp.array([[1.0], [5.0]]), mask)
    spec = MaskedObservation(jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.bool_))
    statistics = update_statistics(init_statistics(spec), x)
    out = normalize(statistics, x)
    np.testing.assert_allclose(out.obs, [[-1.0], [1.0]], rtol=1e-6)
    assert out.action_mask is mask
    np.testing.assert_allclose(denormalize(statistics, out).obs, x.obs, rtol=1e-6)


def test_denormalize_is_the_inverse():
    rng = np.random.default_rng(2)
    x = {"a": rng.normal(5.0, 3.0, (9, 4)).astype(np.float32)}
    statistics = update_statistics(init_statistics({"a": jax.ShapeDtypeStruct((4,), jnp.float32)}), x)
    back = denormalize(statistics, normalize(statistics, x, clip=None))
    np.testing.assert_allclose(back["a"], x["a"], rtol=1e-5, atol=1e-5)


def test_an_empty_batch_changes_nothing():
    statistics = init_statistics(SPEC)
    jax.tree.map(
        np.testing.assert_array_equal,
        update_statistics(statistics, samples(np.random.default_rng(0), 0)),
        statistics,
    )


def test_statistics_refuse_other_shapes():
    statistics = init_statistics(SPEC)
    wrong = {"image": jnp.zeros((4, 3, 2)), "speed": jnp.zeros(4)}
    with pytest.raises(ValueError, match=r"shape \(2, 3\) got a leaf\['image'\] of shape \(4, 3, 2\)"):
        normalize(statistics, wrong)
    uneven = {"image": jnp.zeros((4, 2, 3)), "speed": jnp.zeros(5)}
    with pytest.raises(ValueError, match="share their leading axes"):
        update_statistics(statistics, uneven)


@pytest.mark.parametrize("clip", [10.0, 0.5, None])
def test_reward_scaling_against_a_loop(clip):
    rng = np.random.default_rng(3)
    gamma, num_envs = 0.95, 3
    state, seen, running = init_reward_scaling(num_envs), [], np.zeros(num_envs)
    update = jax.jit(lambda s, r, d, c, g: scale_reward(s, r, d, c, gamma=g, clip=clip))
    for _ in range(3):
        reward = rng.normal(2.0, 3.0, (8, num_envs)).astype(np.float32)
        terminated, truncated = rng.random((2, 8, num_envs)) < 0.2
        state, scaled = update(state, reward, terminated, truncated, gamma)
        for t in range(8):
            running = gamma * running + reward[t]
            seen.append(running)
            running = np.where(terminated[t] | truncated[t], 0.0, running)
        expected = reward / np.sqrt(np.var(seen) + 1e-8)
        if clip is not None:
            expected = np.clip(expected, -clip, clip)
        np.testing.assert_allclose(scaled, expected, rtol=1e-4)
        np.testing.assert_allclose(state.running_return, running, rtol=1e-4, atol=1e-5)


def test_the_reward_of_the_last_step_counts_before_the_zero():
    """One-step episodes of reward ±2: every running return is the reward, so the scale is 2."""
    reward = jnp.array([[2.0, -2.0]] * 5)
    ends, goes_on = jnp.ones((5, 2), bool), jnp.zeros((5, 2), bool)
    for flags in ((ends, goes_on), (goes_on, ends), (ends, ends)):
        state, scaled = scale_reward(init_reward_scaling(2), reward, *flags, gamma=0.99)
        np.testing.assert_allclose(scaled, reward / 2.0, rtol=1e-6)
        np.testing.assert_array_equal(state.running_return, 0.0)


def test_reward_scaling_in_two_blocks_carries_the_return():
    rng = np.random.default_rng(4)
    reward = rng.normal(size=(10, 2)).astype(np.float32)
    ended = rng.random((10, 2)) < 0.2
    none = np.zeros_like(ended)
    whole, _ = scale_reward(init_reward_scaling(2), reward, ended, none, gamma=0.9)
    first, _ = scale_reward(init_reward_scaling(2), reward[:4], ended[:4], none[:4], gamma=0.9)
    second, _ = scale_reward(first, reward[4:], ended[4:], none[4:], gamma=0.9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, second)


def test_reward_scaling_refusals():
    state = init_reward_scaling(2)
    flags = jnp.zeros((4, 2), bool)
    with pytest.raises(ValueError, match=r"reward has shape \(4,\), expected \[T, B\] with B = 2"):
        scale_reward(state, jnp.zeros(4), flags, flags, gamma=0.9)
    with pytest.raises(ValueError, match="must share a shape"):
        scale_reward(state, jnp.zeros((4, 2)), flags[:3], flags, gamma=0.9)


def test_types_are_stable_in_a_scan():
    def step(carry, x):
        statistics, scaling = carry
        statistics = update_statistics(statistics, {"image": jnp.ones((2, 2, 3)), "speed": x})
        scaling, scaled = scale_reward(scaling, x[None], x[None] > 0, x[None] > 1, gamma=0.9)
        return (statistics, scaling), scaled

    carry = (init_statistics(SPEC), init_reward_scaling(2))
    _, scaled = jax.lax.scan(step, carry, jnp.ones((3, 2)))
    assert scaled.shape == (3, 1, 2)
