"""What the figures of sweeps share: axes over values, labels, scores, and checks of a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jrl import statistics
from jrl.plots import SINGLE
from jrl.tables import Table, number

FROZEN = "0.1"
_RESAMPLES = 500  # finer than a line is wide
# Perceptually uniform, without its palest end, which white paper swallows.
SCALE = colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)), "scale")
_MOST_TICKS = 9
_LONGEST_LABEL = 34


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


def _cross() -> Line2D:
    return Line2D([], [], color=FROZEN, marker="X", ls="", markeredgecolor="white", ms=8)


def _legend_below(figure: Figure, *, marked: bool = False) -> None:
    """Place the legend outside: bands and dots may fill the axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if marked:
        handles.append(_cross())
        labels.append("frozen member")
    columns = 1 if len(labels) <= SINGLE else 2
    figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False, ncols=columns)


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
