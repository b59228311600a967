"""Sweeps over static choices: one sweep each, which compiles for itself, and one table of them all.

::

    groups.json          the choices, and the command that began it
    NAME=VALUE/          the folder of one sweep, see jrl.sweep.runner
    table.csv, *.png     of all members together, once every sweep has ended
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrl import configuration, records, tables
from jrl.records import RunError
from jrl.sweep import processes, runner
from jrl.tables import Table


class Group(NamedTuple):
    """One sweep of several: its static choices, and what it left."""

    fields: dict[str, Any]
    finished: runner.Finished


def combinations(algorithm: Any, static_grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of fields of the algorithm's ``Config``.

    Raises:
        RunError: there is no such field, a field without values, or the same choice twice.
    """
    fields = [field.name for field in dataclasses.fields(configuration.load(algorithm).Config)]
    for name, values in static_grid.items():
        if name not in fields:
            raise RunError(
                f"--static-grid {name}: Config has no such field. {configuration.nearest(name, fields)}Its fields "
                f"are: {', '.join(fields)}."
            )
        if not values:
            raise RunError(f"--static-grid {name}: a grid needs one or more values for each name.")
    choices = itertools.product(*([_hashable(value) for value in values] for values in static_grid.values()))
    found: dict[str, dict[str, Any]] = {}
    for choice in choices:
        chosen = dict(zip(static_grid, choice, strict=True))
        if (name := _name(chosen)) in found:
            raise RunError(
                f"--static-grid: {chosen} and {found[name]} would share the folder {name}, as the same choice given "
                "twice does. Every choice is a sweep of its own; leave one out."
            )
        found[name] = chosen
    return list(found.values())


def execute(
    algorithm: Any,
    hparams: Any = None,
    *,
    static_grid: Mapping[str, Sequence[Any]],
    out: Any = None,
    config: Any = None,
    command: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    figures: bool = True,
    **settings: Any,
) -> tuple[list[Group], Table]:
    """Run one sweep after the other, each into a sub-folder of ``out``; return them, and the table of them all.

    Args:
        static_grid: field of ``Config`` -> values; every combination is a sweep.
        command: arguments of ``jrl sweep``, for ``jrl resume``.
        algorithm, hparams, out, config, overwrite, resume, figures, **settings: as in
            :func:`jrl.sweep.execute`.

    Raises:
        RunError, ValueError, TypeError: as :func:`combinations` and :func:`jrl.sweep.execute`.
    """
    choices = combinations(algorithm, static_grid)
    folder = None if out is None else Path(out)
    base = dict(config or {}) if isinstance(config, Mapping | None) else dataclasses.asdict(config)
    configs: list[Any] = []
    for fields in choices:  # all of them before anything is written, let alone trained
        setup, _, _ = runner.prepare(algorithm, hparams, config={**base, **fields}, **settings)
        if setup.config in configs:
            raise RunError(
                f"--static-grid: {fields} makes the same Config as {choices[configs.index(setup.config)]}. Every "
                "choice is a sweep of its own; leave one out."
            )
        configs.append(setup.config)
    if folder is not None:
        records.check_not_needed(folder, (settings.get("env_kwargs") or {}).get("model"))
    with ExitStack() as stack:
        if folder is not None and processes.is_first():
            _claim(folder, choices, command, stack, overwrite=overwrite, resume=resume)
        found: list[Group] = []
        for fields in choices:
            finished = runner.execute(
                algorithm,
                hparams,
                config={**base, **fields},
                out=None if folder is None else folder / _name(fields),
                overwrite=overwrite,
                resume=resume,
                figures=figures,
                **settings,
            )
            found.append(Group(fields, finished))
            if finished.interrupted:
                break
        table = merge([(group.fields, group.finished.table) for group in found])
        if folder is not None and processes.is_first() and not found[-1].finished.interrupted:
            table.to_csv(folder / records.TABLE)
            if figures:
                from jrl import sweep_plots

                sweep_plots.figures(table, folder)
    return found, table


def merge(parts: Sequence[tuple[Mapping[str, Any], Table]]) -> Table:
    """Return one table of several sweeps, their static choices its first swept columns.

    Members are counted on. The sweeps take other numbers of environment steps between two points of a curve: all
    curves get the points of the coarsest one, each the mean of the finer points since the one before.

    Args:
        parts: static choices and table of each; the tables sweep the same values.
    """
    steps = min((table.curve_env_steps for _, table in parts), key=len)
    names = tuple(parts[0][0])
    columns: dict[str, list[Any]] = {name: [] for name in (*tables.FIRST, *names)}
    for fields, table in parts:
        offset = len(columns["member"])
        for name, values in table.columns.items():
            shifted = [offset + value for value in values] if name == "member" else values
            columns.setdefault(name, []).extend(shifted)
        for name, value in fields.items():
            columns[name] += [value] * len(table)
    for name in names:
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in columns[name]):
            columns[name] = [_text(value) for value in columns[name]]
    curves = np.concatenate([_coarser(table, steps) for _, table in parts])
    return Table(columns, steps, curves, (*names, *parts[0][1].swept))


def locate(folder: Path, member: int) -> tuple[Path, int]:
    """Return the sub-folder of a member of the table of all, and its number there.

    Raises:
        RunError: there is no such member.
    """
    found = [folder / _name(fields) for fields in read(folder)["groups"]]
    in_each = len(records.read_sweep(found[0])["seeds"])
    if not 0 <= member < in_each * len(found):
        raise RunError(
            f"member={member}: the sweeps in {folder} have members 0 to {in_each * len(found) - 1}."
        )
    return found[member // in_each], member % in_each


def read(folder: Path) -> dict[str, Any]:
    """Return ``groups.json``.

    Raises:
        RunError: it is not there, not readable, or not written by jrl.
    """
    return records.read_groups(folder)


def _claim(
    folder: Path,
    choices: list[dict[str, Any]],
    command: Sequence[str],
    stack: ExitStack,
    *,
    overwrite: bool,
    resume: bool,
) -> None:
    """Write ``groups.json`` into a folder that is new, or is to be replaced; check that of one to go on with.

    The folder is locked until the ``stack`` is left, and free again if nothing was trained until then.
    """
    choices = records.plain(choices)
    if resume and (folder / records.GROUPS).exists():
        if (was := read(folder)["groups"]) != choices:
            raise RunError(
                f"the sweeps in {folder} are of {was}, this command's of {choices}. They are continued as they were "
                "started: use `jrl resume FOLDER`, or another --out for the new ones."
            )
        stack.enter_context(records.locked(folder))
        return
    records.check_new(folder, overwrite)
    records.create(folder)
    stack.enter_context(records.locked(folder))
    records.clear(folder, overwrite)
    stack.callback(_free_if_empty, folder, choices)
    record = {"format": records.GROUPS_FORMAT, "groups": choices, "command": list(command)}
    records.write_json(folder / records.GROUPS, record)


def _free_if_empty(folder: Path, choices: list[dict[str, Any]]) -> None:
    """Leave no trace of sweeps of which none has begun, so that the corrected command may have the folder."""
    for inner in (folder / _name(fields) for fields in choices):
        if inner.is_dir() and {entry.name for entry in inner.iterdir()} <= {records.LOCK}:
            shutil.rmtree(inner)
    if {entry.name for entry in folder.iterdir()} <= {records.LOCK, records.GROUPS}:
        (folder / records.GROUPS).unlink(missing_ok=True)


def _name(fields: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return "x".join(map(text, value)) if isinstance(value, list | tuple) else _text(value)

    name = ",".join(f"{name}={text(value)}" for name, value in fields.items())
    return "".join(letter if letter.isalnum() or letter in "-_.=," else "-" for letter in name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(records.plain(value), separators=(",", ":"))


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _coarser(table: Table, steps: np.ndarray) -> np.ndarray:
    """Return the curves with their points since each of ``steps`` averaged; those after the last belong to it."""
    at = np.minimum(np.searchsorted(steps, table.curve_env_steps), len(steps) - 1)
    curves = np.full((len(table), len(steps)), np.nan)
    for index in range(len(steps)):
        points = table.curves[:, at == index]
        known = np.isfinite(points)
        total = np.where(known, points, 0.0).sum(1)
        curves[:, index] = np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)
    return curves
