"""Sweeps side by side: performance profiles and interval estimates."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from jrl import statistics
from jrl.plots import COLOURS, SINGLE, STYLES, new_figure, plain, save
from jrl.sweep_plots.parts import _RESAMPLES, _counted, _final_label, _labelled, _legend_below, _returns
from jrl.tables import Table, number


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
