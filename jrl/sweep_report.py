"""What a person sees of a sweep at its end, and of several sweeps side by side: tables of 80 columns."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrl import progress, statistics
from jrl.statistics import Interval
from jrl.tables import TABLE, Table, number, setting

WIDTH = 80
_LINES = 14  # of rows; with title, header and caption about 20
_GAP = 2  # between two columns
_LABEL = 14  # at least, of the column of labels
_MERGED = "setting"


def show(renderable: Any) -> None:
    """Print what the other functions return, as wide as the terminal, or :data:`WIDTH` where there is none."""
    progress.console(None if sys.stdout.isatty() else WIDTH).print(renderable, highlight=False)


def render(table: Table) -> Any:
    """Return the results of a sweep for printing with rich: a row a setting, the best first.

    Each row is over the seeds of its setting: the interquartile mean of the final returns with its 95 %
    bootstrap interval, the worst seed, and how many seeds were frozen and so count in neither.

    Args:
        table: of a sweep.

    Returns:
        What ``rich.print`` takes, about 20 lines of 80 columns; it says how many settings are not shown.
    """
    from rich.console import Group
    from rich.markup import escape

    groups = table.groups()
    scores = [part.final_returns[np.isfinite(part.final_returns)] for _, part in groups]
    iqm = np.array([statistics.interquartile_mean(s) if s.size else -np.inf for s in scores])
    best = np.argsort(-iqm, kind="stable")[:_LINES].tolist()
    numbers = [_numbers(groups[index][1], scores[index]) for index in best]
    heads = ("seeds", "return, IQM [95 %]", "worst", "frozen")
    taken = sum(_widest(column) + _GAP for column in zip(heads, *numbers, strict=True))
    settings = _settings([groups[index][0] for index in best], WIDTH - taken)
    names = _headers(settings, WIDTH - taken)
    shown, lines = 0, max((name.count("\n") for name in names), default=0)
    for row in settings:
        lines += max((cell.count("\n") + 1 for cell in row.values()), default=1)
        shown += lines <= _LINES

    what = "final evaluation" if table.evaluated else "last 10 % of training"
    title = f"{_plural(len(groups), 'setting')}, {_plural(len(table), 'member')}: {what}"
    result = _rich_table()
    for name in names:
        result.add_column(name, justify="left" if name == _MERGED else "right", no_wrap=True)
    for name in heads:
        result.add_column(escape(name), justify="right", no_wrap=True)
    for row, cells in list(zip(settings, numbers, strict=True))[:shown]:
        result.add_row(*row.values(), *map(escape, cells))
    notes = (escape(note) for note in _notes(table, len(groups) - shown))
    return Group(f"[bold]{title}[/bold]", result, *notes)


def compare(tables: Sequence[Table], labels: Sequence[str], *, target: float | None = None) -> Any:
    """Return statistics of several tables side by side, for printing with rich: a row a table.

    Interquartile mean, median, mean, optimality gap and the probability that a member is better than one of the
    first table, each with its 95 % bootstrap interval. Members without a final return are left out, and counted.

    Args:
        tables: of sweeps or runs.
        labels: their names.
        target: of the optimality gap; the best return of any member by default.

    Returns:
        What ``rich.print`` takes.

    Raises:
        ValueError: a table has no member with a final return.
    """
    from rich.console import Group
    from rich.markup import escape

    scores = []
    for table, label in zip(tables, labels, strict=True):
        scores.append(table.final_returns[np.isfinite(table.final_returns)])
        if not scores[-1].size:
            raise ValueError(
                f"{label}: no member of {len(table)} has a final return, neither of an evaluation nor of "
                "training. There is nothing to compare; train for longer, or look at why they were frozen."
            )
    target = float(max(s.max() for s in scores)) if target is None else target
    heads = ("IQM", "median", "mean", f"gap to {number(target)}", "better than\nthe first")
    rows: list[list[Interval]] = []
    for known in scores:
        found = list(statistics.aggregates(known, target=target).values())
        better = statistics.bootstrap_interval(statistics.probability_of_improvement, known, scores[0])
        several = [len(known) > 1] * len(found) + [len(known) > 1 and len(scores[0]) > 1]
        percent = Interval(*(100 * side for side in better))
        rows.append([_bare(i, spread) for i, spread in zip([*found, percent], several, strict=True)])

    def cells(separator: str) -> list[list[str]]:
        texts = [[_text(interval, "\n", separator) for interval in row] for row in rows]
        for row in texts:
            row[-1] = row[-1].replace("\n", " %\n", 1) if "\n" in row[-1] else f"{row[-1]} %"
        texts[0][-1] = "–"
        return texts

    texts = cells(", ")
    if _LABEL + sum(_widest(column) + _GAP for column in zip(heads, *texts, strict=True)) > WIDTH:
        texts = cells(",\n")
    result = _rich_table()
    result.add_column("", overflow="fold", min_width=_LABEL)
    for name in heads:
        result.add_column(name, justify="right", no_wrap=True)
    for table, label, known, row in zip(tables, labels, scores, texts, strict=True):
        missing = len(table) - known.size
        members = _plural(len(table), "member") + (f"\n{missing} no return" if missing else "")
        result.add_row(f"{escape(label)}\n[dim]{members}[/dim]", *map(escape, row))
    return Group("[bold]final return and its 95 % interval[/bold]", result)


def _rich_table() -> Any:
    from rich import box
    from rich.table import Table as RichTable

    return RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _settings(groups: Sequence[dict[str, float]], room: int) -> list[dict[str, str]]:
    """The cells of each setting: a column a swept value, or one of all of them where there is no room."""
    cells = [{name: number(value) for name, value in values.items()} for values in groups]
    if sum(_widest([_broken(name, 0), *(row[name] for row in cells)]) + _GAP for name in groups[0]) <= room:
        return cells
    return [
        {_MERGED: textwrap.fill(setting(v), room - _GAP, break_on_hyphens=False)} for v in groups
    ]  # fmt: skip


def _headers(settings: Sequence[dict[str, str]], room: int) -> list[str]:
    """The names of the columns, in lines as wide as there is room for."""
    if not settings[0]:
        return []
    cells = {name: [row[name] for row in settings] for name in settings[0]}
    for longest in range(room, 0, -1):
        names = [_broken(name, max(longest, _widest(cells[name]))) for name in cells]
        taken = sum(
            _widest([name, *column]) + _GAP for name, column in zip(names, cells.values(), strict=True)
        )
        if taken <= room:
            break
    return names


def _broken(name: str, width: int) -> str:
    """Break a name at its dots and underscores into lines of a width, wider where a part is."""
    lines = [""]
    for piece in re.findall(r"[^._]+[._]?|[._]", name):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _widest(cells: Sequence[str]) -> int:
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)


def _numbers(part: Table, known: np.ndarray) -> tuple[str, str, str, str]:
    frozen = str(part.num_frozen) if part.num_frozen else ""
    if not known.size:
        return str(len(part)), "–", "–", frozen
    interval = statistics.bootstrap_interval(statistics.interquartile_mean, known)
    return str(len(part)), _text(_bare(interval, known.size > 1), " "), number(known.min()), frozen


def _bare(interval: Interval, several: bool) -> Interval:
    """The estimate alone where one of the samples is a single run, which knows of no spread."""
    return interval if several else Interval(interval.estimate, None, None)


def _text(interval: Interval, before: str, between: str = ", ") -> str:
    if interval.low is None:
        return number(interval.estimate)
    return f"{number(interval.estimate)}{before}[{number(interval.low)}{between}{number(interval.high)}]"


def _notes(table: Table, hidden: int) -> list[str]:
    notes = []
    if hidden:
        notes.append(f"... and {hidden:,} more {'setting' if hidden == 1 else 'settings'}, all in {TABLE}")
    frozen = [i for i, status in enumerate(table.columns["status"]) if status == "frozen"]
    if frozen:
        first = min(frozen, key=lambda i: table.columns["frozen_at"][i] or 0)
        at, why = table.columns["frozen_at"][first], table.columns["frozen_why"][first]
        text = f"{_plural(len(frozen), 'member')} frozen" + (", the first" if len(frozen) > 1 else "")
        text += ("" if at is None else f" at env step {at:,}") + ("" if why is None else f": {why}")
        notes.append(textwrap.shorten(text, WIDTH, placeholder=" ..."))
    return notes


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
