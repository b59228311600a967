"""The final return over what was swept: one value, or two as a heat map."""

from __future__ import annotations

import os

import numpy as np
from matplotlib import transforms
from matplotlib.figure import Figure

from jrl import statistics
from jrl.plots import COLOURS, new_figure, plain, save
from jrl.sweep_plots.curves import _place_legend
from jrl.sweep_plots.parts import (
    _MOST_TICKS,
    _RESAMPLES,
    _best_of_others,
    _bins,
    _centre,
    _check_swept,
    _final_label,
    _ink,
    _iqm,
    _mark_missing,
    _members,
    _over,
    _over_what,
    _returns,
    _spaced,
)
from jrl.tables import Table, distinct, number

_MOST_CELLS = 24  # of a heat map, on each side: more numbers cannot be read


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
    _place_legend(axes, *axes.get_legend_handles_labels(), where="below")  # dots and bars may be anywhere
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
