"""What is known of a sweep's members while it goes on, and the ancestry of a population."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jrl.sweep import program


@dataclasses.dataclass
class Results:
    """What is known of all ``M`` members so far; saved with every checkpoint.

    Attributes:
        history: ``[T, M]``, mean return of the episodes that ended in each chunk of training, NaN where none did.
        failed_at: int32 ``[M]``, algorithm steps after which a member failed, or ``program.RUNNING``.
        stopped_at: int32 ``[M]``, algorithm steps after which a search stopped it, or -1.
        evaluation: float32 ``[M]`` by column, NaN before a member's end.
        population: of population-based training, else empty: ``hparams``, by name ``[T, M]``, what each chunk of
            training was computed with (those to come: with what is known now); ``source`` int32 ``[T, M]``, the
            member whose state it began with.
        reasons: what was not finite in the members that failed, by member.
    """

    history: np.ndarray
    failed_at: np.ndarray
    stopped_at: np.ndarray
    evaluation: dict[str, np.ndarray]
    population: dict[str, Any]
    reasons: dict[int, str]

    @classmethod
    def empty(cls, num_rows: int, num: int, moving: Mapping[str, np.ndarray]) -> Results:
        """Return that nothing is known yet; ``moving``: hyperparameters of a population at the start, ``[M]``."""
        population: dict[str, Any] = {}
        if moving:
            rows = {name: np.tile(values, (num_rows, 1)) for name, values in moving.items()}
            population = {"hparams": rows, "source": np.tile(np.arange(num, dtype=np.int32), (num_rows, 1))}
        return cls(
            np.full((num_rows, num), np.nan, np.float32),
            np.full(num, program.RUNNING, np.int32),
            np.full(num, -1, np.int32),
            {name: np.full(num, np.nan, np.float32) for name in program.Evaluation._fields},
            population,
            {},
        )

    def arrays(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it; ``reasons`` goes into its metadata."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}

    def inherit(self, row: int, source: np.ndarray, hparams: Mapping[str, np.ndarray]) -> None:
        """Enter that before chunk ``row`` each member became a copy of ``source``, with these hyperparameters."""
        self.population["source"][row] = source
        for name, values in self.population["hparams"].items():
            values[row:] = hparams[name]
        self.failed_at = self.failed_at[source]
        self.reasons = {
            member: self.reasons[origin] for member, origin in enumerate(source) if origin in self.reasons
        }

    def newest_returns(self, row: int) -> np.ndarray:
        """Return the newest return of each member's policy before chunk ``row``, ``[M]``; NaN where it has none.

        Of one that a population copied, that of the member it was copied from.
        """
        found, who = np.full(self.history.shape[1], np.nan), np.arange(self.history.shape[1])
        for before in reversed(range(row)):
            found = np.where(np.isnan(found), self.history[before, who], found)
            if self.population:
                who = self.population["source"][before][who]
        return found

    def lineages(self, env_steps: np.ndarray) -> list[str]:
        """Return of each member's policy ``[[env step, member, {name: value}], ...]``, as JSON.

        From that step on it was trained as this member, with these hyperparameters.

        Args:
            env_steps: at the beginning of each chunk of training, ``[T]``.
        """
        source, values = self.population["source"], self.population["hparams"]
        paths, who = np.empty_like(source), np.arange(source.shape[1])
        for row in reversed(range(len(source))):
            paths[row] = who
            who = source[row][who]
        found = []
        for path in paths.T:
            entries: list[list[Any]] = []
            for row, member in enumerate(path.tolist()):
                numbers = {name: exact(rows[row, member]) for name, rows in values.items()}
                if not entries or entries[-1][1:] != [member, numbers]:
                    entries.append([int(env_steps[row]), member, numbers])
            found.append(json.dumps(entries))
        return found


def exact(values: Any) -> Any:
    """Return numbers whose text is the shortest that reads back as the same float32: 0.001, not 0.00100000004.

    True and False are 1 and 0, since a table holds numbers.
    """
    array = np.asarray(values)
    if array.dtype == bool:
        array = array.astype(int)
    if array.dtype != np.float32:
        return array.tolist()
    return float(str(array[()])) if array.ndim == 0 else [float(str(value)) for value in array]
