"""Learning curves from run folders. Figures are made without pyplot: no window, no global state."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jrl import records
from jrl.records import RunError

# Okabe and Ito's palette, told apart with every common colour blindness; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
_WITH_BANDS = 3  # curves up to which each has its own min-max band
SINGLE = 7  # curves up to which each run is drawn for itself


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of the plot, all arrays ``[n]``.

    ``measure`` is ``episode_return``; of a language model ``validation_loss``, over tokens in place of steps.
    ``evaluation`` is the mean return of the final evaluation (None before a run's end).
    """

    label: str
    env_steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    evaluation: float | None
    group: str
    env: str
    measure: str = "episode_return"


def learning_curve(
    runs: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    out: str | os.PathLike | None = None,
    title: str | None = None,
) -> Figure:
    """Plot episode return over environment steps, of one run folder or of several on the same axes.

    The line is the mean return of the episodes that ended since the last point, the band their minimum and
    maximum; the diamond at the end is the final evaluation. More than seven runs are grouped by algorithm and
    environment: the line is then the mean over runs, the band their range.

    Args:
        runs: run folders.
        out: where to save it, the suffix says the format; not saved if None.
        title: above the axes; by default the environment.

    Raises:
        RunError: a folder is not a run, or no episode has ended in any of them.
    """
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    curves = [read(folder) for folder in folders]
    drawn = [curve for curve in curves if curve.env_steps.size]
    if not drawn:
        raise RunError(
            f"nothing to plot: no episode has ended yet in {', '.join(str(folder) for folder in folders)}. "
            "A curve needs at least one; resume the run or train for longer."
        )
    measures = {curve.measure for curve in drawn}
    if len(measures) > 1:
        raise RunError(
            "runs of language models and of environments have no axes in common: losses and returns; plot them apart."
        )
    grouped = len(drawn) > SINGLE and len({curve.group for curve in drawn}) < len(drawn)
    if grouped:
        drawn = _group(drawn)

    many = len(drawn) > SINGLE
    figure = new_figure(10.0 if many else 9.0, 4.5)
    axes = figure.add_subplot()
    for index, curve in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        if grouped or len(drawn) <= _WITH_BANDS:
            axes.fill_between(curve.env_steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        # A single point makes no line: mark it.
        marker = "o" if curve.env_steps.size == 1 else None
        axes.plot(
            curve.env_steps, curve.mean, color=colour, ls=style, lw=1.6, marker=marker, label=curve.label
        )
        if curve.evaluation is not None:
            axes.plot(
                curve.env_steps[-1], curve.evaluation, "D", color=colour, markeredgecolor="white", ms=8,
                clip_on=False, zorder=3,
            )  # fmt: skip
    axes.set_ylabel(measures.pop().replace("_", " "))
    over_env_steps(axes)
    if drawn[0].measure == "validation_loss":
        axes.set_xlabel("tokens")
    plain(axes)
    names = dict.fromkeys(curve.env for curve in drawn)
    axes.set_title(title if title is not None else ", ".join(names), loc="left", fontsize=11)
    _legend(axes, drawn)
    save(figure, out)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, without a window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def over_env_steps(axes: Any) -> None:
    """Make the horizontal axis one of environment steps, from 0."""
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlim(left=0)


def plain(axes: Any) -> None:
    """Leave out what a figure does not need: two sides of the frame, and a grid that is darker than its curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def save(figure: Figure, out: str | os.PathLike | None) -> None:
    """Write the figure, if ``out`` says where; its suffix says the format.

    Raises:
        RunError: the system does not let it be written there.
    """
    if out is None:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise RunError(
            f"the figure {out} cannot be written: {error.strerror or error}. Write it elsewhere with --out (out=...), "
            "or copy the folder to where you may write."
        ) from error


def read(folder: str | os.PathLike) -> Curve:
    """Read the curve of a run folder; raises :class:`~jrl.records.RunError` if it is not one."""
    record = records.read_run(folder)
    measure = "validation_loss" if "corpus" in record else "episode_return"
    rows = [row for row in records.read_metrics(folder) if row.get(measure) is not None]
    summary = records.read_summary(folder) or {}
    final = measure if "corpus" in record else "episode_return_mean"
    evaluation = (summary.get("evaluation") or {}).get(final)
    mean = np.array([row[measure] for row in rows], float)
    algorithm, env = record["algorithm"]["name"], record["environment"]["name"]
    return Curve(
        label=Path(folder).resolve().name,
        env_steps=np.array([row["env_steps"] for row in rows], float),
        mean=mean,
        low=np.array([row.get("episode_return_min", row[measure]) for row in rows], float),
        high=np.array([row.get("episode_return_max", row[measure]) for row in rows], float),
        evaluation=evaluation,
        group=f"{algorithm}, {env}",
        env=env,
        measure=measure,
    )


def _group(curves: list[Curve]) -> list[Curve]:
    """Merge runs of the same algorithm and environment: mean and range over runs, on a common axis."""
    merged = []
    for group in dict.fromkeys(curve.group for curve in curves):
        members = [curve for curve in curves if curve.group == group]
        # Only where every member has data, and no finer than the coarsest of them.
        start = max(curve.env_steps[0] for curve in members)
        stop = max(start, min(curve.env_steps[-1] for curve in members))
        steps = np.linspace(start, stop, min(curve.env_steps.size for curve in members))
        values = np.stack([np.interp(steps, curve.env_steps, curve.mean) for curve in members])
        scores = [curve.evaluation for curve in members if curve.evaluation is not None]
        merged.append(
            Curve(
                label=f"{group} ({len(members)} runs)",
                env_steps=steps,
                mean=values.mean(0),
                low=values.min(0),
                high=values.max(0),
                evaluation=float(np.mean(scores)) if scores else None,
                group=group,
                env=members[0].env,
                measure=members[0].measure,
            )
        )
    return merged


def _legend(axes: Any, curves: list[Curve]) -> None:
    """Place the legend beside the axes: bands may fill them, and it would cover the mark of an evaluation."""
    handles, labels = axes.get_legend_handles_labels()
    if any(curve.evaluation is not None for curve in curves):
        mark = Line2D([], [], color="0.4", marker="D", ls="", markeredgecolor="white", ms=8)
        handles, labels = [*handles, mark], [*labels, "final evaluation"]
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def short(value: float) -> str:
    """Write 500000 as 500 k, 2500000 as 2.5 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
