"""A sweep from Python: :func:`run` trains and evaluates every member and returns one table of them all.

A thin layer over :mod:`jrl.sweep.program`. A sweep's folder holds::

    sweep.json           every setting and every member
    metrics.jsonl        one line a chunk of training, over all members
    table.csv            one row a member, see jrl.tables
    *.png                figures, see jrl.sweep_plots
    summary.json         the best setting, throughput, memory planned and taken, versions
    checkpoints/         the newest state of the members in progress and all results so far
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import checkpoint, configuration, doctor, driver, records, tables
from jrl.driver import RunResult, chunk_length
from jrl.records import RunError
from jrl.sweep import planning, processes, program
from jrl.sweep.choosing import (
    Members,
    check_numbers,
    check_same,
    choose_members,
    columns,
    how_to_resume,
    members_of,
    moved,
    moving,
    population,
)
from jrl.sweep.outcome import Finished
from jrl.sweep.planning import Plan
from jrl.sweep.results import Results
from jrl.sweep.search import PBT, Halving
from jrl.sweep.session import Session
from jrl.sweep.spaces import Space
from jrl.sweep.storing import stacked

_EXAMPLES = {
    "halving": "jrl.sweep.Halving(eta=3)",
    "pbt": "jrl.sweep.PBT({'learning_rate': (1e-4, 1e-2)}, 10_000)",
}


def run(
    algorithm: Any,
    hparams: Any = None,
    *,
    static_grid: Mapping[str, Sequence[Any]] | None = None,
    **settings: Any,
) -> tables.Table:
    """Train and evaluate every member of a sweep; return a tidy table, one row a member.

    ::

        algo = jrl.ppo.make(jrl.make("CartPole-v1"))
        hparams = jrl.sweep.grid(jrl.ppo.HParams(), learning_rate=[1e-4, 3e-4, 1e-3])
        table = jrl.sweep.run(algo, hparams, seeds=64, env_steps=500_000, out="runs/sweep")
        table.to_pandas().groupby("learning_rate").episode_return_mean.mean()

    Takes what :func:`execute` takes, which also returns the plan, the summary and the last states.

    Args:
        static_grid: field of ``Config`` -> values; every combination is a sweep of its own, with a compilation and a
            sub-folder of its own, and all are one table (:mod:`jrl.sweep.groups`).
        algorithm, hparams, **settings: as in :func:`execute`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the chunk in progress is saved.
        RunError, ValueError, TypeError: as :func:`execute`.
    """
    if static_grid:
        from jrl.sweep import groups  # imports this module

        found, table = groups.execute(algorithm, hparams, static_grid=static_grid, **settings)
        if found[-1].finished.interrupted:
            raise KeyboardInterrupt(how_to_resume(settings.get("out")))
        return table
    finished = execute(algorithm, hparams, **settings)
    if finished.interrupted:
        raise KeyboardInterrupt(how_to_resume(finished.out))
    return finished.table


def execute(
    algorithm: Any,
    hparams: Any = None,
    *,
    env_steps: int,
    seeds: int | Sequence[int] = 1,
    env: Any = None,
    config: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    prng: str = "threefry",
    grid: Mapping[str, Any] | None = None,
    random: Mapping[str, Space] | None = None,
    num_random: int = 0,
    search_seed: int = 0,
    halving: Halving | None = None,
    pbt: PBT | None = None,
    out: str | os.PathLike | None = None,
    eval_episodes: int = 100,
    devices: Sequence[jax.Device] | None = None,
    width: int | str | None = "auto",
    chunk: int | None = None,
    checkpoint_seconds: float | None = 60.0,
    progress: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    figures: bool = True,
) -> Finished:
    """Train and evaluate every seed with every setting.

    A member is computed as the same run alone would be: bit for bit on a CPU (``width=1``), to rounding where
    members are computed side by side. A member with a number that is not finite is set back to its state before
    that chunk of training and left so: it has no final return. The others' results do not change by a bit.

    Args:
        algorithm: ``"ppo"``, a module with ``make``, ``Config`` and ``HParams``, or an
            :class:`~jrl.types.Algorithm`.
        hparams: of one member (what is not swept), or with a leading axis on every leaf, from
            :func:`jrl.sweep.grid` or :func:`jrl.sweep.random`.
        env_steps: of each member, warm-up included.
        seeds: how many, counted from 0, or which.
        env: id or what else :func:`jrl.make` takes; may be left out where ``algorithm`` is an ``Algorithm``, which
            knows its own.
        config, env_kwargs, prng: as in :func:`jrl.run`.
        grid: name -> values; every combination is a setting.
        random: name -> distribution; ``num_random`` draws are settings (each with all of ``grid``).
        num_random: how many; those that are equal, as with :func:`jrl.sweep.choice`, are one setting.
        search_seed: of the draws.
        halving: stop the worst settings early, see :class:`jrl.sweep.Halving`.
        pbt: replace the worst members by changed copies of the best ones, see :class:`jrl.sweep.PBT`. The table's
            swept columns are then the values at the end, and its column ``lineage`` says how they came about.
        out: folder, new or empty; None writes no files.
        eval_episodes: of each member's final evaluation; 0 leaves it out.
        devices: over which members are sharded; None for all.
        width: members computed side by side on a device: a number, ``"all"``, or ``"auto"``: 1 on a CPU, all on
            an accelerator.
        chunk: members held in memory at once; None for as many as fit.
        checkpoint_seconds: between two checkpoints (longer where saving is slow); None saves at the end only.
        progress: as in :func:`jrl.run`.
        overwrite: replace a sweep that is already in ``out``.
        resume: go on with the sweep in ``out`` if there is one; it must be the same.
        figures: draw figures into ``out``.

    Raises:
        RunError: (a ValueError) the folder is in use, holds another sweep or the model that the environment is made of,
            or cannot be written to; nothing fits into memory.
        ValueError, TypeError: an unknown or static hyperparameter, an empty grid, a number out of range.
    """
    setup, who, record = prepare(
        algorithm,
        hparams,
        env_steps=env_steps,
        seeds=seeds,
        env=env,
        config=config,
        env_kwargs=env_kwargs,
        prng=prng,
        grid=grid,
        random=random,
        num_random=num_random,
        search_seed=search_seed,
        halving=halving,
        pbt=pbt,
        eval_episodes=eval_episodes,
        devices=devices,
        width=width,
        chunk=chunk,
        checkpoint_seconds=checkpoint_seconds,
    )
    folder = None if out is None else Path(out)
    with ExitStack() as stack:
        going_on = False
        if folder is not None:
            going_on = processes.from_first(resume and (folder / records.SWEEP).exists())
            if going_on:
                began = records.read_sweep(folder)
                check_same(began, record, planning.choose_devices(devices))
                configuration.check_sources(began, setup.env, folder)
                driver.warn_of_other_versions(began)
            elif processes.is_first():
                records.check_new(folder, overwrite)
                records.check_not_needed(folder, (env_kwargs or {}).get("model"))
                records.create(folder)
            if processes.is_first():
                stack.enter_context(records.locked(folder))
            if processes.is_first() and not going_on:
                records.clear(folder, overwrite)
                records.write_json(folder / records.SWEEP, record)
            processes.barrier("folder ready")
        try:
            return Session(setup, who, record, folder, devices, progress, figures).run(pbt or halving)
        except BaseException:
            # Nothing learned yet, nothing to resume: the folder is free again for the corrected command.
            first = folder is not None and processes.is_first()
            if first and folder and not going_on and not (folder / records.METRICS).exists():
                (folder / records.SWEEP).unlink(missing_ok=True)
            raise


def prepare(
    algorithm: Any,
    hparams: Any = None,
    *,
    env_steps: int,
    seeds: int | Sequence[int] = 1,
    env: Any = None,
    config: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    prng: str = "threefry",
    grid: Mapping[str, Any] | None = None,
    random: Mapping[str, Space] | None = None,
    num_random: int = 0,
    search_seed: int = 0,
    halving: Halving | None = None,
    pbt: PBT | None = None,
    eval_episodes: int = 100,
    devices: Sequence[jax.Device] | None = None,
    width: int | str | None = "auto",
    chunk: int | None = None,
    checkpoint_seconds: float | None = 60.0,
    **_: Any,
) -> tuple[configuration.Setup, Members, dict[str, Any]]:
    """Return what is trained, who takes part and what ``sweep.json`` says of them; nothing is computed or written.

    Takes what :func:`execute` takes, and raises what it raises for the arguments themselves.
    """
    setup, who = choose_members(
        algorithm, hparams, env, config, env_kwargs, seeds, grid, random, num_random, search_seed, prng
    )
    check_numbers(env_steps=env_steps, eval_episodes=eval_episodes)
    check_numbers(**({} if chunk is None else {"chunk": chunk}))
    driver.check_numbers(checkpoint_seconds=checkpoint_seconds)
    for name, search, kind in (("halving", halving, Halving), ("pbt", pbt, PBT)):
        if not isinstance(search, kind | None):
            raise TypeError(
                f"{name}={search!r}: expected a jrl.sweep.{kind.__name__}, for example {_EXAMPLES[name]}."
            )
    planning.choose_width(width, planning.choose_devices(devices))
    if pbt is not None:
        who = population(who, setup, pbt, halving)
    record = {
        "format": records.SWEEP_FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **configuration.to_json(setup),
        "seeds": who.seeds.tolist(),
        "settings": who.settings.tolist(),
        "swept": {name: configuration._shortest(np.asarray(leaf)) for name, leaf in columns(who).items()},
        "env_steps": env_steps,
        "eval_episodes": eval_episodes,
        "halving": None if halving is None else records.plain(dataclasses.asdict(halving)),
        "pbt": None if pbt is None else records.plain(dataclasses.asdict(pbt)),
        "width": width,
        "chunk": chunk,
        "checkpoint_seconds": checkpoint_seconds,
        "chunk_length": chunk_length(env_steps, setup.algo.env_steps_per_step),
        "versions": doctor.versions(),
        "device": doctor.device(),
    }
    return setup, who, record


def resume(
    path: str | os.PathLike,
    *,
    algorithm: Any = None,
    env: Any = None,
    devices: Sequence[jax.Device] | None = None,
    progress: str | None = None,
    figures: bool = True,
) -> Finished:
    """Continue an interrupted sweep to its end, with any number of devices: bit for bit where they are alike.

    Args:
        path: the sweep's folder.
        algorithm, env: where they were given as objects: the same again.
        devices, progress, figures: as in :func:`execute`.

    Raises:
        RunError: no sweep's folder, in use by another process, no checkpoint is intact, or what the environment is made
            of (a frozen model, a corpus, prompts) has changed.
    """
    folder = Path(path)
    record = records.read_sweep(folder)
    driver.warn_of_other_versions(record)
    setup = configuration.from_json(record, algorithm=algorithm, env=env)
    configuration.check_sources(record, setup.env, folder)
    who = members_of(record, setup)
    search: Halving | PBT | None = None if record["halving"] is None else Halving(**record["halving"])
    if record.get("pbt") is not None:
        search = PBT(**record["pbt"])
    with records.locked(folder) if processes.is_first() else contextlib.nullcontext():
        return Session(setup, who, record, folder, devices, progress, figures).run(search)


def load(path: str | os.PathLike, member: int, *, algorithm: Any = None, env: Any = None) -> RunResult:
    """Return what one member of a sweep has learned, from its newest checkpoint, as :func:`jrl.load` does of a run.

    ::

        best = int(np.nanargmax(table.final_returns))
        learned = jrl.sweep.load("runs/sweep", best)
        learned.algo.policy(learned.state)

    Raises:
        RunError: no sweep's folder, no such member, or no checkpoint of it yet.
        CheckpointError: (a RunError) its checkpoint is damaged.
    """
    folder = Path(path)
    record = records.read_sweep(folder)
    setup = configuration.from_json(record, algorithm=algorithm, env=env)
    who = members_of(record, setup)
    if not 0 <= member < len(who.seeds):
        raise RunError(f"member={member}: the sweep in {folder} has members 0 to {len(who.seeds) - 1}.")
    checkpoints = folder / records.CHECKPOINTS
    for number in reversed(checkpoint.steps(checkpoints)):
        held = checkpoint.metadata(checkpoints, number)
        if member not in held["order"]:
            continue
        state = jax.eval_shape(setup.algo.init, jax.random.key(0), setup.hparams)
        results = Results.empty(held["rows"], len(who.seeds), moving(who, record))
        like = {"states": stacked(state, held["slots"]), "results": results.arrays()}
        content = checkpoint.restore(checkpoints, like, number)
        who = moved(who, content["results"]["population"])
        index = held["homes"][held["order"].index(member)]
        return RunResult(
            state=program.gather(content["states"], index),
            summary=records.read_summary(folder) or {},
            out=folder,
            interrupted=member not in held["ended"],
            already_finished=False,
            algo=setup.algo,
            env=setup.env,
            hparams=jax.tree.map(lambda leaf: jnp.asarray(leaf[member]), who.hparams),
        )
    raise RunError(f"the sweep in {folder} has no checkpoint of member {member} yet. {how_to_resume(folder)}")


def plan(algorithm: Any, hparams: Any = None, *, measure: bool = True, **settings: Any) -> Plan:
    """Return how :func:`execute` with the same arguments would go about it, without running it.

    Args:
        algorithm, hparams, **settings: as in :func:`execute`.
        measure: train for a few steps to predict the time.

    Raises:
        TypeError: an argument that :func:`execute` does not have.
        RunError, ValueError: as :func:`execute` for the arguments themselves.
    """
    inspect.signature(execute).bind(algorithm, hparams, **settings)  # an unknown one is a TypeError, as there
    setup, who, record = prepare(algorithm, hparams, **settings)
    return Session(setup, who, record, None, settings.get("devices"), "none", False).plan(measure)
