"""Tables of sweeps that never ran, for the tests of what reads them."""

import itertools
import math

import numpy as np

from jrl.tables import RESULTS, Table


def make_table(swept=None, seeds=8, points=40, frozen=(), evaluated=True, seed=0, best=500.0):
    """A grid over ``swept`` times ``seeds``; better near the middle of each value; ``frozen`` are members."""
    rng = np.random.default_rng(seed)
    names, grids = list(swept or {}), list((swept or {}).values())
    settings = list(itertools.product(*grids))
    steps = np.arange(1, points + 1) * 25_000
    columns = {name: [] for name in ("member", "seed", *names, *RESULTS)}
    curves = []
    for member, (setting, run) in enumerate(itertools.product(settings, range(seeds))):
        far = [
            abs(2 * grid.index(v) / max(len(grid) - 1, 1) - 1) for v, grid in zip(setting, grids, strict=True)
        ]
        level = best * (1 - 0.6 * float(np.mean(far or [0.0]))) * (1 - 0.1 * rng.random())
        curve = level * (1 - np.exp(-np.arange(points) / (points / 6))) + 0.02 * best * rng.normal(
            size=points
        )
        curve[0] = math.nan  # no episode has ended yet
        stop = member in frozen
        if stop:
            curve[points // 2 :] = math.nan
        curves.append(curve)
        final = None if stop or not evaluated else float(level)
        result = (final, *(None if final is None else v for v in (9.5, level - 20, level + 20, 100)))
        late = curve[-max(1, points // 10) :]
        train = math.nan if np.isnan(late).all() else float(np.nanmean(late))
        why = "loss is nan" if stop else None
        at = int(steps[points // 2]) if stop else None
        status = "frozen" if stop else "ok"
        row = (member, run, *setting, *result, train, int(steps[-1]), status, at, why)
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    return Table(columns, steps, np.array(curves), tuple(names))
