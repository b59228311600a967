"""Statistics of final returns over seeds and tasks, with intervals that say how far few seeds can be trusted.

The aggregates, intervals and profiles of Agarwal et al. 2021, "Deep RL at the Edge of the Statistical
Precipice", https://arxiv.org/abs/2108.13264. Scores are ``[runs, tasks]``; ``[runs]`` is one task. NumPy
only: the results of a sweep are already on the host.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000


class Interval(NamedTuple):
    """A statistic and its bootstrap interval, each a float or an array of the statistic's shape."""

    estimate: Any
    low: Any
    high: Any


# -------------------------------------------------------------------------------------------- aggregates


def mean(scores: np.ndarray) -> float:
    """Mean over tasks of the mean over runs; one outstanding task or run can decide it.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``, in the unit of the return.

    Raises:
        ValueError: no score, a score that is NaN or infinite, or another number of axes.
    """
    return float(_matrix("mean", scores).mean())


def median(scores: np.ndarray) -> float:
    """Median over tasks of the mean over runs; for ``[runs]``, the median over runs.

    The two differ: of a single column ``[runs, 1]`` the first is nothing but the mean.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``, in the unit of the return.

    Raises:
        ValueError: as :func:`mean`.
    """
    matrix = _matrix("median", scores)
    return float(np.median(matrix if np.ndim(scores) == 1 else matrix.mean(0)))


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the scores, of all tasks together, that are left when a quarter is cut from each end.

    ``⌊n/4⌋`` of the ``n`` scores are cut from each end, so that below four nothing is: the 25 % trimmed mean of
    Agarwal et al. 2021, https://arxiv.org/abs/2108.13264, with numbers equal to rliable's.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``, in the unit of the return.

    Raises:
        ValueError: as :func:`mean`.
    """
    return float(_trimmed_mean(_matrix("interquartile_mean", scores).reshape(-1)))


def fractional_interquartile_mean(scores: np.ndarray) -> float:
    """Mean of exactly the middle half: where 4 does not divide ``n``, the scores at its two ends count in part.

    ``∫ F⁻¹(u) du`` over ``u`` from ¼ to ¾, times 2, with ``F`` the empirical distribution. It equals
    :func:`interquartile_mean` where 4 divides ``n``; it needs no rounding for the others, but rliable rounds.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``, in the unit of the return.

    Raises:
        ValueError: as :func:`mean`.
    """
    ordered = np.sort(_matrix("fractional_interquartile_mean", scores).reshape(-1))
    n = len(ordered)
    edges = np.clip((np.arange(n + 1) - n / 4) / (n / 2), 0, 1)
    return float(np.diff(edges) @ ordered)


def optimality_gap(scores: np.ndarray, target: float = 1.0) -> float:
    """How far runs stay below a target: ``target − mean(min(score, target))``; 0 where all reach it.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``, in the unit of the return.
        target: the same unit; 1 is for scores normalised so that 1 is what should be reached.

    Raises:
        ValueError: as :func:`mean`, or a target that is not finite.
    """
    if not np.isfinite(target):
        raise ValueError(f"optimality_gap(target={target}): must be finite, in the unit of the scores.")
    return float(target - np.minimum(_matrix("optimality_gap", scores), target).mean())


def probability_of_improvement(scores: np.ndarray, baseline: np.ndarray) -> float:
    """Probability that a run of one algorithm is better than one of another: mean over tasks of ``P(X > Y)``.

    ``P(X > Y) = Σᵢⱼ [xᵢ > yⱼ] + ½ [xᵢ = yⱼ]``, over the number of pairs: the Mann-Whitney ``U``.

    Args:
        scores: of the one in question, ``[runs, tasks]`` or ``[runs]``.
        baseline: of the other, ``[other runs, tasks]`` or ``[other runs]``.

    Raises:
        ValueError: as :func:`mean`, or the numbers of tasks differ.
    """
    x = _matrix("probability_of_improvement", scores)
    y = _matrix("probability_of_improvement", baseline)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"probability_of_improvement: scores of {x.shape[1]} tasks against a baseline of {y.shape[1]}. "
            "Both need the same tasks, in the same order."
        )
    per_task = []
    for column, other in zip(x.T, np.sort(y, axis=0).T, strict=True):
        below = np.searchsorted(other, column, "left") + np.searchsorted(other, column, "right")
        per_task.append(below.mean() / (2 * len(other)))
    return float(np.mean(per_task))


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Fraction of runs, of all tasks together, above each threshold: ``F(τ) = mean([score > τ])``.

    One algorithm's curve above another's everywhere means better at every quantile; the area between two
    curves is the difference of the means.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``.
        thresholds: ``[K]``, in the unit of the scores.

    Returns:
        ``[K]``.

    Raises:
        ValueError: as :func:`mean`.
    """
    ordered = np.sort(_matrix("performance_profile", scores).reshape(-1))
    return 1.0 - np.searchsorted(ordered, np.asarray(thresholds, float), "right") / len(ordered)


def task_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Fraction of tasks whose mean over runs is above each threshold; arguments of :func:`performance_profile`.

    Raises:
        ValueError: as :func:`mean`.
    """
    return performance_profile(_matrix("task_profile", scores).mean(0), thresholds)


# --------------------------------------------------------------------------------------------- intervals


def bootstrap_interval(
    statistic: Callable[..., Any],
    *scores: np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """Stratified percentile bootstrap: the spread of a statistic when runs are drawn anew, with replacement.

    The runs of each task are drawn for themselves (tasks are the strata), those of each array of scores too;
    the interval lies between the ``(1 ± confidence) / 2`` quantiles of the statistic of the resamples. It knows
    of nothing but the runs it is given: with three seeds it is too narrow, with one it is a point.

    Args:
        statistic: called with arrays of the shapes of ``scores``, returns a number or an array.
        scores: each ``[runs, tasks]`` or ``[runs]``; the numbers of runs may differ.
        confidence: between 0 and 1.
        resamples: how many.
        seed: an integer, or a generator; equal seeds give equal intervals.

    Raises:
        TypeError: ``seed`` is neither.
        ValueError: ``confidence``, ``resamples`` or ``seed`` is out of range, or scores as for :func:`mean`.
    """
    if not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap_interval(confidence={confidence}): must be between 0 and 1, such as 0.95."
        )
    if resamples < 1:
        raise ValueError(f"bootstrap_interval(resamples={resamples}): must be at least 1.")
    arrays = [_checked("bootstrap_interval", array) for array in scores]
    generator = _generator(seed)
    replicates = np.asarray(
        [statistic(*(_resample(generator, array) for array in arrays)) for _ in range(resamples)], float
    )
    tail = 50 * (1 - confidence)
    # NaN comes from a statistic that a resample leaves undefined: it says nothing about the interval.
    percentile = np.nanpercentile if np.isnan(replicates).any() else np.percentile
    low, high = percentile(replicates, [tail, 100 - tail], axis=0)
    return Interval(statistic(*arrays), low, high)


def _generator(seed: Any) -> np.random.Generator:
    if hasattr(seed, "integers"):  # a generator, or what draws as one
        return seed
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise TypeError(
            f"bootstrap_interval(seed={seed!r}): expected an integer, or a numpy.random.Generator."
        ) from error
    if number < 0:
        raise ValueError(f"bootstrap_interval(seed={seed}): must be at least 0.")
    return np.random.default_rng(number)


def _resample(generator: np.random.Generator, array: np.ndarray) -> np.ndarray:
    rows = generator.integers(0, len(array), array.shape)
    return array[rows] if array.ndim == 1 else np.take_along_axis(array, rows, axis=0)


def aggregates(
    scores: np.ndarray,
    *,
    target: float = 1.0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Interquartile mean, median, mean and optimality gap, by these names, each with its interval.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``.
        target: of :func:`optimality_gap`.
        confidence: of :func:`bootstrap_interval`, as are ``resamples`` and ``seed``.
        resamples: how many.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: as :func:`bootstrap_interval`.
    """
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "iqm": interquartile_mean,
        "median": median,
        "mean": mean,
        "optimality_gap": lambda values: optimality_gap(values, target),
    }
    return {
        name: bootstrap_interval(
            statistic, scores, confidence=confidence, resamples=resamples, seed=seed
        )
        for name, statistic in statistics.items()
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ curves


def interquartile_curve(curves: np.ndarray) -> np.ndarray:
    """:func:`interquartile_mean` over runs at each point of their learning curves.

    At each point the runs with a value count, so that one without an episode there does not undo the others.

    Args:
        curves: ``[runs, T]``, NaN where no episode ended.

    Returns:
        ``[T]``, NaN where no run has a value.

    Raises:
        ValueError: ``curves`` is not ``[runs, T]`` with at least one run.
    """
    return _trimmed_mean(_curves("interquartile_curve", curves).T)


def curve_interval(
    curves: np.ndarray, *, confidence: float = CONFIDENCE, resamples: int = 500, seed: int = 0
) -> Interval:
    """:func:`interquartile_curve` with its bootstrap interval at each point; runs are resampled whole.

    Args:
        curves: ``[runs, T]``, NaN where no episode ended.
        confidence: of :func:`bootstrap_interval`, as are ``resamples`` and ``seed``.
        resamples: how many.
        seed: equal seeds give equal intervals.

    Returns:
        Three arrays ``[T]``.

    Raises:
        ValueError: ``curves`` is not ``[runs, T]`` with at least one run, or as :func:`bootstrap_interval`.
    """
    curves = _curves("curve_interval", curves)
    known = np.isfinite(curves).any(0)
    result = Interval(*np.full((3, curves.shape[1]), np.nan))
    if known.any():
        of_runs = bootstrap_interval(
            lambda runs: interquartile_curve(curves[:, known][runs]),
            np.arange(len(curves)),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        for whole, part in zip(result, of_runs, strict=True):
            whole[known] = part
    return result


def env_steps_to_threshold(curves: np.ndarray, env_steps: np.ndarray, threshold: float) -> np.ndarray:
    """Sample efficiency: environment steps after which each run's curve is first at or above a threshold.

    Args:
        curves: ``[runs, T]``, NaN where no episode ended: such a point reaches nothing.
        env_steps: ``[T]``, increasing.
        threshold: in the unit of the curves.

    Returns:
        ``[runs]`` floats, one of ``env_steps`` each, or infinity where the threshold is never reached: then the
        median over runs is still a number as long as more than half of them reach it.

    Raises:
        ValueError: the shapes do not fit, ``env_steps`` does not increase, or the threshold is NaN.
    """
    curves = _curves("env_steps_to_threshold", curves)
    env_steps = np.asarray(env_steps, float)
    if env_steps.shape != curves.shape[1:]:
        raise ValueError(
            f"env_steps_to_threshold: env_steps has shape {env_steps.shape}, curves {curves.shape}. "
            "There must be one number of env steps for each point of the curves."
        )
    if not (np.diff(env_steps) > 0).all():
        raise ValueError("env_steps_to_threshold: env_steps does not increase from point to point.")
    if np.isnan(threshold):
        raise ValueError("env_steps_to_threshold(threshold=nan): must be a number, a return.")
    reached = curves >= threshold
    if not env_steps.size:
        return np.full(len(curves), np.inf)
    return np.where(reached.any(1), env_steps[reached.argmax(1)], np.inf)


def _trimmed_mean(values: np.ndarray) -> np.ndarray:
    """Mean along the last axis of the finite values without a quarter of them, rounded down, at each end."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=-1)  # NaN comes last
    count = np.isfinite(ordered).sum(-1, keepdims=True)
    position, cut = np.arange(values.shape[-1]), count // 4
    kept = (position >= cut) & (position < count - cut)
    total = np.where(kept, ordered, 0.0).sum(-1)
    return np.where(count[..., 0] > 0, total / np.maximum(kept.sum(-1), 1), np.nan)


def _checked(function: str, scores: np.ndarray) -> np.ndarray:
    array = np.asarray(scores)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            f"{function}: scores have shape {array.shape}; expected [runs, tasks] or [runs], with at least one "
            "of each."
        )
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        raise ValueError(
            f"{function}: {wrong} of {array.size} scores are NaN or infinite. No statistic knows what a run "
            "without a score is worth: leave these runs out, and say how many they are, or give them a score."
        )
    return array


def _matrix(function: str, scores: np.ndarray) -> np.ndarray:
    array = _checked(function, scores).astype(float)
    return array[:, None] if array.ndim == 1 else array


def _curves(function: str, curves: np.ndarray) -> np.ndarray:
    curves = np.asarray(curves, float)
    if curves.ndim != 2 or not len(curves):
        raise ValueError(
            f"{function}: curves have shape {curves.shape}; expected [runs, T] with at least one run."
        )
    return curves
