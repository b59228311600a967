"""The same numbers as rliable, intervals included: both are given the same resamples.

rliable imports all of arch, whose volatility models do not know pandas 3; its bootstrap, which is what is
used, needs none of them, so it is imported by itself where the whole cannot be.
"""

import importlib
import importlib.util
import sys
import types
import warnings

import numpy as np
import pytest

from jrl import statistics

pytest.importorskip("rliable")


def import_arch():
    """Import arch, or put an empty package in its place, from which its modules can still be imported."""
    folders = list(importlib.util.find_spec("arch").submodule_search_locations)
    try:
        importlib.import_module("arch")
    except Exception:  # whatever arch raises under a pandas it does not know
        for loaded in [m for m in sys.modules if m.split(".")[0] == "arch"]:
            del sys.modules[loaded]
        package = types.ModuleType("arch")
        package.__path__ = folders
        sys.modules["arch"] = package


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_arch()
    from rliable import library, metrics

TOLERANCE = 1e-6
RNG = np.random.default_rng(3)
SCORES = {shape: np.round(40 * RNG.normal(size=shape), 0) for shape in [(1, 1), (3, 1), (10, 1), (7, 5)]}


class LegacyDraws:
    """A generator that draws as rliable does: from NumPy's global stream."""

    def __init__(self, seed):
        np.random.seed(seed)  # noqa: NPY002

    def integers(self, low, high, size):
        assert low == 0
        return np.random.choice(high, size, replace=True)  # noqa: NPY002


@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_aggregates(shape):
    scores = SCORES[shape]
    for ours, theirs in (
        (statistics.mean, metrics.aggregate_mean),
        (statistics.median, metrics.aggregate_median),
        (statistics.interquartile_mean, metrics.aggregate_iqm),
        (statistics.optimality_gap, metrics.aggregate_optimality_gap),
    ):
        assert ours(scores) == pytest.approx(theirs(scores), abs=TOLERANCE)
    gap = metrics.aggregate_optimality_gap(scores, 17.0)
    assert statistics.optimality_gap(scores, 17.0) == pytest.approx(gap, abs=TOLERANCE)


@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_probability_of_improvement_and_profiles(shape):
    scores = SCORES[shape]
    other = np.round(40 * RNG.normal(size=(6, shape[1])) + 10, 0)
    for x, y in ((scores, other), (other, scores), (scores, scores)):
        theirs = metrics.probability_of_improvement(x, y)
        assert statistics.probability_of_improvement(x, y) == pytest.approx(theirs, abs=TOLERANCE)
    thresholds = np.array([*np.linspace(-100, 100, 41), *scores.ravel()])
    np.testing.assert_allclose(
        statistics.performance_profile(scores, thresholds),
        library.score_distributions(scores, thresholds),
        atol=TOLERANCE,
    )
    np.testing.assert_allclose(
        statistics.task_profile(scores, thresholds),
        library.average_score_distributions(scores, thresholds),
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_intervals(confidence):
    scores, other = SCORES[7, 5], SCORES[7, 5][:4] + 5
    thresholds = np.linspace(-60, 60, 5)
    settings = {"confidence": confidence, "resamples": 200}
    for ours, theirs in (
        (statistics.interquartile_mean, lambda x: np.array([metrics.aggregate_iqm(x)])),
        (
            lambda x: statistics.performance_profile(x, thresholds),
            lambda x: library.score_distributions(x, thresholds),
        ),
    ):
        found = statistics.bootstrap_interval(ours, scores, **settings, seed=LegacyDraws(11))
        np.random.seed(11)  # noqa: NPY002
        points, intervals = library.get_interval_estimates(
            {"a": scores}, theirs, reps=200, confidence_interval_size=confidence
        )
        np.testing.assert_allclose(np.ravel(found.estimate), points["a"], atol=TOLERANCE)
        np.testing.assert_allclose(np.ravel(found.low), intervals["a"][0], atol=TOLERANCE)
        np.testing.assert_allclose(np.ravel(found.high), intervals["a"][1], atol=TOLERANCE)
    found = statistics.bootstrap_interval(
        statistics.probability_of_improvement, scores, other, **settings, seed=LegacyDraws(12)
    )
    np.random.seed(12)  # noqa: NPY002
    points, intervals = library.get_interval_estimates(
        {"a,b": (scores, other)},
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        reps=200,
        confidence_interval_size=confidence,
    )
    assert found.estimate == pytest.approx(points["a,b"][0], abs=TOLERANCE)
    np.testing.assert_allclose([found.low, found.high], intervals["a,b"][:, 0], atol=TOLERANCE)
