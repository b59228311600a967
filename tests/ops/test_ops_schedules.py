"""Schedules at their end points, in between, off, and with every number traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

SHAPES = {
    "linear": (ops.linear_schedule, lambda f, s, e: s + f * (e - s)),
    "quadratic": (
        functools.partial(ops.polynomial_schedule, power=2.0),
        lambda f, s, e: e + (s - e) * (1 - f) ** 2,
    ),
    "cosine": (ops.cosine_schedule, lambda f, s, e: e + (s - e) * 0.5 * (1 + np.cos(np.pi * f))),
    "exponential": (ops.exponential_schedule, lambda f, s, e: s * (e / s) ** f),
}
# Differences of these are not exact in float32.
START, END = np.float32(0.3), np.float32(0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_the_curve_and_its_exact_ends(name):
    schedule, formula = SHAPES[name]
    count = jnp.arange(0, 40)
    actual = jax.jit(lambda c: schedule(c, start=START, end=END, duration=21, begin=10))(count)
    fraction = np.clip((np.asarray(count) - 10) / 21, 0, 1)
    np.testing.assert_allclose(actual, formula(fraction, START, END), rtol=2e-5)
    np.testing.assert_array_equal(actual[:11], START)
    np.testing.assert_array_equal(actual[31:], END)
    assert actual.dtype == jnp.float32


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("duration", [0, -5.0])
def test_no_duration_means_constant_at_start(name, duration):
    schedule, _ = SHAPES[name]
    count = jnp.array([0, 1, 1000])
    np.testing.assert_array_equal(schedule(count, start=START, end=END, duration=duration), START)


@pytest.mark.parametrize("name", SHAPES)
def test_every_number_may_be_swept_without_compiling_again(name):
    schedule, formula = SHAPES[name]

    @jax.jit
    @jax.vmap
    def swept(count, start, end, duration, begin):
        return schedule(count, start=start, end=end, duration=duration, begin=begin)

    rng = np.random.default_rng(0)
    for _ in range(2):
        start, end = rng.uniform(0.1, 1, (2, 5)).astype(np.float32)
        duration, begin = rng.uniform(1, 50, 5), rng.uniform(0, 9, 5)
        actual = swept(jnp.full(5, 20), start, end, duration, begin)
        np.testing.assert_allclose(
            actual, formula(np.clip((20 - begin) / duration, 0, 1), start, end), rtol=1e-4
        )
    assert swept._cache_size() == 1


def test_large_counts_end_exactly():
    begin, duration = 2**24 + 1, 2**24 + 3
    count = jnp.array([begin, begin + duration - 1, begin + duration, 2**31 - 1])
    fraction = ops.elapsed_fraction(count, duration=duration, begin=begin)
    assert fraction[0] == 0.0
    np.testing.assert_array_equal(fraction[2:], 1.0)
    assert ops.linear_schedule(jnp.float32(2**40), start=START, end=END, duration=1e6) == END


def test_an_unsigned_count_does_not_wrap_below_the_beginning():
    for count in (jnp.uint32(5), np.uint64(5), 5, 5.0):
        fraction = ops.linear_schedule(count, start=1.0, end=0.0, duration=100, begin=10)
        assert fraction == 1.0


def test_linear_is_exact_at_both_ends():
    np.testing.assert_array_equal(ops.linear(START, END, jnp.array([0.0, 1.0])), [START, END])


def test_gradients_with_respect_to_the_end_points_are_finite():
    for schedule, _ in SHAPES.values():
        for count in (0, 5, 10, 50):
            for duration in (10.0, 0.0):

                def value(start, end, schedule=schedule, count=count, duration=duration):
                    return schedule(count, start=start, end=end, duration=duration)

                assert np.isfinite(jax.grad(value, (0, 1))(0.3, 0.1)).all()


def test_warmup_cosine():
    numbers = {"start": 0.0, "peak": 0.4, "end": 0.1, "duration": 30}
    count = jnp.array([0, 5, 10, 20, 30, 99])
    actual = jax.jit(lambda c, w: ops.warmup_cosine_schedule(c, warmup=w, **numbers))(count, 10)
    np.testing.assert_allclose(actual, [0.0, 0.2, 0.4, 0.25, 0.1, 0.1], rtol=1e-6, atol=1e-8)
    for warmup in (0, -3):
        actual = ops.warmup_cosine_schedule(count, warmup=warmup, **numbers)
        desired = ops.cosine_schedule(count, start=0.4, end=0.1, duration=30)
        np.testing.assert_array_equal(actual, desired)


def test_piecewise():
    schedule = functools.partial(
        ops.piecewise_schedule, boundaries=jnp.array([10, 20]), values=jnp.array([1.0, 0.5, 0.25])
    )
    counts = jnp.array([0, 9, 10, 19, 20, 10**6])
    np.testing.assert_array_equal(jax.vmap(schedule)(counts), [1, 1, 0.5, 0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="2 values for 2 boundaries"):
        ops.piecewise_schedule(0, boundaries=[1, 2], values=jnp.ones(2))
