"""What a sweep leaves: the table of its members, and the best setting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jrl import statistics, tables
from jrl.sweep import members, program
from jrl.sweep.planning import Plan
from jrl.sweep.results import exact
from jrl.sweep.rounds import mean_of_rows

if TYPE_CHECKING:
    from jrl.sweep.session import Session  # imports this module


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a sweep leaves: its table, its summary, and whether Ctrl-C ended it early."""

    table: tables.Table
    summary: dict[str, Any]
    plan: Plan
    out: Path | None
    interrupted: bool
    states: Any


def table(sweep: Session) -> tables.Table:
    """Return the table of all members.

    A frozen member has no final return: what it was before the number that is not finite is no result of its training.
    """
    results, per_step = sweep.results, sweep.setup.algo.env_steps_per_step
    end = sweep.warmup + sweep.total * per_step
    ended = np.where(results.stopped_at >= 0, sweep.warmup + results.stopped_at * per_step, end)
    failed = results.failed_at >= 0
    frozen_at = sweep.warmup + results.failed_at.astype(np.int64) * per_step
    rows = len(results.history)
    steps = (
        np.minimum(np.arange(1, rows + 1) * sweep.record["chunk_length"], sweep.total) * per_step
        + sweep.warmup
    )
    evaluation = {name: results.evaluation[name].astype(float) for name in program.Evaluation._fields[:4]}
    evaluated = np.isfinite(evaluation["episode_return_mean"]) & ~failed
    leaves = members.names(sweep.who.hparams)
    tail = max(1, rows // 10)
    columns: dict[str, list[Any]] = {
        "member": list(range(sweep.num)),
        "seed": sweep.who.seeds.tolist(),
        **{name: exact(leaves[name]) for name in sweep.who.swept},
        **{
            name: [float(value) if known else None for value, known in zip(values, evaluated, strict=True)]
            for name, values in evaluation.items()
        },
        "num_episodes": [sweep.record["eval_episodes"] if known else None for known in evaluated],
        "train_return": np.where(failed, np.nan, mean_of_rows(results.history[-tail:])).tolist(),
        "env_steps": np.where(failed, frozen_at, ended).tolist(),
        "status": [
            "frozen" if is_failed else "stopped" if stopped >= 0 else "ok"
            for is_failed, stopped in zip(failed, results.stopped_at, strict=True)
        ],
        "frozen_at": [
            int(at) if is_failed else None for at, is_failed in zip(frozen_at, failed, strict=True)
        ],
        "frozen_why": [results.reasons.get(member) for member in range(sweep.num)],
    }
    if results.population:
        columns[tables.LINEAGE] = results.lineages(np.concatenate([[0], steps[:-1]]))
    return tables.Table(columns, steps, results.history.T, sweep.who.swept)


def best_setting(table: tables.Table) -> dict[str, Any] | None:
    """Return the swept values with the best interquartile mean of final returns, and that mean.

    Those of :func:`jrl.tables.best`, and so of the printed table. Members without a final return, such as frozen ones,
    are left out; None where all are.
    """
    if not table.num_scored:
        return None
    values, part = tables.best(table)
    final = part.final_returns
    return {"hparams": values, "return_iqm": statistics.interquartile_mean(final[np.isfinite(final)])}
