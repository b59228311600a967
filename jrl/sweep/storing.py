"""Checkpoints of a sweep: when, what, and where the newest intact one left off."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jrl import checkpoint, records
from jrl.records import CorruptCheckpointError, RunError, RunWarning
from jrl.sweep import processes, program
from jrl.sweep.choosing import how_to_resume, moved
from jrl.types import PyTree

if TYPE_CHECKING:
    from jrl.sweep.session import Session  # imports this module

_SAVING_SHARE = 20  # saving takes at most one part in this many of the time


class Position(NamedTuple):
    """Where training goes on: algorithm steps of the members ``order`` of a chunk, their states in slots."""

    chunk: int
    step: int
    order: np.ndarray
    states: Any


def due(sweep: Session) -> bool:
    """Tell whether it is time for a checkpoint."""
    pause = sweep.record["checkpoint_seconds"]
    return sweep.folder is not None and pause is not None and time.perf_counter() - sweep.saved_at > pause


def save(sweep: Session, chunk: int, step: int, order: np.ndarray, states: Any) -> None:
    """Write a checkpoint of the members in progress and of all results."""
    if sweep.folder is None:
        return
    began = time.perf_counter()
    number = chunk * (sweep.total + 1) + step
    metadata = {
        "chunk": chunk,
        "step": step,
        "order": order.tolist(),
        "slots": sweep.layout.slots,
        "homes": sweep.layout.homes(len(order)).tolist(),  # where each member of the order is in the arrays
        "held": sweep.plan_.chunk,
        "warmup": sweep.warmup,
        "rows": len(sweep.results.history),
        "ended": np.flatnonzero(sweep.ended).tolist(),
        "env_steps": sweep.env_steps_done,
        "seconds": sweep.seconds,
        "reasons": {str(member): text for member, text in sweep.results.reasons.items()},
    }
    folder = sweep.folder / records.CHECKPOINTS
    content = {"states": states, "results": sweep.results.arrays()}
    try:
        with sweep.watch.outside(), sweep.watch.during("saving"):
            checkpoint.save(folder, content, number, metadata=metadata, keep=None)
        for old in checkpoint.steps(folder) if processes.is_first() else ():
            # the last checkpoint of each chunk of members stays: it holds what they have learned
            if old < number and old % (sweep.total + 1) != sweep.total:
                checkpoint.remove(folder, old)
    except OSError as error:
        raise records.not_saved(folder, error, how_to_resume(sweep.folder)) from error
    took = time.perf_counter() - began
    # so that saving takes at most a twentieth of the time
    sweep.saved_at = time.perf_counter() + max(
        0.0, _SAVING_SHARE * took - (sweep.record["checkpoint_seconds"] or 0)
    )


def held_before(folder: Path | None) -> int | None:
    """Return how many members at once the sweep in a folder has held; None where it has no intact checkpoint."""
    if folder is None:
        return None
    checkpoints = folder / records.CHECKPOINTS
    for number in reversed(checkpoint.steps(checkpoints)):
        try:
            return int(checkpoint.metadata(checkpoints, number)["held"])
        except CorruptCheckpointError:  # all are of the same sweep
            continue
    return None


def restore(sweep: Session) -> Position | None:
    """Return where the newest intact checkpoint left off; None where there is none."""
    if sweep.folder is None:
        return None
    folder = sweep.folder / records.CHECKPOINTS
    damaged: CorruptCheckpointError | None = None
    for number in reversed(checkpoint.steps(folder)):
        try:
            held = checkpoint.metadata(folder, number)
            order = np.asarray(held["order"])
            sweep.warmup = held["warmup"]
            sweep.total = -(
                -(sweep.record["env_steps"] - sweep.warmup) // sweep.setup.algo.env_steps_per_step
            )
            results = sweep.no_results()
            like = {
                "states": stacked(sweep.state_shape, held["slots"]),
                "results": results.arrays(),
            }
            content = checkpoint.restore(folder, like, number)
        except CorruptCheckpointError as error:
            damaged = damaged or error
            continue
        if damaged:
            warnings.warn(f"{damaged} Going on from step {number}.", RunWarning, stacklevel=4)
        break
    else:
        if damaged:
            raise damaged
        return None
    for name, value in content["results"].items():
        # a copy: what jax gives out cannot be written to
        setattr(results, name, jax.tree.map(np.array, value))
    results.reasons = {int(member): text for member, text in held["reasons"].items()}
    sweep.who = moved(sweep.who, results.population)
    sweep.results, sweep.ended = results, np.isin(np.arange(sweep.num), held["ended"])
    sweep.seconds, sweep.env_steps_done = held["seconds"], held["env_steps"]
    if held["held"] != sweep.plan_.chunk:
        raise RunError(
            f"the sweep has held {held['held']} members at once, not {sweep.plan_.chunk}, and goes on so: leave out "
            "--chunk (chunk)."
        )
    states = sweep.layout.spread(program.gather(content["states"], np.asarray(held["homes"])))
    return Position(held["chunk"], held["step"], order, states)


def stacked(state: PyTree, n: int) -> PyTree:
    """Return the shapes of ``n`` states."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), state)
