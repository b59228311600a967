"""Learning curves of a sweep or of several, and a population's hyperparameters over training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jrl import statistics
from jrl.plots import COLOURS, SINGLE, STYLES, new_figure, over_env_steps, plain, save
from jrl.sweep_plots.parts import (
    _RESAMPLES,
    FROZEN,
    SCALE,
    _check_curves,
    _check_swept,
    _counted,
    _cross,
    _final_label,
    _iqm,
    _labelled,
    _legend_below,
    _members,
    _over,
    _returns,
    _wrapped,
    log_spaced,
)
from jrl.tables import LINEAGE, Table, number, setting

_BEST = 3  # of many groups, how many stand out


def learning_curves(
    table: Table,
    by: str | Sequence[str] | None = None,
    *,
    out: str | os.PathLike | None = None,
    title: str | None = None,
) -> Figure:
    """Plot training return over environment steps, one line a group: the interquartile mean over its members.

    Up to seven groups have their own colour, line style and band. More are coloured by their value on a scale,
    or grey where several values make the groups, and the best three by their final return stand out. A cross is
    a frozen member, where it was frozen.

    Args:
        table: of a sweep.
        by: the columns whose equal values make a group; all swept ones by default.
        out: where to save it, the suffix says the format; not saved if None.
        title: above the axes.

    Raises:
        ValueError: ``by`` names no column, or no episode has ended in any member.
    """
    names = table.swept if by is None else (by,) if isinstance(by, str) else tuple(by)
    groups = table.groups(names)
    _check_curves(table)
    parts = [part for _, part in groups]
    labels = [_wrapped(setting(values)) if values else _members(table) for values, _ in groups]
    many = len(groups) > SINGLE
    # Within the axes it would cover the marks of final evaluations, which only few groups have.
    outside = not many or any("\n" in label for label in labels)
    figure = new_figure(9.0, 4.5)
    axes = figure.add_subplot()
    if many:
        _many_curves(figure, axes, groups, labels)
    else:
        for index, (part, label) in enumerate(zip(parts, labels, strict=True)):
            colour, style = COLOURS[index], STYLES[index % len(STYLES)]
            _curve(axes, part, color=colour, ls=style, lw=1.6, label=label, band=0.15)
            final = part.final_returns[np.isfinite(part.final_returns)]
            if part.evaluated and final.size:
                axes.plot(
                    part.curve_env_steps[-1], statistics.interquartile_mean(final), "D", color=colour,
                    markeredgecolor="white", ms=8, clip_on=False, zorder=3,
                )  # fmt: skip
            _mark_frozen(axes, part)
    axes.set_ylabel("episode return in training")
    over_env_steps(axes)
    plain(axes)
    axes.set_title(title if title is not None else _over(parts), loc="left", fontsize=10)
    _legend(axes, table, outside=outside, evaluated=not many)
    save(figure, out)
    return figure


def schedules(
    table: Table, name: str, *, out: str | os.PathLike | None = None, title: str | None = None
) -> Figure:
    """Plot a hyperparameter over environment steps, as population-based training has changed it: a line a policy.

    A line is the ancestry of a member's policy, its colour the final return; the best one stands out. Lines meet
    where one policy descends from another.

    Args:
        table: of population-based training.
        name: of a swept value.
        out: where to save it; not saved if None.
        title: above the axes.

    Raises:
        ValueError: ``name`` was not swept, the table has no lineage, or no member has a final return.
    """
    _check_swept("schedules", table, name)
    if LINEAGE not in table.columns:
        raise ValueError("schedules: the table has no lineage; only population-based training has one.")
    returns = _returns("schedules", table)
    figure = new_figure(8.5, 4.5)
    axes = figure.add_subplot()
    norm = colors.Normalize(np.nanmin(returns), np.nanmax(returns))
    seen = []
    for row in range(len(table)):
        path = json.loads(table.columns[LINEAGE][row])
        at = [step for step, _, _ in path] + [table.columns["env_steps"][row]]
        values = [numbers[name] for _, _, numbers in path]
        seen += values
        best = row == np.nanargmax(returns)
        colour = SCALE(norm(returns[row])) if np.isfinite(returns[row]) else "0.72"
        axes.step(
            at, [*values, values[-1]], where="post", color="black" if best else colour, lw=2.2 if best else 1.0,
            zorder=3 if best else 2, label=f"best member ({number(returns[row])})" if best else None,
        )  # fmt: skip
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, SCALE), ax=axes, label=_final_label(table), pad=0.02
    )
    bar.outline.set_visible(False)
    if log_spaced(seen) and min(seen) > 0:
        axes.set_yscale("log")
    axes.set_ylabel(name)
    over_env_steps(axes)
    plain(axes)
    axes.set_title(title if title is not None else _members(table), loc="left", fontsize=10)
    axes.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    save(figure, out)
    return figure


def compared_curves(
    tables: Table | Sequence[Table],
    labels: Sequence[str] | None = None,
    *,
    out: str | os.PathLike | None = None,
    title: str | None = None,
) -> Figure:
    """Plot training return over environment steps, one line a table: the interquartile mean over its members.

    Args:
        tables: of sweeps, or one.
        labels: of the lines, one a table.
        out: where to save it; not saved if None.
        title: above the axes.

    Raises:
        ValueError: the numbers of tables and labels differ, or no episode has ended in any member of a table.
    """
    tables, labels = _labelled("compared_curves", tables, labels)
    for table, label in zip(tables, labels, strict=True):
        _check_curves(table, f" of {label}")
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    for index, (table, label) in enumerate(zip(tables, labels, strict=True)):
        _curve(
            axes, table, color=COLOURS[index % len(COLOURS)], ls=STYLES[index // len(COLOURS) % len(STYLES)],
            lw=1.6, label=_counted(label, table), band=0.15 if len(tables) <= SINGLE else 0.0,
        )  # fmt: skip
        _mark_frozen(axes, table)
    axes.set_ylabel("episode return in training")
    over_env_steps(axes)
    plain(axes)
    axes.set_title(title if title is not None else _over(tables), loc="left", fontsize=10)
    _legend_below(figure, marked=any(table.num_frozen for table in tables))
    save(figure, out)
    return figure


def _many_curves(figure: Figure, axes: Any, groups: list[tuple[dict, Table]], labels: list[str]) -> None:
    parts = [part for _, part in groups]
    scores = np.array([_iqm(part) for part in parts])
    best = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")[:_BEST].tolist()
    (name, *more) = groups[0][0]
    values = [next(iter(group.values())) for group, _ in groups]
    grey = bool(more) or isinstance(values[0], str)  # what has no place on a scale
    if grey:
        shades = ["0.72"] * len(groups)
    else:
        norm = (colors.LogNorm if log_spaced(values) and min(values) > 0 else colors.Normalize)(
            min(values), max(values)
        )
        shades = [SCALE(norm(value)) for value in values]
        mappable = matplotlib.cm.ScalarMappable(norm, SCALE)
        bar = figure.colorbar(mappable, ax=axes, label=name, pad=0.02)
        bar.outline.set_visible(False)
    for index, part in enumerate(parts):
        if index not in best:
            _curve(axes, part, color=shades[index], lw=0.9, alpha=0.8, zorder=1.5)
    halo = [patheffects.Stroke(linewidth=4.0, foreground="white"), patheffects.Normal()]
    for rank, index in reversed(list(enumerate(best))):
        colour = COLOURS[rank] if grey else "black"
        _curve(
            axes, parts[index], color=colour, ls=STYLES[rank], lw=1.9, path_effects=halo, zorder=3,
            band=0.15 if rank == 0 else 0.0,
        )  # fmt: skip
    for rank, index in enumerate(best):
        colour = COLOURS[rank] if grey else "black"
        score = f"  ({number(scores[index])})" if np.isfinite(scores[index]) else ""
        axes.plot([], [], color=colour, ls=STYLES[rank], lw=1.9, label=f"{labels[index]}{score}")
    if grey:
        axes.plot([], [], color="0.72", lw=0.9, label=f"{len(parts) - len(best)} others")
    for part in parts:
        _mark_frozen(axes, part, size=5)


def _curve(axes: Any, part: Table, *, band: float = 0.0, **style: Any) -> None:
    if band and len(part) > 1:
        interval = statistics.curve_interval(part.curves, resamples=_RESAMPLES)
        known = np.isfinite(interval.estimate)
        axes.fill_between(
            part.curve_env_steps[known], interval.low[known], interval.high[known],
            color=style["color"], alpha=band, linewidth=0,
        )  # fmt: skip
    estimate = statistics.interquartile_curve(part.curves)
    known = np.isfinite(estimate)
    marker = "o" if known.sum() == 1 else None  # a single point makes no line
    axes.plot(part.curve_env_steps[known], estimate[known], marker=marker, **style)


def _mark_frozen(axes: Any, part: Table, size: float = 8) -> None:
    """Mark where members were frozen, on the line of their group, or on the axis where it has no point yet."""
    at = np.unique([env_steps for env_steps in part.columns["frozen_at"] if env_steps is not None])
    if not at.size:
        return
    estimate = statistics.interquartile_curve(part.curves)
    known = np.isfinite(estimate)
    style = {"marker": "X", "ls": "", "color": FROZEN, "mec": "white", "ms": size, "zorder": 4}
    if known.any():
        axes.plot(at, np.interp(at, part.curve_env_steps[known], estimate[known]), clip_on=False, **style)
    else:
        axes.plot(
            at, np.zeros(len(at)), transform=axes.get_xaxis_transform(), clip_on=False, **style
        )  # fmt: skip


def _legend(axes: Any, table: Table, *, outside: bool, evaluated: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if evaluated and table.evaluated:
        handles.append(Line2D([], [], color="0.4", marker="D", ls="", markeredgecolor="white", ms=8))
        labels.append("final evaluation")
    if table.num_frozen:
        handles.append(_cross())
        labels.append(f"frozen ({table.num_frozen} of {len(table)} members)")
    _place_legend(axes, handles, labels, where="beside" if outside else "within")


def _place_legend(axes: Any, handles: Any, labels: list[str], *, where: str) -> None:
    """Place the legend ``"within"`` the axes where there is most room, ``"beside"`` or ``"below"`` them."""
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("IQM"))  # the main line first
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    if where == "below":
        placed = axes.figure.legend(
            handles, labels, loc="outside lower left", fontsize=8, frameon=False, ncols=len(labels)
        )
    elif where == "beside":
        placed = axes.legend(
            handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False
        )
    else:
        placed = axes.legend(handles, labels, loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    for handle in placed.legend_handles:
        if handle.get_alpha() is not None:  # what is faint because it is many is one here
            handle.set_alpha(max(handle.get_alpha(), 0.4))
