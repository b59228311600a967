"""The table of a sweep: one row a member, with its learning curve; written to files and read back exactly.

::

    member, seed, <swept values by name>, episode_return_mean, ..., frozen_why, curve, curve_env_steps

Of population-based training there is ``lineage`` behind ``frozen_why``.

Tidy: every column is one variable, every row one member. In a CSV file a number that is not there is an empty
cell and NaN is ``nan``; the curve is a JSON list, in which NaN is ``null``.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrl import records, statistics
from jrl.records import RunError

TABLE = "table.csv"  # in the folder of a sweep
FIRST = ("member", "seed")
RESULTS = (
    *("episode_return_mean", "episode_return_std", "episode_return_min", "episode_return_max"),
    *("num_episodes", "train_return", "env_steps", "status", "frozen_at", "frozen_why"),
)
CURVE = ("curve", "curve_env_steps")
LINEAGE = "lineage"
STATUSES = ("ok", "frozen", "stopped")
_INTEGERS = ("member", "seed", "num_episodes", "env_steps", "frozen_at")
_TEXTS = ("status", "frozen_why", LINEAGE)
_OPTIONAL = (*RESULTS[:5], "frozen_at", "frozen_why")
_LONGEST_CELL = 2**31 - 1  # the csv module's own limit, 131072, is a curve of some 8,000 points


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Results of the ``M`` members of a sweep.

    Args:
        columns: lists of length ``M`` by name, in this order: ``member`` and ``seed``; the swept values, numbers
            or (static choices) texts;
            ``episode_return_mean``, ``_std``, ``_min`` and ``_max`` and ``num_episodes`` of the final
            evaluation, None where there was none; ``train_return``, the training return over the last 10 % of
            the run (NaN where no episode ended); ``env_steps``; ``status``, "ok", "frozen" or "stopped";
            ``frozen_at`` in env steps and ``frozen_why``, None for members that were not frozen. Of population-based
            training the swept values are those at the end, and ``lineage`` follows: the ancestry of the member's
            policy as JSON, ``[[env step, member, {name: value}], ...]``: from that step on it was trained as that
            member (whose curve shows it) with these values.
        curve_env_steps: ``[T]``, increasing.
        curves: ``[M, T]``, training return of the episodes that ended since the last point, NaN where none did.
        swept: the names of the swept columns; the seed is none of them.

    Raises:
        ValueError: a column is missing, in the wrong place or of the wrong length, or holds a wrong value.
    """

    columns: dict[str, list]
    curve_env_steps: np.ndarray
    curves: np.ndarray
    swept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "swept", tuple(self.swept))
        put(self, "curve_env_steps", np.asarray(self.curve_env_steps))
        put(self, "curves", np.asarray(self.curves, float))
        put(self, "columns", {name: [_scalar(v) for v in values] for name, values in self.columns.items()})
        _check(self)

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.columns["member"])

    def row(self, i: int) -> dict[str, Any]:
        """Return row ``i`` (counted from 0, as in a list; not the number of the member), without its curve."""
        return {name: values[i] for name, values in self.columns.items()}

    def where(self, **values: float | str | None) -> Table:
        """Return the rows with these values: ``table.where(seed=0, **{"env.length": 0.5})``.

        Numbers are equal if they are to a relative 1e-6, about float32's precision.

        Raises:
            ValueError: there is no such column, or no row with these values.
        """
        rows: Sequence[int] = range(len(self))
        for name, value in values.items():
            if name not in self.columns:
                raise ValueError(
                    f"where({name}={value!r}): there is no column {name!r}. Columns: {', '.join(self.columns)}."
                )
            kept = [i for i in rows if _equal(self.columns[name][i], value)]
            if not kept:
                there = [f"{v!r}" for v in distinct(self.columns[name][i] for i in rows)]
                raise ValueError(
                    f"where({name}={value!r}): no row has this value. There are {', '.join(there[:8])}"
                    f"{' ...' if len(there) > 8 else ''}."
                )
            rows = kept
        return self.take(rows)

    def take(self, rows: Iterable[int]) -> Table:
        """Return the rows of these positions, in this order."""
        rows = list(rows)
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Table(columns, self.curve_env_steps, self.curves[rows], self.swept)

    def groups(self, by: Sequence[str] | None = None) -> list[tuple[dict[str, float], Table]]:
        """Return the table in parts of equal values of ``by``, by default of all swept values, sorted by them.

        Raises:
            ValueError: a name in ``by`` is no column.
        """
        by = self.swept if by is None else tuple(by)
        for name in by:
            if name not in self.columns:
                raise ValueError(
                    f"groups(by={by!r}): there is no column {name!r}. Swept: {', '.join(self.swept) or 'none'}."
                )
        rows: dict[tuple[Any, ...], list[int]] = {}
        for i in range(len(self)):
            rows.setdefault(tuple(self.columns[name][i] for name in by), []).append(i)
        return [
            (dict(zip(by, key, strict=True)), self.take(rows[key])) for key in sorted(rows, key=_in_order)
        ]

    @property
    def final_returns(self) -> np.ndarray:
        """``[M]``: mean return of the final evaluation; in a table without any, the training return.

        NaN for a member without one, such as a frozen one.
        """
        name = "episode_return_mean" if self.evaluated else "train_return"
        return np.array([math.nan if v is None else v for v in self.columns[name]], float)

    @property
    def evaluated(self) -> bool:
        """Whether any member has a final evaluation."""
        return any(value is not None for value in self.columns["episode_return_mean"])

    @property
    def num_scored(self) -> int:
        """How many members have a final return."""
        return int(np.isfinite(self.final_returns).sum())

    @property
    def num_frozen(self) -> int:
        """How many members were frozen."""
        return self.columns["status"].count("frozen")

    # --------------------------------------------------------------------------------------------- files

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write a CSV file, which is at all times the old one or the new one, complete.

        Every number is written so that it is read back the same. pandas reads the file as it is.
        """
        steps = json.dumps(self.curve_env_steps.tolist(), allow_nan=False)
        with (
            records.replacing(Path(path)) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="") as stream,
        ):
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([*self.columns, *CURVE])
            for i in range(len(self)):
                curve = json.dumps(records.plain(self.curves[i].tolist()), allow_nan=False)
                cells = ["" if value is None else value for value in self.row(i).values()]
                writer.writerow([*cells, curve, steps])

    @classmethod
    def from_csv(cls, path: str | os.PathLike) -> Table:
        """Read what :meth:`to_csv` wrote.

        Raises:
            RunError: the file is not there or not readable, or its content is not that of a table.
        """
        path = Path(path)
        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            with path.open(encoding="utf-8", newline="") as stream:
                lines = [line for line in csv.reader(stream, strict=True) if line]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RunError(f"{path} cannot be read as a table ({error}). {_RULE}") from error
        finally:
            csv.field_size_limit(limit)
        header, rows = (lines[0], lines[1:]) if lines else ([], [])
        swept = _swept(path, header)
        if len(rows) == 0:
            raise RunError(f"{path} has no rows: a table has at least one member. {_RULE}")
        for number, row in enumerate(rows, start=1):
            if len(row) != len(header):
                raise RunError(
                    f"{path}, row {number} has {len(row)} cells and the header {len(header)}: the file is cut "
                    f"short or was edited. {_RULE}"
                )
        columns: dict[str, list] = {name: [] for name in header}
        for number, row in enumerate(rows, start=1):
            for name, cell in zip(header, row, strict=True):
                try:
                    columns[name].append(_parse(name, cell, text=name in swept))
                except ValueError as error:
                    raise RunError(
                        f"{path}, row {number}, column {name}: {_excerpt(cell)} {error}. {_RULE}"
                    ) from error
        for name in swept:  # a static choice such as a list of widths
            if any(isinstance(value, str) for value in columns[name]):
                columns[name] = [str(value) for value in columns[name]]
        return _from_columns(path, columns, swept)

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Write a Parquet file with the same columns; the curves are lists of numbers.

        Raises:
            ImportError: pyarrow is not installed.
        """
        pyarrow, parquet = _pyarrow()
        fields: dict[str, Any] = {}
        for name, values in self.columns.items():
            texts = name in _TEXTS or any(isinstance(value, str) for value in values)
            kind = pyarrow.string() if texts else pyarrow.float64()
            if name in _INTEGERS or (name in self.swept and all(isinstance(v, int) for v in values)):
                kind = pyarrow.int64()
            fields[name] = pyarrow.array(values, kind)
        steps = self.curve_env_steps.tolist()
        kind = pyarrow.int64() if np.issubdtype(self.curve_env_steps.dtype, np.integer) else pyarrow.float64()
        fields["curve"] = pyarrow.array(self.curves.tolist(), pyarrow.list_(pyarrow.float64()))
        fields["curve_env_steps"] = pyarrow.array([steps] * len(self), pyarrow.list_(kind))
        with records.replacing(Path(path)) as unfinished:
            parquet.write_table(pyarrow.table(fields), unfinished)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike) -> Table:
        """Read what :meth:`to_parquet` wrote.

        Raises:
            ImportError: pyarrow is not installed.
            RunError: the file is not there or not readable, or its content is not that of a table.
        """
        pyarrow, parquet = _pyarrow()
        try:
            columns = parquet.read_table(path).to_pydict()
        except (OSError, pyarrow.ArrowException) as error:
            raise RunError(f"{path} cannot be read as a table ({error}). {_RULE}") from error
        return _from_columns(Path(path), columns, _swept(Path(path), list(columns)))

    def to_pandas(self) -> Any:
        """Return the columns as a ``pandas.DataFrame``, without the curves.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Table.to_pandas needs pandas: pip install pandas") from error
        frame = pandas.DataFrame(self.columns)
        # Whole numbers stay whole beside missing ones.
        return frame.astype(dict.fromkeys(("num_episodes", "frozen_at"), "Int64"))


def read(folder: str | os.PathLike) -> Table:
    """Return the table of a sweep's folder, or of a run's folder a table of one member.

    Raises:
        RunError: the folder is neither, or a run without a summary.
    """
    folder = Path(folder)
    if (folder / TABLE).exists():
        return Table.from_csv(folder / TABLE)
    if not (folder / records.RUN).exists():
        what = f"has no {TABLE} and no {records.RUN}" if folder.is_dir() else "is not a folder"
        raise RunError(
            f"{folder} is neither the folder of a sweep nor of a run: it {what}. Give a folder that "
            "`jrl train` or a sweep has written."
        )
    record, summary = records.read_run(folder), records.read_summary(folder)
    if summary is None:
        raise RunError(
            f"{folder} is a run without {records.SUMMARY}: it has not come to its end. Continue it with "
            f"`jrl resume {shlex.quote(str(folder))}`."
        )
    rows = records.read_metrics(folder)
    steps = np.array([row["env_steps"] for row in rows], int)
    curve = np.array(
        [math.nan if row.get("episode_return") is None else row["episode_return"] for row in rows]
    )
    evaluation = summary.get("evaluation") or {}
    env_steps = int(summary["env_steps"])
    values: dict[str, Any] = {name: evaluation.get(name) for name in RESULTS[:5]}
    values |= {
        "member": 0,
        "seed": record["seed"],
        "train_return": late_return(steps, curve[None], env_steps)[0],
        "env_steps": env_steps,
        "status": "stopped" if summary.get("interrupted") else "ok",
        "frozen_at": None,
        "frozen_why": None,
    }
    return Table({name: [values[name]] for name in (*FIRST, *RESULTS)}, steps, curve[None])


def best(table: Table) -> tuple[dict[str, float], Table]:
    """Return the swept values and the rows of the setting with the best interquartile mean of final returns.

    Raises:
        ValueError: no member has a final return.
    """
    scored = []
    for values, part in table.groups():
        known = part.final_returns[np.isfinite(part.final_returns)]
        if known.size:
            scored.append((statistics.interquartile_mean(known), values, part))
    if not scored:
        raise ValueError(f"no member of {len(table)} has a final return: there is no best setting.")
    _, values, part = max(scored, key=lambda item: item[0])
    return values, part


def late_return(curve_env_steps: np.ndarray, curves: np.ndarray, env_steps: int) -> np.ndarray:
    """Return each member's mean training return over the last 10 % of ``env_steps``: ``[M]``.

    Args:
        curve_env_steps: ``[T]``.
        curves: ``[M, T]``, NaN where no episode ended: these points do not count.
        env_steps: of the whole run.

    Returns:
        ``[M]``, NaN where no episode ended in that time.
    """
    late = np.where(curve_env_steps > 0.9 * env_steps, curves, np.nan)
    known = np.isfinite(late)
    total = np.where(known, late, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetition, sorted: numbers, then texts, then None."""
    return [value for (value,) in sorted({(value,) for value in values}, key=_in_order)]


def _in_order(values: tuple[Any, ...]) -> list[tuple[bool, bool, Any]]:
    return [(value is None, isinstance(value, str), 0 if value is None else value) for value in values]


def setting(values: dict[str, float]) -> str:
    """Write the values of a group: ``learning_rate=0.0003, gamma=0.99``; "all members" where nothing was swept."""
    return ", ".join(f"{name}={number(value)}" for name, value in values.items()) or "all members"


def number(value: float | str) -> str:
    """Write a number in three digits, more if it is large: 12345, 482, 12.3, 0.0003, 3e-07, 3.59 M; a text as it is."""
    if isinstance(value, str):
        return value
    if 1e6 <= abs(value) < 999.5e6:
        return f"{value / 1e6:.3g} M"
    # 999.7 in three digits would be 1e+03.
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


_RULE = "A table is what a sweep writes: restore the file, or run the sweep again."


def _check(table: Table) -> None:
    expected = (*FIRST, *table.swept, *RESULTS, *((LINEAGE,) if LINEAGE in table.columns else ()))
    if tuple(table.columns) != expected:
        raise ValueError(
            f"a table has the columns {', '.join(expected)}, in this order; these are "
            f"{', '.join(table.columns) or 'none'}."
        )
    clash = sorted(set(table.swept) & {*FIRST, *RESULTS, *CURVE, LINEAGE}) or len(set(table.swept)) < len(
        table.swept
    )
    if clash:
        raise ValueError(f"swept={table.swept!r}: a swept value needs a name of its own.")
    members = len(table.columns["member"])
    if not members:
        raise ValueError("a table has at least one member; this one has no rows.")
    for name, values in table.columns.items():
        if len(values) != members:
            raise ValueError(f"column {name!r} has {len(values)} rows and 'member' {members}.")
        for value in values:
            if not (_fits(name, value) or (name in table.swept and isinstance(value, str) and value)):
                raise ValueError(f"column {name!r} holds {value!r}: {_kind(name)} is expected there.")
    steps = table.curve_env_steps
    if steps.ndim != 1 or table.curves.shape != (members, len(steps)):
        raise ValueError(
            f"curves have shape {table.curves.shape}; expected [members, T] = [{members}, T], with T the length "
            f"of curve_env_steps, whose shape is {steps.shape}."
        )
    if not (np.diff(steps) > 0).all():
        raise ValueError("curve_env_steps does not increase from point to point.")


def _fits(name: str, value: Any) -> bool:
    if value is None:
        return name in _OPTIONAL
    if name == "status":
        return value in STATUSES
    if name in _TEXTS:
        return isinstance(value, str) and value != ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (name in _INTEGERS and isinstance(value, float))


def _kind(name: str) -> str:
    kind = "an integer" if name in _INTEGERS else "text" if name in _TEXTS else "a number"
    kind = f"one of {', '.join(STATUSES)}" if name == "status" else kind
    return f"{kind} or None" if name in _OPTIONAL else kind


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _swept(path: Path, header: Sequence[str]) -> tuple[str, ...]:
    header = [name for name in header if name != LINEAGE]
    first, last = len(FIRST), len(RESULTS) + len(CURVE)
    found = (*header[:first], *header[max(len(header) - last, first) :])
    if found != (*FIRST, *RESULTS, *CURVE):
        missing = [name for name in (*FIRST, *RESULTS, *CURVE) if name not in header]
        what = f"it has no column {', '.join(missing[:3])}" if missing else "its columns are in another order"
        raise RunError(f"{path} is not a table of a sweep: {what}. {_RULE}")
    return tuple(header[first : len(header) - last])


def _parse(name: str, cell: str, text: bool) -> Any:
    if name in CURVE:
        values = json.loads(cell)
        if not isinstance(values, list):
            raise ValueError("is not a list")
        return [
            math.nan if value is None else value if isinstance(value, int) else float(value)
            for value in values
        ]
    if not cell:
        return None
    if name in _TEXTS:
        return cell
    try:
        return int(cell)
    except ValueError:
        if name in _INTEGERS:
            raise ValueError("is not an integer") from None
    try:
        return float(cell)
    except ValueError:
        if text:
            return cell
        raise ValueError("is not a number") from None


def _excerpt(cell: str) -> str:
    return repr(cell if len(cell) < 30 else cell[:30] + "...")


def _from_columns(path: Path, columns: dict[str, list], swept: tuple[str, ...]) -> Table:
    curves, steps = columns.pop("curve"), columns.pop("curve_env_steps")
    if any(other != steps[0] for other in steps) or any(len(curve) != len(steps[0]) for curve in curves):
        raise RunError(f"{path}: the curves of its rows are not of the same env steps. {_RULE}")
    try:
        curve_env_steps = np.array(steps[0], None if steps[0] else int)
        return Table(columns, curve_env_steps, np.array(curves, float), swept)
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is not a table of a sweep: {error} {_RULE}") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'jrl-kernels[parquet]'") from error
    return pyarrow, parquet
