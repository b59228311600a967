"""Where metrics go: a protocol of two methods, and three things that follow it.

A logger is given one dictionary of finite floats for each chunk of training. It opens its files at the first
:meth:`~Logger.write`, so that building one does nothing yet.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from jrl.records import naming


@runtime_checkable
class Logger(Protocol):
    """Anything with these two methods is a logger."""

    def write(self, env_steps: int, metrics: Mapping[str, float | None]) -> None:
        """Take the metrics of the training up to ``env_steps`` environment steps.

        Args:
            env_steps: total so far; increases from call to call.
            metrics: finite numbers by name; None for what has no value yet (no episode ended).
        """

    def close(self) -> None:
        """Write out what is still held back; called once, also when training was interrupted or failed."""


class JsonlLogger:
    """One strict JSON object a line, flushed at once: what a killed process has written can be read.

    Args:
        path: the file, appended to.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._file: Any = None

    def write(self, env_steps: int, metrics: Mapping[str, float | None]) -> None:
        """Append a line.

        Raises:
            ValueError: NaN or an infinity, which JSON does not have.
            OSError: the disk does not take it; the error names the file.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        line = json.dumps({"env_steps": env_steps, **metrics}, allow_nan=False) + "\n"
        with naming(self._path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            # Each line is flushed at once: what cannot be has been told of.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class TensorBoardLogger:
    """Scalars for TensorBoard; the extra ``tensorboard``.

    Args:
        folder: log directory; a resumed run hides what a killed one wrote beyond its checkpoint.

    Raises:
        ImportError: the extra is not installed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        _require("tensorboardX", "tensorboard")
        self._folder = str(folder)
        self._writer: Any = None

    def write(self, env_steps: int, metrics: Mapping[str, float | None]) -> None:
        """Add one scalar for each metric that has a value."""
        if self._writer is None:
            import tensorboardX

            self._writer = tensorboardX.SummaryWriter(self._folder, purge_step=env_steps)
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, env_steps)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def spec(self, run_folder: Path | None = None) -> dict[str, Any]:
        """Return what :func:`build` needs to make it again for the run in ``run_folder``."""
        return {"kind": "tensorboard", **_elsewhere(self._folder, run_folder, "tensorboard")}


class WandbLogger:
    """Scalars for Weights & Biases; the extra ``wandb``.

    Args:
        folder: where wandb keeps its files (in a sub-folder ``wandb``).
        project: project name.
        mode: ``"online"``, or ``"offline"`` to write files only (``wandb sync`` sends them later).
        config: shown beside the curves; :func:`jrl.run` adds the configuration of the run.
        run_id: the same id continues the same run; :func:`jrl.run` takes the id in ``run.json`` where there is none.

    Raises:
        ImportError: the extra is not installed.
        ValueError: another mode.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        project: str = "jrl",
        mode: str = "online",
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> None:
        if mode not in ("online", "offline"):
            raise ValueError(f"mode={mode!r}: W&B is used online or offline; pass one of these two.")
        _require("wandb", "wandb")
        self._folder, self._project, self._mode = Path(folder), project, mode
        self.config, self.run_id = dict(config or {}), run_id
        self.record: Mapping[str, Any] = {}  # ``run.json`` of the run it is given to
        self._run: Any = None

    def write(self, env_steps: int, metrics: Mapping[str, float | None]) -> None:
        """Log every metric that has a value, with ``env_steps`` as the step."""
        if self._run is None:
            import wandb

            self._folder.mkdir(parents=True, exist_ok=True)
            run_id = self.run_id or self.record.get("id")
            self._run = wandb.init(
                project=self._project,
                name=self._folder.name,
                dir=str(self._folder),
                mode=cast(Any, self._mode),  # one of its literals
                config={**self.record, **self.config},
                id=run_id,
                resume="allow" if run_id and self._mode == "online" else None,
            )
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=env_steps)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def spec(self, run_folder: Path | None = None) -> dict[str, Any]:
        """Return what :func:`build` needs to make it again for the run in ``run_folder``; the ``config`` W&B keeps."""
        named = {"run_id": self.run_id} if self.run_id else {}
        where = _elsewhere(self._folder, run_folder, ".")
        return {"kind": "wandb", "project": self._project, "mode": self._mode, **named, **where}


def build(spec: Mapping[str, Any], folder: Path) -> Logger:
    """Make a logger of a run folder from what ``run.json`` says of it.

    Raises:
        ValueError: an unknown kind.
        ImportError: its extra is not installed.
    """
    options = {name: value for name, value in spec.items() if name not in ("kind", "folder")}
    if spec.get("kind") == "tensorboard":
        return TensorBoardLogger(folder / spec.get("folder", "tensorboard"))
    if spec.get("kind") == "wandb":
        return WandbLogger(folder / spec.get("folder", "."), **options)
    raise ValueError(f"unknown kind of logger {spec.get('kind')!r}; jrl has tensorboard and wandb.")


def _elsewhere(folder: str | Path, run_folder: Path | None, usual: str) -> dict[str, str]:
    """Return the way from the run folder to where a logger writes, unless it is the usual one."""
    way = usual if run_folder is None else os.path.relpath(folder, run_folder)
    return {} if way == usual else {"folder": way}


def _require(module: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is not installed. It comes with the extra {extra!r}: "
            f'pip install "jrl-kernels[{extra}]"'
        ) from error
