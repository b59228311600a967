"""Figures of sweeps: what a table of members shows about seeds and hyperparameters.

Lines are interquartile means over seeds, bands and bars 95 % bootstrap intervals (:mod:`jrl.statistics`).
Members without a final return, such as frozen ones, are left out of the means and marked.
"""

from __future__ import annotations

import itertools
import json
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, patheffects, ticker, transforms
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jrl import statistics
from jrl.plots import COLOURS, SINGLE, STYLES, new_figure, over_env_steps, plain, save
from jrl.tables import LINEAGE, Table, distinct, number, setting

FROZEN = "0.1"
_RESAMPLES = 500  # finer than a line is wide
# Perceptually uniform, without its palest end, which white paper swallows.
SCALE = colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)), "scale")
_BEST = 3  # of many groups, how many stand out
_MOST_CELLS = 24  # of a heat map, on each side: more numbers cannot be read
_MOST_TICKS = 9
_LONGEST_LABEL = 34


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
    outside = 4 < len(groups) <= SINGLE or any("\n" in label for label in labels)
    figure = new_figure(9.0 if many or outside else 7.5, 4.5)
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


def sensitivity(
    table: Table, name: str, *, out: str | os.PathLike | None = None, title: str | None = None
) -> Figure:
    """Plot final return against one swept value: interquartile mean, interval, and every member as a faint dot.

    Where other values were swept too, the solid line is over all of them and the dashed one is of the best of
    them at each value. Values drawn at random, each for one member, are averaged over neighbours.

    Args:
        table: of a sweep.
        name: of the swept value; its axis is logarithmic where the values are spaced so.
        out: where to save it; not saved if None.
        title: above the axes.

    Raises:
        ValueError: ``name`` was not swept, or no member has a final return.
    """
    _check_swept("sensitivity", table, name)
    returns = _returns("sensitivity", table)
    texts = distinct(table.columns[name]) if isinstance(table.columns[name][0], str) else []
    x = np.array([texts.index(v) if texts else v for v in table.columns[name]], float)
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    values = np.array(distinct(x))
    if texts:
        axes.set_xticks(values, texts)
    else:
        _spaced(axes, values)
    known = np.isfinite(returns)
    bins = _bins(x)
    neighbours = len(bins) < len(values)
    alone = len(x) == len(values) and not neighbours
    dense = len(bins) > 2 * _MOST_TICKS
    # Beside the bar of their value, not behind it.
    aside = 0 if alone or neighbours or dense else 7 / 72
    beside = axes.transData + transforms.ScaledTranslation(aside, 0, figure.dpi_scale_trans)
    faint = float(
        np.clip(16 * len(values) / len(x), 0.06, 0.4)
    )  # hundreds on one another are a bar otherwise
    axes.plot(
        x[known], returns[known], "o", color=COLOURS[0], ms=4, alpha=faint, mew=0, label="single members",
        zorder=1, transform=beside,
    )  # fmt: skip
    axes.update_datalim(np.stack([x[known], returns[known]], -1))  # a shifted line is not counted by itself
    drawn = []
    for members in bins:
        scores = returns[members & known]
        if scores.size:
            interval = statistics.bootstrap_interval(
                statistics.interquartile_mean, scores, resamples=_RESAMPLES
            )
            drawn.append((_centre(axes, x[members & known]), *interval))
    at, estimate, low, high = np.array(drawn).T
    others = tuple(other for other in table.swept if other != name)
    if alone:
        axes.plot(at, estimate, "-", color=COLOURS[0], lw=1.4, zorder=2)
    elif dense:
        axes.plot(at, estimate, "-", color=COLOURS[0], lw=1.6, label=_over_what(x, bins, others), zorder=3)
        axes.fill_between(at, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    else:
        error = np.stack([np.maximum(estimate - low, 0), np.maximum(high - estimate, 0)])
        axes.errorbar(
            at, estimate, error, color=COLOURS[0], lw=1.6, marker="o", ms=6, capsize=3,
            label=_over_what(x, bins, others), zorder=3,
        )  # fmt: skip
    if others and not neighbours:
        best = [_best_of_others(part, others) for _, part in table.groups([name])]
        axes.plot(values, best, "--", color=COLOURS[4], lw=1.6, marker="s", ms=5, label="best other values")
    _mark_missing(axes, x[~known])
    axes.set_xlabel(name)
    axes.set_ylabel(_final_label(table))
    plain(axes)
    axes.set_title(title if title is not None else _members(table), loc="left", fontsize=10)
    _place_legend(axes, *axes.get_legend_handles_labels(), outside=False)
    save(figure, out)
    return figure


def heat_map(
    table: Table, x: str, y: str, *, out: str | os.PathLike | None = None, title: str | None = None
) -> Figure:
    """Plot the final return of each pair of two swept values: interquartile mean over the members of the pair.

    Args:
        table: of a sweep.
        x: the swept value on the horizontal axis.
        y: that on the vertical one.
        out: where to save it; not saved if None.
        title: above the axes.

    Raises:
        ValueError: ``x`` or ``y`` was not swept, they are the same, or no member has a final return.
    """
    _check_swept("heat_map", table, x)
    _check_swept("heat_map", table, y)
    if x == y:
        raise ValueError(f"heat_map(x={x!r}, y={y!r}): choose two different swept values.")
    _returns("heat_map", table)
    columns, rows = distinct(table.columns[x]), distinct(table.columns[y])
    cells = np.full((len(rows), len(columns)), np.nan)
    notes = np.full(cells.shape, "", object)
    for values, part in table.groups([x, y]):
        cell = rows.index(values[y]), columns.index(values[x])
        cells[cell] = _iqm(part)
        notes[cell] = f"{part.num_frozen} frozen" if part.num_frozen else ""
    annotated = max(cells.shape) <= _MOST_CELLS
    # Wide enough for the numbers, or as small as cells without numbers may be.
    cell_width, cell_height = (0.66, 0.46) if annotated else (0.2, 0.14)
    width, height = 2.6 + cell_width * len(columns), 1.6 + cell_height * len(rows)
    figure = new_figure(min(max(width, 4.6), 19.0), min(max(height, 3.2), 13.0))
    axes = figure.add_subplot()
    axes.set_facecolor("0.92")
    image = axes.imshow(cells, cmap="viridis", origin="lower", aspect="auto", interpolation="none")
    bar = figure.colorbar(image, ax=axes, label=_final_label(table), pad=0.02)
    bar.outline.set_visible(False)
    if annotated:
        for (row, column), value in np.ndenumerate(cells):
            note = str(notes[row, column])
            background = image.cmap(image.norm(value)) if np.isfinite(value) else (0.92, 0.92, 0.92)
            text = number(value) if np.isfinite(value) else "" if note else "–"
            text = "\n".join(line for line in (text, note) if line)
            axes.text(
                column, row, text, ha="center", va="center", linespacing=1.1, color=_ink(background),
                fontsize=7 if "\n" in text else 9,
            )  # fmt: skip
    for axis, ticks in ((axes.xaxis, columns), (axes.yaxis, rows)):
        step = 1 if annotated else -(-len(ticks) // _MOST_TICKS)
        axis.set_ticks(range(0, len(ticks), step), [number(value) for value in ticks[::step]])
    crowded = not annotated or (max(len(number(value)) for value in columns) > 6 and len(columns) > 4)
    axes.tick_params(axis="x", rotation=45 if crowded else 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title is None:
        title = _over([part for _, part in table.groups([x, y])], bands=False)
        title += "; grey: no return" if np.isnan(cells).any() else ""
    axes.set_title(title, loc="left", fontsize=10)
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


def performance_profile(
    tables: Table | Sequence[Table],
    labels: Sequence[str] | None = None,
    *,
    out: str | os.PathLike | None = None,
    title: str | None = None,
) -> Figure:
    """Plot which fraction of members has a final return above each threshold.

    A member without a final return counts as above none, so that a line may begin below 100 %.

    Args:
        tables: of sweeps, or one.
        labels: of the lines, one a table.
        out: where to save it; not saved if None.
        title: above the axes.

    Raises:
        ValueError: the numbers of tables and labels differ, or no member of a table has a final return.
    """
    tables, labels = _labelled("performance_profile", tables, labels)
    returns = [_returns("performance_profile", table) for table in tables]
    low, high = min(map(np.nanmin, returns)), max(map(np.nanmax, returns))
    margin = 0.04 * (high - low) or max(1.0, 0.04 * abs(high))
    thresholds = np.linspace(low - margin, high + margin, 301)
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    for index, (table, scores, label) in enumerate(zip(tables, returns, labels, strict=True)):
        scores = np.where(np.isfinite(scores), scores, low - 2 * margin)
        profile = statistics.bootstrap_interval(
            lambda drawn: statistics.performance_profile(drawn, thresholds), scores, resamples=_RESAMPLES
        )
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        axes.step(
            thresholds, profile.estimate, where="post", color=colour, ls=style, lw=1.6,
            label=_counted(label, table),
        )  # fmt: skip
        if len(table) > 1 and len(tables) <= SINGLE:
            axes.fill_between(
                thresholds, profile.low, profile.high, step="post", color=colour, alpha=0.15, linewidth=0
            )
    axes.set_xlabel(f"threshold τ: {_final_label(tables[0])}")
    axes.set_ylabel("members with return > τ")
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axes.set_xlim(thresholds[0], thresholds[-1])
    axes.set_ylim(-0.02, 1.02)
    plain(axes)
    axes.set_title(
        title if title is not None else "performance profile, band: 95 % interval", loc="left", fontsize=10
    )
    _legend_below(figure)
    save(figure, out)
    return figure


def interval_estimates(
    tables: Table | Sequence[Table],
    labels: Sequence[str] | None = None,
    *,
    target: float | None = None,
    out: str | os.PathLike | None = None,
    title: str | None = None,
) -> Figure:
    """Plot interquartile mean, median, mean and optimality gap of final returns, each with its interval.

    Args:
        tables: of sweeps, or one.
        labels: of the rows, one a table.
        target: of the optimality gap; the best return of any member by default.
        out: where to save it; not saved if None.
        title: above the panels.

    Raises:
        ValueError: the numbers of tables and labels differ, or no member of a table has a final return.
    """
    tables, labels = _labelled("interval_estimates", tables, labels)
    returns = [_returns("interval_estimates", table) for table in tables]
    target = max(map(np.nanmax, returns)) if target is None else target
    panels = {
        "iqm": "interquartile mean", "median": "median", "mean": "mean",
        "optimality_gap": f"gap to {number(target)}\n(lower is better)",
    }  # fmt: skip
    figure = new_figure(9.5, 1.5 + 0.45 * len(tables))
    rows = figure.subplots(1, len(panels), sharey=True)
    for index, (scores, table) in enumerate(zip(returns, tables, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        found = statistics.aggregates(scores[np.isfinite(scores)], target=target)
        for axes, name in zip(rows, panels, strict=True):
            interval = found[name]
            if len(table) > 1:
                axes.barh(
                    index, interval.high - interval.low, 0.55, interval.low, color=colour, alpha=0.4, lw=0
                )
            axes.plot([interval.estimate] * 2, [index - 0.275, index + 0.275], color=colour, lw=2.5)
    for axes, text in zip(rows, panels.values(), strict=True):
        axes.set_title(text, fontsize=10, va="bottom")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3, min_n_ticks=2))
        axes.use_sticky_edges = False
        axes.margins(x=0.1)
        plain(axes)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
    texts = [_counted(label, table) for label, table in zip(labels, tables, strict=True)]
    rows[0].set_yticks(range(len(tables)), texts)
    rows[0].set_ylim(len(tables) - 0.4, -0.6)
    figure.supxlabel(_final_label(tables[0]), fontsize=10)
    if title is not None:
        figure.suptitle(title, fontsize=11)
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


def log_spaced(values: Any) -> bool:
    """Tell whether values are spaced more evenly on a logarithmic axis than on a linear one; 0 may be among them."""
    ordered = np.unique(np.asarray(values, float))
    positive = ordered[ordered > 0]
    if ordered[0] < 0 or len(positive) < 2 or positive[-1] < 5 * positive[0]:
        return False
    if len(ordered) == 2:
        return positive[-1] >= 10 * positive[0]
    return _unevenness(np.log(positive)) < _unevenness(positive)


def _unevenness(values: np.ndarray) -> float:
    gaps = np.diff(values)
    return float(gaps.std() / gaps.mean())


# ------------------------------------------------------------------------------------------------- curves


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
    _place_legend(axes, handles, labels, outside=outside)


def _place_legend(axes: Any, handles: Any, labels: list[str], *, outside: bool) -> None:
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("IQM"))  # the main line first
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    if outside:
        placed = axes.legend(
            handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False
        )
    else:
        placed = axes.legend(handles, labels, loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    for handle in placed.legend_handles:
        if handle.get_alpha() is not None:  # what is faint because it is many is one here
            handle.set_alpha(max(handle.get_alpha(), 0.4))


def _cross() -> Line2D:
    return Line2D([], [], color=FROZEN, marker="X", ls="", markeredgecolor="white", ms=8)


def _legend_below(figure: Figure, *, marked: bool = False) -> None:
    """Bands may fill the axes: there is no room for a legend within."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if marked:
        handles.append(_cross())
        labels.append("frozen member")
    columns = 1 if len(labels) <= SINGLE else 2
    figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False, ncols=columns)


# -------------------------------------------------------------------------------------------------- parts


def _over_what(x: np.ndarray, bins: list[np.ndarray], others: Sequence[str]) -> str:
    if len(bins) < len(np.unique(x)):
        return f"IQM of {len(x) // len(bins)} or more neighbours"
    return "IQM over seeds" + (" and the other values" if others else "")


def _iqm(part: Table) -> float:
    known = part.final_returns[np.isfinite(part.final_returns)]
    return statistics.interquartile_mean(known) if known.size else np.nan


def _best_of_others(part: Table, others: Sequence[str]) -> float:
    scores = [score for score in (_iqm(other) for _, other in part.groups(others)) if np.isfinite(score)]
    return max(scores, default=np.nan)


def _bins(x: np.ndarray) -> list[np.ndarray]:
    """Masks of equal values; of neighbouring ones where there are many values with hardly a member each."""
    values = np.unique(x)
    if len(values) <= 2 * _MOST_TICKS or len(x) >= 2 * len(values):
        return [x == value for value in values]
    rank = np.argsort(np.argsort(x, kind="stable"), kind="stable")
    bins = max(2, min(_MOST_TICKS, len(x) // 6))
    return [rank * bins // len(x) == i for i in range(bins)]


def _centre(axes: Any, values: np.ndarray) -> float:
    """The middle of values as it is seen on the axis."""
    return float(np.exp(np.log(values).mean()) if axes.get_xscale() == "log" else values.mean())


def _spaced(axes: Any, values: np.ndarray) -> None:
    """Choose the scale of the horizontal axis, and ticks at the values themselves where these are few."""
    if log_spaced(values):
        if values[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=values[values > 0][0], linscale=0.5)
    if len(values) <= _MOST_TICKS:
        positions = axes.xaxis.get_transform().transform(values)
        room = np.ptp(positions) or 1.0
        if len(values) == 1 or np.diff(positions).min() / room > 0.07:
            axes.set_xticks(values, [number(value) for value in values])
            axes.xaxis.set_minor_locator(ticker.NullLocator())


def _mark_missing(axes: Any, x: np.ndarray) -> None:
    """Mark members without a final return at the lower edge, with how many they are where there is room."""
    values, counts = np.unique(x, return_counts=True)
    if not len(values):
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.12 * (high - low), high)
    axes.plot(
        values, np.full(len(values), 0.03), "X", transform=axes.get_xaxis_transform(), color=FROZEN, mec="white",
        ms=9, clip_on=False, label=f"without a return ({len(x)})", zorder=4,
    )  # fmt: skip
    positions = axes.transAxes.inverted().transform(axes.transData.transform([(v, 0) for v in values]))[:, 0]
    if len(values) == 1 or np.diff(positions).min() > 0.03:
        for value, count in zip(values, counts, strict=True):
            axes.annotate(
                f"{count}", (value, 0.03), xycoords=axes.get_xaxis_transform(), xytext=(0, 6),
                textcoords="offset points", ha="center", fontsize=8, color=FROZEN,
            )  # fmt: skip


def _ink(background: Any) -> str:
    """Black or white, whichever stands out more from a colour (WCAG relative luminance)."""
    channels = np.array(background[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def _final_label(table: Table) -> str:
    if table.evaluated:
        return "episode return, final evaluation"
    return "episode return, last 10 % of training"


def _over(parts: Sequence[Table], bands: bool = True) -> str:
    sizes = sorted({len(part) for part in parts})
    if sizes == [1]:
        return "one member each" if len(parts) > 1 else "one member"
    count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"interquartile mean over {count} members" + (", band: 95 % interval" if bands else "")


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LONGEST_LABEL, break_long_words=False, break_on_hyphens=False)


def _members(table: Table) -> str:
    count = f"{len(table)} members" if len(table) > 1 else "one member"
    return count + (f", {table.num_frozen} frozen" if table.num_frozen else "")


def _counted(label: str, table: Table) -> str:
    if len(label) > _LONGEST_LABEL:
        label = f"…{label[1 - _LONGEST_LABEL :]}"
    return f"{label} ({_members(table).replace(' members', '')})" if len(table) > 1 else label


def _labelled(
    function: str, tables: Table | Sequence[Table], labels: Sequence[str] | None
) -> tuple[list[Table], list[str]]:
    tables = [tables] if isinstance(tables, Table) else list(tables)
    if labels is None:
        labels = ["all members"] if len(tables) == 1 else [f"sweep {i + 1}" for i in range(len(tables))]
    if len(tables) != len(labels) or not tables:
        raise ValueError(
            f"{function}: {len(tables)} tables and {len(labels)} labels; give one label a table."
        )
    return tables, list(labels)


def _check_swept(function: str, table: Table, name: str) -> None:
    if name not in table.swept:
        raise ValueError(f"{function}: {name!r} was not swept. Swept: {', '.join(table.swept) or 'nothing'}.")


def _check_curves(table: Table, of: str = "") -> None:
    if not np.isfinite(table.curves).any():
        raise ValueError(
            f"nothing to plot: no member{of} has had an episode end, of {len(table)}. A curve needs at least one; "
            "train for longer."
        )


def _returns(function: str, table: Table) -> np.ndarray:
    returns = table.final_returns
    if not np.isfinite(returns).any():
        raise ValueError(
            f"{function}: no member of {len(table)} has a final return, neither of an evaluation nor of "
            "training. Train for longer, or look at why they were frozen."
        )
    return returns
