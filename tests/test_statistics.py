"""Statistics over runs: slow oracles written from the equations, identities, and values worked by hand."""

import itertools
import math

import numpy as np
import pytest

from jrl import statistics

RNG = np.random.default_rng(7)
SHAPES = [(1,), (2,), (3,), (10,), (1, 3), (5, 4), (13, 3)]


def example(shape):
    return np.round(50 * RNG.normal(size=shape), 0)  # rounded: ties happen


# --------------------------------------------------------------------------------------- slow oracles


def slow_iqm(scores):
    ordered = sorted(np.ravel(scores).tolist())
    for _ in range(len(ordered) // 4):
        del ordered[0], ordered[-1]
    return sum(ordered) / len(ordered)


def slow_fractional_iqm(scores):
    """Each score four times: then a quarter is a whole number of copies."""
    ordered = sorted(4 * np.ravel(scores).tolist())
    quarter = len(ordered) // 4
    return sum(ordered[quarter:-quarter]) / (2 * quarter)


def slow_columns(scores):
    matrix = scores[:, None] if scores.ndim == 1 else scores
    return [[matrix[i, j] for i in range(matrix.shape[0])] for j in range(matrix.shape[1])]


def slow_probability(x, y):
    per_task = []
    for column, other in zip(slow_columns(x), slow_columns(y), strict=True):
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(column, other))
        per_task.append(wins / (len(column) * len(other)))
    return sum(per_task) / len(per_task)


def slow_middle(values):
    ordered = sorted(values)
    n = len(ordered)
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aggregates_equal_slow_loops(shape):
    scores = example(shape)
    columns = slow_columns(scores)
    task_means = [sum(column) / len(column) for column in columns]
    assert statistics.mean(scores) == pytest.approx(sum(task_means) / len(task_means), abs=1e-9)
    middle = slow_middle(scores.tolist() if scores.ndim == 1 else task_means)
    assert statistics.median(scores) == pytest.approx(middle, abs=1e-9)
    assert statistics.interquartile_mean(scores) == pytest.approx(slow_iqm(scores), abs=1e-9)
    assert statistics.fractional_interquartile_mean(scores) == pytest.approx(
        slow_fractional_iqm(scores), abs=1e-9
    )
    for target in (-30.0, 0.0, 1e3):
        below = [target - value if value < target else 0.0 for value in scores.ravel()]
        assert statistics.optimality_gap(scores, target) == pytest.approx(sum(below) / len(below), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_profiles_and_improvement_equal_slow_loops(shape):
    scores, other = example(shape), example((4, *shape[1:]))
    thresholds = np.array([-1e9, *np.sort(scores.ravel()), 0.0, 1e9])
    above = [sum(value > tau for value in scores.ravel()) / scores.size for tau in thresholds]
    np.testing.assert_allclose(statistics.performance_profile(scores, thresholds), above, atol=1e-12)
    means = [sum(column) / len(column) for column in slow_columns(scores)]
    above = [sum(value > tau for value in means) / len(means) for tau in thresholds]
    np.testing.assert_allclose(statistics.task_profile(scores, thresholds), above, atol=1e-12)
    probability = statistics.probability_of_improvement(scores, other)
    assert probability == pytest.approx(slow_probability(scores, other), abs=1e-12)
    assert statistics.probability_of_improvement(other, scores) == pytest.approx(1 - probability, abs=1e-12)
    assert statistics.probability_of_improvement(scores, scores) == 0.5


def test_values_worked_by_hand():
    scores = np.array([0.0, 1.0, 2.0, 100.0])
    assert statistics.interquartile_mean(scores) == 1.5
    assert statistics.mean(scores) == 25.75
    assert statistics.median(scores) == 1.5
    assert statistics.optimality_gap(scores, 10.0) == pytest.approx((10 + 9 + 8 + 0) / 4)
    # Of ten scores two are cut from each end, exactly two and a half are a quarter.
    ten = np.array([0.0, 0, 0, 8, 8, 8, 8, 8, 8, 8])
    assert statistics.interquartile_mean(ten) == pytest.approx(5 * 8 / 6)
    assert statistics.fractional_interquartile_mean(ten) == pytest.approx(4.5 * 8 / 5)
    # One column is one task: the median over tasks is then the mean over its runs.
    assert statistics.median(scores[:, None]) == 25.75
    assert statistics.probability_of_improvement(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 7 / 8


def test_the_area_between_two_profiles_is_the_difference_of_the_means():
    x, y = example((6, 2)), example((9, 2))
    thresholds = np.linspace(-300, 300, 60_001)
    between = statistics.performance_profile(x, thresholds) - statistics.performance_profile(y, thresholds)
    assert between.sum() * 0.01 == pytest.approx(statistics.mean(x) - statistics.mean(y), abs=0.05)


# ----------------------------------------------------------------------------------------- intervals


def test_the_interval_of_few_runs_is_that_of_all_their_resamples():
    """Of three runs there are 27 resamples: all of them, instead of a random sample."""
    scores = np.array([1.0, 5.0, 7.0])
    means = sorted(sum(draw) / 3 for draw in itertools.product(scores, repeat=3))
    interval = statistics.bootstrap_interval(statistics.mean, scores, resamples=20_000, confidence=0.8)
    assert interval.estimate == statistics.mean(scores)
    # A percentile of many draws is a mean of the exact distribution next to that rank.
    assert means[1] <= interval.low <= means[3]
    assert means[-4] <= interval.high <= means[-2]


def test_the_interval_of_the_mean_is_the_normal_one_for_many_runs():
    scores = RNG.normal(3.0, 2.0, 400)
    interval = statistics.bootstrap_interval(statistics.mean, scores)
    error = scores.std() / math.sqrt(400)
    assert interval.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)
    narrower = statistics.bootstrap_interval(statistics.mean, scores, confidence=0.5)
    assert interval.low < narrower.low < narrower.high < interval.high


def test_runs_are_resampled_within_their_task():
    constant = np.array([[1.0, 10.0, 100.0]] * 4)  # runs of a task do not differ: strata must not mix
    interval = statistics.bootstrap_interval(statistics.mean, constant, resamples=50)
    assert tuple(interval) == pytest.approx((37.0, 37.0, 37.0))
    # Each task draws for itself: a task that copies another does not move with it.
    twice = np.repeat(np.arange(8.0)[:, None], 2, axis=1)
    seen = []
    statistics.bootstrap_interval(lambda x: seen.append(x) or 0.0, twice, resamples=20)
    assert any((x[:, 0] != x[:, 1]).any() for x in seen)


def test_intervals_are_reproducible_and_take_arrays_of_any_length():
    x, y = example((5, 2)), example((8, 2)) + 200
    first = statistics.bootstrap_interval(statistics.probability_of_improvement, y, x, seed=3)
    assert tuple(first) == (1.0, 1.0, 1.0)
    equal = [statistics.bootstrap_interval(statistics.mean, x, seed=s, resamples=100) for s in (4, 4, 5)]
    assert equal[0] == equal[1]
    assert equal[0] != equal[2]
    thresholds = np.linspace(-100, 100, 7)
    profile = statistics.bootstrap_interval(
        lambda scores: statistics.performance_profile(scores, thresholds), x, resamples=200
    )
    assert profile.low.shape == profile.high.shape == (7,)
    assert (profile.low <= profile.estimate).all()
    assert (profile.estimate <= profile.high).all()


def test_all_aggregates_at_once():
    scores = example((9,))
    found = statistics.aggregates(scores, target=60.0, resamples=100)
    assert list(found) == ["iqm", "median", "mean", "optimality_gap"]
    assert found["iqm"] == statistics.bootstrap_interval(statistics.interquartile_mean, scores, resamples=100)
    assert found["optimality_gap"].estimate == statistics.optimality_gap(scores, 60.0)
    one = statistics.aggregates(np.array([5.0]), resamples=10)
    assert all(interval.low == interval.estimate == interval.high for interval in one.values())


# -------------------------------------------------------------------------------------------- curves

NAN = math.nan


def test_a_curve_counts_the_runs_that_have_a_value():
    curves = np.array([[NAN, NAN, 1, 2], [NAN, 7, 3, 4], [NAN, NAN, 5, 60], [NAN, NAN, 7, 6]])
    interval = statistics.curve_interval(curves)
    np.testing.assert_array_equal(interval.estimate, [NAN, 7, 4, 5])
    for side in (interval.low, interval.high):
        assert np.isnan(side[0])
        assert side[1] == 7  # resamples without the only run that has a value say nothing
    assert 1 <= interval.low[2] < 4 < interval.high[2] <= 7
    one = statistics.curve_interval(curves[:1])
    for side in one:
        np.testing.assert_array_equal(side, curves[0])
    empty = statistics.curve_interval(np.full((2, 3), NAN))
    assert all(np.isnan(side).all() for side in empty)
    assert statistics.curve_interval(np.ones((2, 0))).estimate.shape == (0,)


def test_curves_are_resampled_as_wholes():
    """Two runs, one above the other: every resampled curve is one of three, never a mixture over time."""
    curves = np.stack([np.zeros(50), np.ones(50)])
    low, high = statistics.curve_interval(curves, confidence=0.3)[1:]
    assert len(set(low)) == len(set(high)) == 1


def test_env_steps_to_a_threshold():
    curves = np.array(
        [[NAN, 1, 5, 2], [NAN, NAN, NAN, NAN], [5, NAN, 1, 9], [0, 1, 2, 4.999], [0, NAN, 3, 5]]
    )
    steps = np.array([10, 20, 30, 40])
    reached = statistics.env_steps_to_threshold(curves, steps, 5.0)
    np.testing.assert_array_equal(reached, [30, np.inf, 10, np.inf, 40])
    assert np.median(reached) == 40
    assert np.isinf(statistics.env_steps_to_threshold(np.ones((2, 0)), np.ones(0), 1.0)).all()


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.mean(np.zeros((2, 2, 2))), r"mean: scores have shape \(2, 2, 2\); expected"),
        (lambda: statistics.median(np.zeros(0)), r"median: scores have shape \(0,\); expected"),
        (
            lambda: statistics.interquartile_mean(np.array([1.0, NAN, np.inf])),
            "interquartile_mean: 2 of 3 scores are NaN or infinite.* leave these runs out, and say how many",
        ),
        (
            lambda: statistics.probability_of_improvement(np.zeros((2, 2)), np.zeros((2, 3))),
            "scores of 2 tasks against a baseline of 3. Both need the same tasks",
        ),
        (
            lambda: statistics.optimality_gap(np.zeros(2), NAN),
            r"optimality_gap\(target=nan\): must be finite",
        ),
        (
            lambda: statistics.bootstrap_interval(statistics.mean, np.zeros(2), confidence=95),
            r"confidence=95\): must be between 0 and 1",
        ),
        (
            lambda: statistics.bootstrap_interval(statistics.mean, np.zeros(2), resamples=0),
            r"resamples=0\): must be at least 1",
        ),
        (
            lambda: statistics.bootstrap_interval(statistics.mean, np.array([NAN])),
            "bootstrap_interval: 1 of 1 scores are NaN",
        ),
        (lambda: statistics.curve_interval(np.zeros(3)), r"curves have shape \(3,\); expected \[runs, T\]"),
        (
            lambda: statistics.env_steps_to_threshold(np.zeros((1, 3)), np.arange(2), 0.0),
            r"env_steps has shape \(2,\), curves \(1, 3\)",
        ),
        (
            lambda: statistics.env_steps_to_threshold(np.zeros((1, 3)), np.array([0, 2, 2]), 0.0),
            "env_steps does not increase",
        ),
        (
            lambda: statistics.env_steps_to_threshold(np.zeros((1, 1)), np.zeros(1), NAN),
            r"threshold=nan\): must be a number",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_seed_is_any_integer_and_nothing_else():
    def interval(seed):
        return statistics.bootstrap_interval(statistics.mean, np.arange(5.0), resamples=20, seed=seed)

    assert interval(np.int64(3)) == interval(np.array(3)) == interval(3) == interval(np.random.default_rng(3))
    assert interval(3) != interval(4)
    for seed in (1.5, "3", None):
        with pytest.raises(TypeError, match=rf"seed={seed!r}\): expected an integer"):
            interval(seed)
    with pytest.raises(ValueError, match=r"seed=-1\): must be at least 0"):
        interval(-1)
