"""Figures of sweeps: what a table of members shows about seeds and hyperparameters.

Lines are interquartile means over seeds, bands and bars 95 % bootstrap intervals (:mod:`jrl.statistics`).
Members without a final return, such as frozen ones, are left out of the means and marked.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jrl.sweep_plots.comparison import interval_estimates, performance_profile
from jrl.sweep_plots.curves import compared_curves, learning_curves, schedules
from jrl.sweep_plots.parts import FROZEN, SCALE, _iqm, log_spaced
from jrl.sweep_plots.settings import heat_map, sensitivity
from jrl.tables import LINEAGE, Table

__all__ = [
    "FROZEN",
    "SCALE",
    "_iqm",
    "compared_curves",
    "compared_figures",
    "figures",
    "heat_map",
    "interval_estimates",
    "learning_curves",
    "log_spaced",
    "performance_profile",
    "schedules",
    "sensitivity",
]


def figures(table: Table, folder: str | os.PathLike) -> list[Path]:
    """Draw what fits the table into a folder and return the files: curves, sensitivities, heat maps, a profile.

    None of what there is no return for: curves where no episode has ended in training, the others where no member
    has a final return.
    """
    folder = Path(folder)
    several = [name for name in table.swept if len(set(table.columns[name])) > 1]
    files: list[Path] = []

    def draw(name: str, figure: Callable[..., Figure], *arguments: Any) -> None:
        files.append(folder / f"{name}.png")
        figure(table, *arguments, out=files[-1])

    if np.isfinite(table.curves).any():
        draw("learning_curves", learning_curves)
    if not np.isfinite(table.final_returns).any():
        return files
    for name in several:
        draw(f"sensitivity_{name}", sensitivity, name)
        if LINEAGE in table.columns:
            draw(f"schedules_{name}", schedules, name)
    for x, y in itertools.combinations(several, 2):
        pairs = len(table.groups([x, y]))
        # Values drawn at random make an almost empty grid, of which a heat map shows nothing.
        if 2 * pairs > len(set(table.columns[x])) * len(set(table.columns[y])):
            draw(f"heat_map_{x}_{y}", heat_map, x, y)
    if len(table) > 1:
        draw("performance_profile", performance_profile)
    return files


def compared_figures(
    tables: Sequence[Table], labels: Sequence[str], folder: str | os.PathLike, *, target: float | None = None
) -> list[Path]:
    """Draw several tables on the same axes into a folder and return the files: curves, profiles, intervals.

    Raises:
        ValueError: as :func:`performance_profile`.
    """
    folder = Path(folder)
    files = [folder / "performance_profile.png", folder / "interval_estimates.png"]
    performance_profile(tables, labels, out=files[0])
    interval_estimates(tables, labels, target=target, out=files[1])
    if all(np.isfinite(table.curves).any() for table in tables):
        files.append(folder / "learning_curves.png")
        compared_curves(tables, labels, out=files[-1])
    return files
