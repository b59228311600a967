"""Saving a run while it trains, never with a NaN in it, and finding where to go on."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import checkpoint, records
from jrl.configuration import Setup, named_leaves
from jrl.records import CorruptCheckpointError, NonFiniteError, RunWarning

_SAVING_SHARE = 20  # saving takes at most one part in this many of the time


class Start(NamedTuple):
    """Where a resumed run goes on: the state, after ``step`` algorithm steps, ``seconds`` of training."""

    state: Any
    step: int
    env_steps: int
    seconds: float


class Saver:
    """Decides when to save, and splits saving in two: a copy to the host, and the writing of it."""

    def __init__(self, folder: Path, setup: Setup, record: Mapping[str, Any], start: Start) -> None:
        _, step, env_steps, _ = start
        self._folder = folder / records.CHECKPOINTS
        self._setup, self._record = setup, record
        self._held: tuple[checkpoint.Snapshot, int, dict[str, Any]] | None = None
        self._saved_step = step
        self._pause = float("inf") if record["checkpoint_seconds"] is None else record["checkpoint_seconds"]
        self._next_time = time.perf_counter() + self._pause
        self.last_env_steps = env_steps if step else None

    def due(self, env_steps: int, chunk_env_steps: int) -> bool:
        """Tell whether the state after this chunk is to be saved."""
        every = self._record["checkpoint_every"]
        crossed = every is not None and env_steps // every > (env_steps - chunk_env_steps) // every
        return crossed or time.perf_counter() >= self._next_time

    def take(self, state: Any, step: int, env_steps: int, seconds: float) -> None:
        """Copy the state to the host and refuse it if a parameter is not finite; waits for it."""
        if step == self._saved_step:
            return
        held = checkpoint.snapshot(state)
        parameters = {
            path: array[np.newaxis]
            for path, array in held.arrays.items()
            if path.startswith("params/") and jnp.issubdtype(array.dtype, jnp.floating)
        }
        check_finite(parameters, [env_steps], self._setup, self._record, self)
        self._held = (held, step, {"env_steps": env_steps, "seconds": seconds})

    def write(self) -> None:
        """Write what :meth:`take` holds, if anything; raises RunError where the disk does not take it."""
        if self._held is None:
            return
        held, step, metadata = self._held
        began = time.perf_counter()
        try:
            checkpoint.save(self._folder, held, step, metadata=metadata, keep=self._record["keep"])
        except OSError as error:
            run = shlex.quote(str(self._folder.parent))
            raise records.not_saved(
                self._folder, error, f"continue the run with: jrl resume {run}"
            ) from error
        took = time.perf_counter() - began
        self._held, self._saved_step, self.last_env_steps = None, step, metadata["env_steps"]
        self._next_time = time.perf_counter() + max(self._pause, _SAVING_SHARE * took)


def check_finite(
    values: Mapping[str, np.ndarray],
    env_steps: Sequence[int],
    setup: Setup,
    record: Mapping[str, Any],
    saver: Saver | None,
) -> None:
    """Raise at the first step at which one of ``values`` (each ``[T, ...]``) is NaN or infinite."""
    finite = {name: np.isfinite(rows).reshape(len(rows), -1).all(axis=1) for name, rows in values.items()}
    first = min((int(np.argmin(row)) for row in finite.values() if not row.all()), default=None)
    if first is None:
        return
    # what a text earned, of which the rest follows, or the loss: those are the names people look for
    names = sorted(
        (name for name, row in finite.items() if not row[first]),
        key=lambda name: (not name.startswith("score/"), name != "score", "loss" not in name),
    )
    row = values[names[0]][first]
    what = "nan" if np.isnan(row).any() else "infinite"
    facts = [f"seed {record['seed']}"]
    if "learning_rate" in (numbers := named_leaves(setup.hparams)):
        facts.append(f"learning_rate={float(numbers['learning_rate']):.6g}")
    if saver is None:
        kept = "This run writes no checkpoints."
    elif saver.last_env_steps is None:
        kept = "No checkpoint had been written yet."
    else:
        kept = f"The checkpoint at env step {saver.last_env_steps} is from before and intact."
    advice = "Lower learning_rate or max_grad_norm, or scale the rewards."
    if names[0].startswith("score"):
        advice = "It is a reward of texts: make it finite for every text, the empty one and the longest too."
    raise NonFiniteError(
        f"{names[0]} is {what} at env step {env_steps[first]} ({', '.join(facts)}). Training stops at the "
        f"first value that is not finite, as all after it would be too. {advice} {kept}"
    )


def restore(folder: Path, setup: Setup, step: int | None = None) -> Start | None:
    """Return the newest intact checkpoint of a run, or that of ``step``; None where none was written yet.

    A newest one that is damaged is passed over with a warning: the run computes the same again.

    Raises:
        CheckpointError: all are damaged, or it does not fit the run's algorithm and environment.
    """
    checkpoints = folder / records.CHECKPOINTS
    like = jax.eval_shape(setup.algo.init, jax.random.key(0), setup.hparams)
    damaged: CorruptCheckpointError | None = None
    for number in reversed(checkpoint.steps(checkpoints)) if step is None else [step]:
        try:
            state = checkpoint.restore(checkpoints, like, number)
        except CorruptCheckpointError as error:
            damaged = damaged or error
            continue
        if damaged:
            warnings.warn(f"{damaged} Going on from step {number}.", RunWarning, stacklevel=3)
        held = checkpoint.metadata(checkpoints, number)
        return Start(state, number, held["env_steps"], held["seconds"])
    if damaged:
        raise damaged
    return None
