"""The run folder: which files it has, how they are written and read, and the errors about them.

::

    run.json             the complete configuration; enough to resume, evaluate or repeat the run
    metrics.jsonl        one JSON object a line, one line a chunk of training
    checkpoints/         see jrl.checkpoint
    learning_curve.png
    summary.json         final evaluation, throughput, versions, device

Imports no jax, so that the command line can refuse a bad folder before anything slow is loaded.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT, SWEEP_FORMAT, GROUPS_FORMAT = "jrl-run-1", "jrl-sweep-1", "jrl-sweep-groups-1"
RUN, METRICS, SUMMARY = "run.json", "metrics.jsonl", "summary.json"
SWEEP, GROUPS, TABLE = "sweep.json", "groups.json", "table.csv"
CHECKPOINTS, CURVE, LOCK = "checkpoints", "learning_curve.png", ".lock"
TENSORBOARD, WANDB, TOKENIZER = "tensorboard", "wandb", "jrl_tokenizer.json"

# What is read of each file, by the kinds of its values: a file without is named before anything is computed with it.
_BUILT = {
    "algorithm.name": str, "environment.name": str, "environment.id": str | None, "environment.kwargs": dict,
    "config": dict | None, "hparams": dict, "env_steps": int, "eval_episodes": int, "chunk_length": int,
    "checkpoint_seconds": int | float | None, "versions": dict,
}  # fmt: skip
_NEEDED: dict[str, dict[str, Any]] = {
    RUN: {**_BUILT, "seed": int, "checkpoint_every": int | None, "keep": int | None, "loggers": list},
    SWEEP: {
        **_BUILT,
        "seeds": list,
        "settings": list,
        "swept": dict,
        "halving": dict | None,
        "width": int | str | None,
    },
    GROUPS: {"groups": list, "command": list},
    SUMMARY: {"env_steps": int, "interrupted": bool},
}


class RunError(ValueError):
    """A run, its folder or its input is wrong; the message says what, the rule and the fix."""


def not_saved(checkpoints: Path, error: OSError, go_on: str) -> RunError:
    """Return the error of a checkpoint that the disk did not take: what is intact, and ``go_on``, the way on."""
    return RunError(
        f"cannot write a checkpoint into {checkpoints}: {error.strerror or error}. What was saved before is intact; "
        f"make room, then {go_on}"
    )


class CheckpointError(RunError):
    """A checkpoint is missing, corrupt, foreign, or does not fit the state it is restored into."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is not as it was written, or jrl did not write it; an older one may be intact."""


class RunWarning(UserWarning):
    """A run goes on, but not quite as one would expect."""


class NonFiniteError(RunError, FloatingPointError):
    """A metric or a parameter became NaN or infinite in training."""


# -------------------------------------------------------------------------------------------------- JSON


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the system that names none, as where the disk is full in the middle of it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file then takes the place of ``path``.

    ``path`` is at all times the old file or the new one, complete; the old one if writing raises.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            yield unfinished
            with unfinished.open("r+b") as stream:
                os.fsync(stream.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) so that the file is at all times the old one or the new one, complete."""
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, allow_nan=False)
        stream.write("\n")


def plain(value: Any) -> Any:
    """Turn arrays and tuples into JSON values; NaN and infinities, which JSON lacks, into None or strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)


def read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """Return ``run.json`` of a run folder.

    Raises:
        RunError: it is not there, not readable, or not as jrl writes it.
    """
    rule = "A run folder is what jrl train --out (or jrl.run(out=...)) made; pass one of those."
    return _read_record(Path(folder), RUN, FORMAT, "a run folder", rule)


def read_sweep(folder: str | os.PathLike) -> dict[str, Any]:
    """Return ``sweep.json`` of a sweep's folder.

    Raises:
        RunError: it is not there, not readable, or not as jrl writes it.
    """
    rule = "A sweep's folder is what jrl sweep --out (or jrl.sweep.run(out=...)) made; pass one of those."
    return _read_record(Path(folder), SWEEP, SWEEP_FORMAT, "a sweep's folder", rule)


def read_groups(folder: str | os.PathLike) -> dict[str, Any]:
    """Return ``groups.json`` of a folder with one sweep for each of several static choices.

    Raises:
        RunError: it is not there, not readable, or not as jrl writes it.
    """
    rule = "A folder of sweeps is what jrl sweep --static-grid made; pass one of those."
    return _read_record(Path(folder), GROUPS, GROUPS_FORMAT, "a folder of sweeps", rule)


def environment_name(folder: Path) -> str | None:
    """Return what a run, a sweep or the sweeps in a folder were trained on; None where nothing says."""
    record = _record_of_training(folder)
    return None if record is None else record["environment"]["name"]


def compiled_quickly(folder: Path) -> bool:
    """Tell whether a run, a sweep or the sweeps in a folder were begun with ``--quick-compile``."""
    try:
        record = _record_of_training(folder)
    except (RunError, OSError):
        return False  # no folder, or one of which the command that reads it says what is wrong
    return record is not None and record["versions"].get("compiler") == "quick"


def _record_of_training(folder: Path) -> dict[str, Any] | None:
    for name, read in ((RUN, read_run), (SWEEP, read_sweep)):
        if (folder / name).exists():
            return read(folder)
    inner = folder.glob(f"*/{SWEEP}") if (folder / GROUPS).exists() else ()
    return next((read_sweep(path.parent) for path in inner), None)


def _read_record(folder: Path, name: str, form: str, what: str, rule: str) -> dict[str, Any]:
    path = folder / name
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if name == RUN and any((folder / other).exists() for other in (SWEEP, GROUPS)):
            rule = (
                "Its figures and table.csv are in it already; jrl eval FOLDER --member N plays one of its members, "
                "jrl compare sets sweeps and runs side by side."
            )
            raise RunError(f"{folder} is not {what} but holds a sweep: it has no {name}. {rule}") from error
        raise RunError(f"{folder} is not {what}: it has no {name}. {rule}") from error
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}). {rule}") from error
    if not isinstance(record, dict) or record.get("format") != form:
        raise RunError(f"{path} does not say format {form!r}: something else wrote it. {rule}")
    _check_content(path, record, f"Put it back as jrl wrote it, or begin anew in another folder. {rule}")
    return record


def _check_content(path: Path, record: Any, advice: str) -> None:
    if not isinstance(record, dict):
        raise RunError(f"{path} is not a JSON object: it holds {_excerpt(record)}. {advice}")
    for name, kind in _NEEDED[path.name].items():
        value: Any = record
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise RunError(f"{path} does not say {name}: it was cut short or edited. {advice}")
            value = value[part]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RunError(f"{path} says {name} = {_excerpt(value)}, which jrl does not write. {advice}")


def _excerpt(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 30 else text[:30] + "..."


def read_summary(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return ``summary.json``, or None where there is none yet.

    Raises:
        RunError: it is there and cannot be read, or does not say what a summary says.
    """
    path = Path(folder) / SUMMARY
    advice = "Delete it and resume the run."
    try:
        summary = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}). {advice}") from error
    _check_content(path, summary, advice)
    return summary


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, without a last one that a kill cut short.

    Raises:
        RunError: a line other than the last is not a JSON object with a number of ``env_steps``.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            steps = row.get("env_steps")
            if isinstance(steps, bool) or not isinstance(steps, int | float):
                raise ValueError(f"with env_steps a number; found {_excerpt(steps)}")
        except ValueError as error:
            if number == len(lines):  # a complete line ends with a newline, so that the last entry is ""
                break
            raise RunError(
                f"{path}, line {number} is not a JSON object ({error}). Only the last line may be cut short; "
                "delete the line, or the file if you do not need it."
            ) from error
        rows.append(row)
    return rows


def drop_metrics_after(folder: Path, **reached: int) -> None:
    """Rewrite ``metrics.jsonl`` without the lines of training that a restored checkpoint does not contain.

    Args:
        folder: of the run or sweep.
        **reached: the numbers of a line that say where it stands, the most important one first, and how far the
            checkpoint is. (Those of a sweep are not its ``env_steps``, which stand still once all members are frozen.)
    """
    path = folder / METRICS
    if not path.exists():
        return
    last = tuple(reached.values())
    rows = [row for row in read_metrics(folder) if tuple(row.get(name, 0) for name in reached) <= last]
    with replacing(path) as unfinished:
        unfinished.write_text(
            "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8"
        )


# ------------------------------------------------------------------------------------------------ folder


def check_new(folder: Path, overwrite: bool) -> None:
    """Refuse, before anything is computed, a folder that is in use or cannot be written to.

    Raises:
        RunError: the path is no folder, not writable, or holds a run (unless ``overwrite``) or other files.
    """
    check_path(folder)
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise RunError(
            f"run folder {folder} cannot be made: {existing} is not a folder. "
            "A run needs a folder of its own; choose another path with --out (out=...)."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(_unwritable(folder, f"no permission to write to {existing}"))
    if existing != folder:
        return
    names = {entry.name for entry in folder.iterdir() if not _is_trace(entry)}
    kinds = {RUN: "run", SWEEP: "sweep", GROUPS: "sweep"}
    if kind := next((kinds[name] for name in kinds if name in names), None):
        if not overwrite:
            raise RunError(
                f"run folder {folder} already holds a {kind}. A folder is used once, so that nothing saved is "
                f"lost: continue it with `jrl resume {shlex.quote(str(folder))}`, choose another one with --out, or "
                "replace it with --overwrite (overwrite=True)."
            )
    elif names:
        some = ", ".join(sorted(names)[:3])
        raise RunError(
            f"run folder {folder} is not empty and holds no run (found {some}). A run needs a folder of its "
            "own, and what jrl did not write it does not delete: choose another path with --out."
        )


def check_not_needed(folder: Path, model: Any, name: str = "model") -> None:
    """Refuse a run folder that holds a model which the new run begins with, or which that model began with.

    ``overwrite`` would delete it before the run has read it, or saved anything in its place.

    Args:
        folder: where the run is to be written.
        model: its folder, or something that is no path, which is let through.
        name: what the caller calls it.

    Raises:
        RunError: it is in ``folder``.
    """
    path, seen = model, []
    while isinstance(path, str | os.PathLike) and path not in seen:
        seen.append(path)
        if folder.exists() and Path(path).exists() and folder.samefile(path):
            user = "the run begins with" if path == model else f"{seen[-2]} was trained from and is read with"
            raise RunError(
                f"run folder {folder} holds the model that {user} ({name} {model}): replacing it (--overwrite, "
                "overwrite=True) would delete that model. A run needs a folder of its own; choose another "
                "path with --out (out=...)."
            )
        # What a run on texts has learned is read with the model that its environment was made of.
        path = read_run(path)["environment"]["kwargs"].get("model") if (Path(path) / RUN).exists() else None


def check_path(folder: Path) -> None:
    """Refuse a path that orbax would take for a pattern: it would not find what it has just written there.

    Raises:
        RunError: the path has one of ``*?[``.
    """
    if found := sorted(set("*?[") & set(str(folder.absolute()))):
        raise RunError(
            f"{folder.absolute()} has {' and '.join(found)} in it, with which checkpoints cannot be written: choose a "
            "path without with --out (out=...)."
        )


def _is_trace(entry: Path) -> bool:
    """Tell what a run that ended before it began leaves behind: nothing worth keeping."""
    if entry.name == CHECKPOINTS and entry.is_dir():
        return not any(entry.iterdir())
    return entry.name in (LOCK, TOKENIZER) or entry.name.startswith((f".{RUN}.", f".{SWEEP}.", f".{GROUPS}."))


def create(folder: Path) -> None:
    """Make the folder; raises :class:`RunError` where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise RunError(_unwritable(folder, error.strerror or str(error))) from error


def clear(folder: Path, overwrite: bool) -> None:
    """Delete the run in a folder that is :func:`locked`, where ``overwrite`` allows it.

    (Asked again: since :func:`check_new` another process may have had the folder, and trained in it to its end.)

    Everything that jrl writes there, the sweeps of groups in its sub-folders included; no other file.

    Raises:
        RunError: as :func:`check_new`, or another process is training in a sub-folder.
    """
    check_new(folder, overwrite)
    try:
        # sub-folders of groups are called NAME=VALUE; another sweep in here is not of these
        for inner in folder.glob(f"*=*/{SWEEP}") if (folder / GROUPS).exists() else ():
            with locked(inner.parent):
                clear(inner.parent, True)
            if [entry.name for entry in inner.parent.iterdir()] == [LOCK]:
                shutil.rmtree(inner.parent)
        for name in (*_figures(folder), RUN, SWEEP, GROUPS, METRICS, SUMMARY, CURVE, TABLE, TOKENIZER):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, TENSORBOARD, WANDB):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    except OSError as error:
        raise RunError(_unwritable(folder, error.strerror or str(error))) from error


def _figures(folder: Path) -> list[str]:
    """Return what the figures of :mod:`jrl.sweep_plots` and ``jrl inspect`` of this folder are called."""
    try:
        with (folder / TABLE).open(encoding="utf-8", newline="") as stream:
            columns = next(csv.reader(stream), [])
    except (OSError, ValueError, csv.Error):  # without a table none of a swept value were drawn
        columns = []
    names = ["learning_curves", "performance_profile", "episode", "grid"]
    names += [f"{kind}_{name}" for kind in ("sensitivity", "schedules") for name in columns]
    names += [f"heat_map_{x}_{y}" for x, y in itertools.permutations(columns, 2)]
    return [f"{name}.png" for name in names]


def _unwritable(folder: Path, why: str) -> str:
    return (
        f"run folder {folder} cannot be written to: {why}. A run writes its configuration, metrics and "
        "checkpoints there; choose a path that you can write to with --out (out=...)."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        RunError: another process is training in this folder, or it cannot be written to.
    """
    if not os.access(folder, os.W_OK):
        raise RunError(
            f"run folder {folder} cannot be written to: no permission. Copy it to where you may write."
        )
    try:
        import fcntl
    except ImportError:  # no such lock on Windows: two processes at once are then the user's own care
        yield
        return
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"run folder {folder} is in use by another process. Only one may write to a run; wait for it "
                "or stop it."
            ) from error
        yield
