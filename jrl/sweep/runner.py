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
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import checkpoint, configuration, doctor, loggers, memory, progress, records, statistics, tables, xla
from jrl.configuration import Setup
from jrl.driver import RunResult, chunk_length
from jrl.interrupt import StopRequest, wait
from jrl.ops import counter
from jrl.records import CorruptCheckpointError, RunError, RunWarning
from jrl.sweep import members, planning, processes, program
from jrl.sweep.planning import Plan
from jrl.sweep.results import Results, exact
from jrl.sweep.search import PBT, Halving, exploit_and_explore
from jrl.sweep.search import best as search_best
from jrl.sweep.spaces import Space
from jrl.types import PyTree

_SAVING_SHARE = 20  # saving takes at most one part in this many of the time


class Members(NamedTuple):
    """Who takes part: leaves ``[M, ...]`` on the host.

    Attributes:
        seeds: int64 ``[M]``.
        settings: int ``[M]``: members of the same number differ in their seed alone.
        hparams: every leaf ``[M, ...]``.
        swept: names of the leaves that the table has as columns.
    """

    seeds: np.ndarray
    settings: np.ndarray
    hparams: Any
    swept: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a sweep leaves: its table, its summary, and whether Ctrl-C ended it early."""

    table: tables.Table
    summary: dict[str, Any]
    plan: Plan
    out: Path | None
    interrupted: bool
    states: Any


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
            raise KeyboardInterrupt(_how_to_resume(settings.get("out")))
        return table
    finished = execute(algorithm, hparams, **settings)
    if finished.interrupted:
        raise KeyboardInterrupt(_how_to_resume(finished.out))
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
    that chunk of training and left so; the others' results do not change by a bit.

    Args:
        algorithm: ``"ppo"``, a module with ``make``, ``Config`` and ``HParams``, or an
            :class:`~jrl.types.Algorithm`.
        hparams: of one member (what is not swept), or with a leading axis on every leaf, from
            :func:`jrl.sweep.grid` or :func:`jrl.sweep.random`.
        env_steps: of each member, warm-up included.
        seeds: how many, counted from 0, or which.
        env: id or what else :func:`jrl.make` takes; may be left out where ``algorithm`` is an ``Algorithm``, which
            knows its own.
        config, env_kwargs: as in :func:`jrl.run`.
        grid: name -> values; every combination is a setting.
        random: name -> distribution; ``num_random`` draws are settings (each with all of ``grid``).
        num_random: how many.
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
        RunError: (a ValueError) the folder is in use, holds another sweep or cannot be written to; nothing fits
            into memory.
        ValueError, TypeError: an unknown or static hyperparameter, an empty grid, a number out of range.
    """
    setup, who = choose_members(
        algorithm, hparams, env, config, env_kwargs, seeds, grid, random, num_random, search_seed
    )
    _check(env_steps=env_steps, eval_episodes=eval_episodes)
    if pbt is not None:
        who = _population(who, setup, pbt, halving)
    record = {
        "format": records.SWEEP_FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **configuration.to_json(setup),
        "seeds": who.seeds.tolist(),
        "settings": who.settings.tolist(),
        "swept": {name: configuration._shortest(np.asarray(leaf)) for name, leaf in _columns(who).items()},
        "env_steps": env_steps,
        "eval_episodes": eval_episodes,
        "halving": None if halving is None else dataclasses.asdict(halving),
        "pbt": None if pbt is None else records.plain(dataclasses.asdict(pbt)),
        "width": width,
        "chunk": chunk,
        "checkpoint_seconds": checkpoint_seconds,
        "chunk_length": chunk_length(env_steps, setup.algo.env_steps_per_step),
        "versions": doctor.versions(),
        "device": doctor.device(),
    }
    folder = None if out is None else Path(out)
    with ExitStack() as stack:
        going_on = False
        if folder is not None:
            going_on = processes.from_first(resume and (folder / records.SWEEP).exists())
            if going_on:
                _check_same(records.read_sweep(folder), record)
            elif processes.is_first():
                records.check_new(folder, overwrite)
                records.create(folder)
            if processes.is_first():
                stack.enter_context(records.locked(folder))
            if processes.is_first() and not going_on:
                records.clear(folder)
                records.write_json(folder / records.SWEEP, record)
            processes.barrier("folder ready")
        try:
            return _Sweep(setup, who, record, folder, devices, progress, figures).run(pbt or halving)
        except BaseException:
            # Nothing learned yet, nothing to resume: the folder is free again for the corrected command.
            first = folder is not None and processes.is_first()
            if first and folder and not going_on and not (folder / records.METRICS).exists():
                (folder / records.SWEEP).unlink(missing_ok=True)
            raise


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
        RunError: no sweep's folder, in use by another process, or no checkpoint is intact.
    """
    folder = Path(path)
    record = records.read_sweep(folder)
    setup = configuration.from_json(record, algorithm=algorithm, env=env)
    who = _members_of(record, setup)
    search: Halving | PBT | None = None if record["halving"] is None else Halving(**record["halving"])
    if record.get("pbt") is not None:
        search = PBT(**record["pbt"])
    with records.locked(folder) if processes.is_first() else contextlib.nullcontext():
        return _Sweep(setup, who, record, folder, devices, progress, figures).run(search)


def load(path: str | os.PathLike, member: int, *, algorithm: Any = None, env: Any = None) -> RunResult:
    """Return what one member of a sweep has learned, from its newest checkpoint, as :func:`jrl.load` does of a run.

    ::

        best = max(range(len(table)), key=lambda i: table.row(i)["episode_return_mean"])
        learned = jrl.sweep.load("runs/sweep", best)
        learned.algo.policy(learned.state)

    Raises:
        RunError: no sweep's folder, no such member, or no checkpoint of it yet.
        CheckpointError: (a RunError) its checkpoint is damaged.
    """
    folder = Path(path)
    record = records.read_sweep(folder)
    setup = configuration.from_json(record, algorithm=algorithm, env=env)
    who = _members_of(record, setup)
    if not 0 <= member < len(who.seeds):
        raise RunError(f"member={member}: the sweep in {folder} has members 0 to {len(who.seeds) - 1}.")
    checkpoints = folder / records.CHECKPOINTS
    for number in reversed(checkpoint.steps(checkpoints)):
        held = checkpoint.metadata(checkpoints, number)
        if member not in held["order"]:
            continue
        state = jax.eval_shape(setup.algo.init, jax.random.key(0), setup.hparams)
        results = Results.empty(held["rows"], len(who.seeds), _moving(who, record))
        like = {"states": _stacked(state, held["slots"]), "results": results.arrays()}
        content = checkpoint.restore(checkpoints, like, number)
        who = _moved(who, content["results"]["population"])
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
    raise RunError(
        f"the sweep in {folder} has no checkpoint of member {member} yet. {_how_to_resume(folder)}"
    )


def plan(algorithm: Any, hparams: Any = None, *, measure: bool = True, **settings: Any) -> Plan:
    """Return how :func:`execute` with the same arguments would go about it, without running it.

    Args:
        algorithm, hparams, **settings: as in :func:`execute`.
        measure: train for a few steps to predict the time.
    """
    names = ("env", "config", "env_kwargs", "seeds", "grid", "random", "num_random", "search_seed")
    defaults = {"seeds": 1, "num_random": 0, "search_seed": 0}
    chosen: Any = [settings.get(name, defaults.get(name)) for name in names]
    setup, who = choose_members(algorithm, hparams, *chosen)
    record = {
        "env_steps": settings["env_steps"],
        "eval_episodes": 0,
        "width": settings.get("width", "auto"),
        "chunk": settings.get("chunk"),
        "checkpoint_seconds": None,
        "halving": settings.get("halving"),
        "pbt": settings.get("pbt"),
        "chunk_length": chunk_length(settings["env_steps"], setup.algo.env_steps_per_step),
    }
    return _Sweep(setup, who, record, None, settings.get("devices"), "none", False).plan(measure)


# ------------------------------------------------------------------------------------------------ members


def choose_members(
    algorithm: Any,
    hparams: Any,
    env: Any,
    config: Any,
    env_kwargs: Mapping[str, Any] | None,
    seeds: int | Sequence[int],
    grid: Mapping[str, Any] | None,
    random: Mapping[str, Space] | None,
    num_random: int,
    search_seed: int,
) -> tuple[Setup, Members]:
    """Return what is trained and who takes part; see :func:`execute` for the arguments."""
    if env is None:
        env = getattr(algorithm, "env", None)
        if env is None:
            raise RunError("env=None: a sweep needs the environment, for its evaluation too; give env=.")
    num_settings = _leading_length(hparams)
    single = hparams if num_settings is None else jax.tree.map(lambda leaf: leaf[0], hparams)
    setup = configuration.build(algorithm, env, config=config, hparams=single, env_kwargs=env_kwargs)
    if num_settings is None:
        settings, swept = _settings(setup.hparams, grid or {}, random or {}, num_random, search_seed)
    else:
        if grid or random:
            raise RunError(
                "hparams has a leading axis already: leave out grid and random, or give one member's."
            )
        settings = jax.tree.map(
            lambda leaf, like: np.asarray(leaf).astype(like.dtype), _fill_env(hparams, setup, num_settings),
            setup.hparams,
        )  # fmt: skip
        swept = tuple(members.varying(settings))
    numbers = np.asarray(range(seeds) if isinstance(seeds, int) else seeds, np.int64)
    if numbers.ndim != 1 or not numbers.size:
        raise RunError(f"seeds={seeds!r}: a sweep needs at least one seed.")
    if (numbers < 0).any() or (numbers >= 2**32).any() or len(set(numbers.tolist())) < len(numbers):
        raise RunError(f"seeds={seeds!r}: must be different whole numbers from 0 to 2**32 - 1.")
    setting = np.repeat(np.arange(members.size(settings)), len(numbers))
    hparams = jax.tree.map(lambda leaf: np.asarray(leaf)[setting], settings)
    return setup, Members(np.tile(numbers, members.size(settings)), setting, hparams, swept)


def _leading_length(hparams: Any) -> int | None:
    """Return the number of settings of an HParams with a leading axis, None where it is that of one member."""
    if hparams is None or isinstance(hparams, Mapping):
        return None
    batched = {name: np.ndim(leaf) > 0 for name, leaf in members.names(hparams).items() if name[:4] != "env."}
    if any(batched.values()) and not all(batched.values()):
        names = ", ".join(name for name, is_batched in batched.items() if is_batched)
        raise RunError(
            f"hparams: {names} has a leading axis and the others have none. Every leaf needs one: use "
            "jrl.sweep.grid(hparams, name=[...]), or grid={...}."
        )
    return members.size(hparams) if batched and all(batched.values()) else None


def _settings(
    single: Any, grid: Mapping[str, Any], random: Mapping[str, Space], num_random: int, search_seed: int
) -> tuple[Any, tuple[str, ...]]:
    """Return all settings, leaves ``[S, ...]``: each random draw with each combination of the grid."""
    if bool(random) != bool(num_random):
        raise RunError(
            f"num_random={num_random} and random={dict(random)!r}: a random search needs both, the number of draws "
            "and a distribution for each name."
        )
    if both := sorted(set(grid) & set(random)):
        raise RunError(f"{', '.join(both)} is in the grid and in the random search; leave it out of one.")
    combinations = members.grid(single, **grid)
    draws = (
        members.random(jax.random.key(search_seed), single, num_random, **random)
        if random
        else members.broadcast(single, 1)
    )
    num_draws, num_combinations = members.size(draws), members.size(combinations)
    of_draw = np.repeat(np.arange(num_draws), num_combinations)
    of_combination = np.tile(np.arange(num_combinations), num_draws)
    leaves = [
        np.asarray(draw)[of_draw] if name in random else np.asarray(combination)[of_combination]
        for (name, draw), combination in zip(
            members.names(draws).items(), jax.tree.leaves(combinations), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(draws), leaves), (*random, *grid)


def _fill_env(hparams: Any, setup: Setup, n: int) -> Any:
    if getattr(hparams, "env", ()) is None:
        return dataclasses.replace(hparams, env=members.broadcast(setup.hparams.env, n))
    return hparams


def _columns(who: Members) -> dict[str, np.ndarray]:
    """Return every leaf that differs between members, and the swept ones."""
    leaves = {name: np.asarray(leaf) for name, leaf in members.names(who.hparams).items()}
    differ = [name for name, leaf in leaves.items() if (leaf != leaf[:1]).any()]
    return {name: leaves[name] for name in dict.fromkeys((*who.swept, *differ))}


def _population(who: Members, setup: Setup, pbt: PBT, halving: Halving | None) -> Members:
    """Return the members of a population: each a setting of its own, the hyperparameters that change swept."""
    if halving is not None:
        raise RunError("halving and pbt: a sweep has one search; leave out one of them.")
    if len(who.seeds) < 2:
        raise RunError("pbt: a population has at least two members; give more seeds or settings.")
    for name in pbt.explore:
        members.check_name(name, members.names(setup.hparams), setup.hparams)
    swept = tuple(dict.fromkeys((*_columns(who), *pbt.explore)))
    return who._replace(settings=np.arange(len(who.seeds)), swept=swept)


def _moving(who: Members, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the hyperparameters that a population changes or hands on, ``[M]`` at the start."""
    return _columns(who) if record.get("pbt") else {}


def _moved(who: Members, population: Mapping[str, Any]) -> Members:
    """Return the members with the hyperparameters that a population has now."""
    rows = population.get("hparams", {})
    leaves = [
        np.array(rows[name][-1]) if name in rows else leaf
        for name, leaf in members.names(who.hparams).items()
    ]
    return who._replace(hparams=jax.tree.unflatten(jax.tree.structure(who.hparams), leaves))


def _members_of(record: Mapping[str, Any], setup: Setup) -> Members:
    """Build again what :func:`execute` has written into ``sweep.json``."""
    n = len(record["seeds"])
    hparams = jax.tree.map(np.asarray, members.broadcast(setup.hparams, n))
    leaves = members.names(hparams)
    unknown = sorted(set(record["swept"]) - set(leaves))
    if unknown:
        raise RunError(
            f"the sweep varies {', '.join(unknown)}, which this version's hyperparameters do not have. Continue it "
            "with the version it was started with (versions in sweep.json)."
        )
    values = [
        np.asarray(record["swept"][name], leaf.dtype) if name in record["swept"] else leaf
        for name, leaf in leaves.items()
    ]
    return Members(
        np.asarray(record["seeds"], np.int64),
        np.asarray(record["settings"]),
        jax.tree.unflatten(jax.tree.structure(hparams), values),
        tuple(record["swept"]),
    )


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to continue one sweep with the settings of another."""
    for name in (
        "algorithm",
        "environment",
        "config",
        "hparams",
        "seeds",
        "swept",
        "env_steps",
        "halving",
        "pbt",
    ):
        was, is_now = records.plain(old.get(name)), records.plain(new[name])
        if was == is_now:
            continue
        if isinstance(was, dict) and isinstance(is_now, dict):
            name = next(key for key in sorted({*was, *is_now}) if was.get(key) != is_now.get(key))
            was, is_now = was.get(name), is_now.get(name)
        raise RunError(
            f"the sweep in this folder is another one: its {name} is {_short(was)}, this command's {_short(is_now)}. "
            "A sweep is continued as it was started: use `jrl resume FOLDER`, or another --out for the new one."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check(**values: int) -> None:
    for name, value in values.items():
        lowest = 0 if name == "eval_episodes" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise RunError(f"{name}={value!r}: must be a whole number of at least {lowest}.")


def _how_to_resume(out: str | os.PathLike | None) -> str:
    return "the sweep wrote no files" if out is None else f"continue the sweep with: jrl resume {out}"


# ------------------------------------------------------------------------------------------------- the run


class _Sweep:
    """One sweep on its way: what its parts share, and the order in which they happen."""

    def __init__(
        self,
        setup: Setup,
        who: Members,
        record: Mapping[str, Any],
        folder: Path | None,
        devices: Sequence[jax.Device] | None,
        progress_kind: str | None,
        figures: bool,
    ) -> None:
        # jitted here: then each is traced once, however often its shapes are asked for
        algo = setup.algo._replace(init=jax.jit(setup.algo.init), step=jax.jit(setup.algo.step))
        self.setup = dataclasses.replace(setup, algo=algo)
        self.who, self.record, self.folder = who, record, folder
        self.devices = jax.devices() if devices is None else list(devices)
        self.width = planning.choose_width(record["width"], self.devices)
        self.show = progress.choose(progress_kind if processes.is_first() else "none")
        self.figures = figures
        self.num = len(who.seeds)
        state = jax.eval_shape(algo.init, jax.random.key(0), setup.hparams)
        metrics = jax.eval_shape(algo.step, state, setup.hparams)[1]
        if wrong := [name for name, metric in metrics.items() if metric.shape != ()]:
            raise RunError(f"metrics {', '.join(wrong)} are no scalars: algo.step must return shape ().")
        self.state_shape = state
        self.latest: dict[str, np.ndarray] = {}  # metrics of each member in its last chunk
        for text in xla.diagnose() if self.width != 1 else ():  # members one by one cannot hang
            warnings.warn(text, RunWarning, stacklevel=4)

    def compile(self) -> None:
        """Plan the memory and compile the training."""
        self.plan_, self.layout, self.train_chunk = planning.compile_for(
            self.setup,
            self.num,
            self.record["env_steps"],
            self.record["chunk_length"],
            width=self.width,
            devices=self.devices,
            chunk=self.record["chunk"],
            moving=bool(self.record.get("halving") or self.record.get("pbt")),
        )
        self.init: Callable[..., Any] | None = None  # compiled where members start
        self.play: Callable[..., program.Evaluation] | None = None  # and where they end
        self.movers: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}  # by shape and dtype of a leaf
        self.draw: Callable[..., Any] | None = None  # of a population's rounds
        if self.folder is not None:
            checkpoint.load_library()
        self.watch = (
            memory.Watch()
        )  # from here on: the plan is of what the training takes once it is compiled

    def start(self, who: np.ndarray) -> Any:
        """Initialise the members ``who``, and learn how many steps their warm-up took."""
        arguments = self.spread((self.who.seeds.astype(np.uint32), self.who.hparams), who)
        if self.init is None:  # by itself, so that the memory of compiling is none of the training's
            with self.watch.outside():
                init: Any = program.init(self.setup.algo, self.layout.mesh, self.layout.width)
                self.init = init.lower(*arguments).compile()
        states = self.init(*arguments)
        self.warmup = 0
        if hasattr(states, "env_steps"):
            self.warmup = counter.to_int(states.env_steps.addressable_shards[0].data[0])
        per_step = self.setup.algo.env_steps_per_step
        self.total = -(-(self.record["env_steps"] - self.warmup) // per_step)
        if self.total < 1:
            raise RunError(
                f"env_steps={self.record['env_steps']}: the warm-up alone takes {self.warmup} environment steps. "
                "Training starts after it; pass more env_steps, or a Config with a shorter warm-up."
            )
        return states

    def spread(self, tree: PyTree, who: np.ndarray) -> PyTree:
        """Put the members ``who`` of leaves ``[M, ...]`` into the devices' slots."""
        return self.layout.spread(jax.tree.map(lambda leaf: np.asarray(leaf)[who], tree))

    def plan(self, measure: bool) -> Plan:
        """Return the plan; where asked for, with the speed of a few steps."""
        self.compile()
        if not measure:
            return self.plan_
        who = np.arange(min(self.plan_.chunk, self.num))
        states = self.start(who)
        failed_at, hparams = (
            self.spread(np.full(self.num, program.RUNNING, np.int32), who),
            self.spread(self.who.hparams, who),
        )
        num_steps, seconds = 1, 0.0
        while True:
            began = time.perf_counter()
            (states, failed_at), _ = jax.block_until_ready(
                self.train_chunk(
                    states, failed_at, hparams, *_numbers(0, num_steps, self.num_groups(len(who)))
                )
            )
            seconds = time.perf_counter() - began
            if seconds > 1.0 or num_steps >= self.record["chunk_length"]:
                break
            num_steps = min(2 * num_steps, self.record["chunk_length"])
        rate = len(who) * num_steps * self.setup.algo.env_steps_per_step / seconds
        return dataclasses.replace(self.plan_, env_steps_per_second=rate)

    def num_groups(self, num_active: int) -> int:
        """Return how many groups of a device hold the first ``num_active`` members."""
        width = self.layout.width or self.layout.per_device
        on_a_device = -(-num_active // self.layout.mesh.size)
        return -(-on_a_device // width)

    def run(self, search: Halving | PBT | None) -> Finished:
        """Train all chunks of members, from the newest checkpoint on if there is one; evaluate; write it all."""
        began = time.perf_counter()
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest(self.show.message))
            name = f"{self.setup.algorithm} on {self.setup.env.name}"
            self.show.message(f"sweep of {self.num} members, {name}: compiling for {doctor.device()} ...")
            self.compile()
            if search is not None and self.plan_.num_chunks > 1:
                raise RunError(
                    f"{type(search).__name__.lower()}: {self.num} members do not fit into memory at once, only "
                    f"{self.plan_.chunk}, and their returns are compared with one another. Sweep "
                    "fewer, or set chunk (--chunk) yourself."
                )
            self.show.message(str(self.plan_))
            with self.watch.during("training"):
                states = self.train(search, stop, stack)
        complete = not stop.requested or bool(self.ended.all())
        seconds = self.seconds
        best = None if not complete else self.best_setting()
        summary = {
            "algorithm": self.setup.algorithm,
            "environment": self.setup.env.name,
            "members": self.num,
            "frozen": int((self.results.failed_at >= 0).sum()),
            "stopped": int((self.results.stopped_at >= 0).sum()),
            "interrupted": not complete,
            "best": best,
            "env_steps": self.env_steps_done,
            "train_seconds": seconds,
            "env_steps_per_second": self.env_steps_done / seconds if seconds else 0.0,
            "total_seconds": time.perf_counter() - began,
            "plan": dataclasses.asdict(self.plan_),
            # by how much the process grew at the highest once it had compiled: what the plan speaks of
            "training_bytes": self.watch.peaks.get("training", 0),
            "evaluating_bytes": self.watch.peaks.get("evaluating", 0),
            "saving_bytes": self.watch.peaks.get("saving", 0),
            "device": doctor.device(),
            "precision": doctor.precision(),
            "versions": doctor.versions(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        table = self.table()
        if self.folder is not None and processes.is_first():
            table.to_csv(self.folder / records.TABLE)
            records.write_json(self.folder / records.SUMMARY, records.plain(summary))
            if self.figures and complete:
                from jrl import sweep_plots

                sweep_plots.figures(table, self.folder)
        return Finished(table, summary, self.plan_, self.folder, not complete, states)

    # ----------------------------------------------------------------------------------------- training

    def train(self, search: Halving | PBT | None, stop: StopRequest, stack: ExitStack) -> Any:
        """Train and evaluate each chunk of members in turn; return the states of the last one, in their slots."""
        self.seconds, self.env_steps_done, self.saved_at = 0.0, 0, time.perf_counter()
        held = self.plan_.chunk
        begin = self.restore()
        if begin is None:
            states = self.start(np.arange(min(held, self.num)))
            self.results = self.no_results()
            self.ended = np.zeros(self.num, bool)
            begin = _Position(0, 0, np.arange(min(held, self.num)), states)
        sink = None
        if self.folder is not None and processes.is_first():
            records.drop_metrics_after(self.folder, self.env_steps_done)
            sink = loggers.JsonlLogger(self.folder / records.METRICS)
            stack.callback(sink.close)
        work = self.num * self.total * self.setup.algo.env_steps_per_step
        self.show.start(self.env_steps_done, work)
        stack.callback(self.show.stop)
        first = begin.chunk
        for chunk in range(first, self.plan_.num_chunks):
            if chunk > first:
                # Memory holds one chunk of members, not the next one's start beside it. Said, for what has saved
                # them may hold them a while longer.
                jax.tree.map(lambda leaf: leaf.delete(), states)
                order = np.arange(chunk * held, min((chunk + 1) * held, self.num))
                begin = _Position(chunk, 0, order, self.start(order))
            states = self.train_one_chunk(begin, search, stop, sink)
            if stop.requested:
                break
        stop.announce()
        return states

    def train_one_chunk(
        self,
        begin: _Position,
        search: Halving | PBT | None,
        stop: StopRequest,
        sink: loggers.Logger | None,
    ) -> Any:
        """Train and evaluate the members that are held in memory together."""
        chunk, step, order, states = begin
        length = self.record["chunk_length"]
        rungs = self.rungs(search)
        active = self.num_active(order)
        failed_at, hparams = self.placed(order)
        pending: list[tuple[int, int, np.ndarray, program.Report]] = []
        last = time.perf_counter()

        def fetch() -> None:
            nonlocal last
            before, num_steps, whom, report = pending.pop(0)
            wait(report, stop)
            now = time.perf_counter()
            self.seconds += now - last
            taken = self.note(before, num_steps, whom, report)
            self.watch.look()
            self.env_steps_done += taken
            row = self.row(before + num_steps, chunk, taken / max(now - last, 1e-9))
            last = now
            if sink is not None:
                sink.write(self.env_steps_done, {k: v for k, v in row.items() if k != "text"})
            self.show.update(self.env_steps_done, row)

        while step < self.total:
            num_steps = min(length, self.total - step)
            (states, failed_at), report = self.train_chunk(
                states, failed_at, hparams, *_numbers(step, num_steps, self.num_groups(active))
            )
            pending.append((step, num_steps, order[:active], report))
            step += num_steps
            at_rung = step in rungs
            if not processes.alone():
                wait(report, stop)
            stopping, due = processes.any_of(stop.requested, self.due())
            while len(pending) > (0 if at_rung or due or stopping or step >= self.total else 1):
                fetch()
            if at_rung:
                if isinstance(search, PBT):
                    states = self.replace_the_worst(search, states, step)
                else:
                    order, states = self.stop_the_worst(order, states, step, rungs[step])
                active = self.num_active(order)
                failed_at, hparams = self.placed(order)
            if (due or stopping) and step < self.total:
                self.save(chunk, step, order, states)
                last = time.perf_counter()
            if stopping:
                stop.requested = True
                break
        if step >= self.total and not stop.requested and not self.ended[order].all():
            if self.record["eval_episodes"]:
                self.evaluate(order, states, hparams)
            self.ended[order] = True
            self.save(chunk, step, order, states)
        return states

    def no_results(self) -> Results:
        """Return that nothing is known of any member."""
        num_rows = -(-self.total // self.record["chunk_length"])
        return Results.empty(num_rows, self.num, _moving(self.who, self.record))

    def num_active(self, order: np.ndarray) -> int:
        """Return how many members, the first ones of ``order``, no search has stopped."""
        return int((self.results.stopped_at[order] < 0).sum())

    def placed(self, order: np.ndarray) -> tuple[jax.Array, Any]:
        """Return ``failed_at`` and the hyperparameters of the members ``order``, in the devices' slots."""
        failed_at = self.results.failed_at[order]
        failed_at = np.where(self.results.stopped_at[order] >= 0, program.STOPPED, failed_at).astype(np.int32)
        slots = np.full(self.layout.slots, program.STOPPED, np.int32)  # a free slot's too
        slots[self.layout.homes(len(order))] = failed_at
        return self.layout.place(slots), self.spread(self.who.hparams, order)

    def note(self, before: int, num_steps: int, whom: np.ndarray, report: program.Report) -> int:
        """Enter a chunk's report on the members ``whom`` into the results; return the environment steps it took."""
        row, per_step = before // self.record["chunk_length"], self.setup.algo.env_steps_per_step
        home = self.layout.homes(len(whom))
        report = jax.tree.map(lambda leaf: leaf[home], processes.fetch(report))
        was_running = self.results.failed_at[whom] == program.RUNNING
        running = report.failed_at == program.RUNNING
        ended = running & (report.summary["num_episodes"] > 0)
        self.results.history[row, whom[ended]] = report.summary["episode_return"][ended]
        for i in np.flatnonzero(was_running & ~running):
            self.results.failed_at[whom[i]] = report.failed_at[i]
            self.results.reasons[int(whom[i])] = _reason(report, int(i), self.latest, int(whom[i]))
        for name, values in report.summary.items():
            self.latest.setdefault(name, np.full(self.num, np.nan))[whom] = values
        if not running.any():
            self.show.message(f"all members in progress have failed by env step {before * per_step:,}")
        return int(was_running.sum()) * num_steps * per_step

    def row(self, step: int, chunk: int, rate: float) -> dict[str, Any]:
        """Return a line of ``metrics.jsonl``."""
        newest = self.results.history[(step - 1) // self.record["chunk_length"]]
        newest = newest[np.isfinite(newest)]
        done, failed = int(self.ended.sum()), int((self.results.failed_at >= 0).sum())
        best = None if not newest.size else float(f"{newest.max():.7g}")
        return {
            "step": step,
            "chunk": chunk,
            "seconds": round(self.seconds, 4),
            "env_steps_per_second": round(rate, 1),
            "members_done": done,
            "members_frozen": failed,
            "episode_return": best,
            "episode_return_iqm": (
                None if not newest.size else float(f"{statistics.interquartile_mean(newest):.7g}")
            ),
            "text": f"{done}/{self.num} done, best {'-' if best is None else f'{best:.4g}'}"
            + (f", {failed} frozen" if failed else ""),
        }

    def rungs(self, search: Halving | PBT | None) -> dict[int, int]:
        """Return after which algorithm steps a search decides, ends of chunks of training; of halving who goes on."""
        length = self.record["chunk_length"]
        if isinstance(search, PBT):
            return dict.fromkeys(search.rounds(length, self.total, self.setup.algo.env_steps_per_step), 0)
        rungs = [] if search is None else search.rungs(len(set(self.who.settings)), self.total)
        rounded = {-(-at // length) * length: kept for at, kept in rungs}
        return {at: kept for at, kept in rounded.items() if at < self.total}

    def stop_the_worst(self, order: np.ndarray, states: Any, step: int, kept: int) -> tuple[np.ndarray, Any]:
        """Keep the best ``kept`` settings; return the new order, survivors first, and the states in it."""
        rows = step // self.record["chunk_length"]
        recent = self.results.history[rows // 2 : rows]
        alive = [
            s
            for s in dict.fromkeys(self.who.settings[order])
            if self.results.stopped_at[self.who.settings == s].max() < 0
        ]
        scores = np.array([_score(recent[:, self.who.settings == setting]) for setting in alive])
        survivors = np.asarray(alive)[search_best(scores, kept)]
        stays = np.isin(self.who.settings[order], survivors)
        stopped = order[~stays & (self.results.stopped_at[order] < 0)]
        self.results.stopped_at[stopped] = step
        permutation = np.argsort(~stays, kind="stable")
        home = self.layout.homes(len(order))
        index = home[permutation][self.layout.sources(len(order))]
        states = self.gather(states, index)
        self.show.message(
            f"rung at {step * self.setup.algo.env_steps_per_step:,} env steps: {len(survivors)} of {len(alive)} "
            "settings go on"
        )
        return order[permutation], states

    def replace_the_worst(self, pbt: PBT, states: Any, step: int) -> Any:
        """Go on with changed copies of the best members in the place of the worst; return the states."""
        row, per_step = step // self.record["chunk_length"], self.setup.algo.env_steps_per_step
        rows = min(self.rungs(pbt)) // self.record["chunk_length"]
        score = _mean_of_rows(self.results.history[row - (rows - rows // 2) : row])
        score[self.results.failed_at >= 0] = np.nan
        home, impl = self.layout.homes(self.num), jax.random.key_impl(states.key)
        streams = processes.fetch(jax.random.key_data(states.key))[home]
        if self.draw is None:  # traced once, for all rounds
            fixed = {"explore": pbt.explore, "share": pbt.share, "factor": pbt.factor}
            self.draw = jax.jit(functools.partial(exploit_and_explore, **fixed))
        with self.watch.outside():  # it compiles at its first round, and holds nothing of size
            # The states themselves are too large to pass through it: their streams stand for them.
            new, hparams, origin = self.draw(
                jax.random.fold_in(members.key_of(jnp.uint32(pbt.seed), members.SEARCH), step),
                _Streams(jax.random.wrap_key_data(streams, impl=impl)),
                self.who.hparams,
                score.astype(np.float32),
            )
        source = np.asarray(origin)
        self.who = self.who._replace(hparams=jax.tree.map(np.asarray, hparams))
        self.results.inherit(row, source, members.names(self.who.hparams))
        self.latest = {name: values[source] for name, values in self.latest.items()}
        states = self.gather(states, home[source][self.layout.sources(self.num)])
        replaced = int((source != np.arange(self.num)).sum())
        self.show.message(
            f"round at {step * per_step:,} env steps: {replaced} of {self.num} members replaced"
        )
        return dataclasses.replace(states, key=self.layout.spread(new.key))

    def gather(self, states: Any, index: np.ndarray) -> Any:
        """Return the members ``index`` of ``states``, which are used up.

        Leaf by leaf, so that memory holds one of them twice and not all.
        """
        leaves, structure = jax.tree.flatten(states)
        del states
        kinds = {(leaf.shape, leaf.dtype) for leaf in leaves} - set(self.movers)
        if kinds:
            with self.watch.outside():
                self.movers |= {kind: planning.compile_move(self.layout, *kind) for kind in kinds}
        index = index.astype(np.int32)
        for i, leaf in enumerate(leaves):
            leaves[i] = jax.block_until_ready(self.movers[leaf.shape, leaf.dtype](leaf, index))
            leaf.delete()
        return jax.tree.unflatten(structure, leaves)

    def evaluate(self, order: np.ndarray, states: Any, hparams: Any) -> None:
        """Evaluate the members ``order`` greedily."""
        self.show.message(
            f"evaluating {len(order)} members over {self.record['eval_episodes']} episodes each ..."
        )
        arguments = states, self.spread(self.who.seeds.astype(np.uint32), order), hparams
        if self.play is None:
            with self.watch.outside():
                play: Any = program.evaluate(
                    self.setup.algo,
                    self.setup.env,
                    self.layout.mesh,
                    self.layout.width,
                    self.record["eval_episodes"],
                )
                self.play = play.lower(*arguments).compile()
        with self.watch.during("evaluating"):
            evaluation = processes.fetch(self.play(*arguments))
        home = self.layout.homes(len(order))
        for name, values in evaluation._asdict().items():
            self.results.evaluation[name][order] = values[home]

    # ------------------------------------------------------------------------------------- checkpoints

    def due(self) -> bool:
        """Tell whether it is time for a checkpoint."""
        pause = self.record["checkpoint_seconds"]
        return self.folder is not None and pause is not None and time.perf_counter() - self.saved_at > pause

    def save(self, chunk: int, step: int, order: np.ndarray, states: Any) -> None:
        """Write a checkpoint of the members in progress and of all results."""
        if self.folder is None:
            return
        began = time.perf_counter()
        number = chunk * (self.total + 1) + step
        metadata = {
            "chunk": chunk,
            "step": step,
            "order": order.tolist(),
            "slots": self.layout.slots,
            "homes": self.layout.homes(
                len(order)
            ).tolist(),  # where each member of the order is in the arrays
            "held": self.plan_.chunk,
            "warmup": self.warmup,
            "rows": len(self.results.history),
            "ended": np.flatnonzero(self.ended).tolist(),
            "env_steps": self.env_steps_done,
            "seconds": self.seconds,
            "reasons": {str(member): text for member, text in self.results.reasons.items()},
        }
        folder = self.folder / records.CHECKPOINTS
        content = {"states": states, "results": self.results.arrays()}
        try:
            with self.watch.outside(), self.watch.during("saving"):
                checkpoint.save(folder, content, number, metadata=metadata, keep=None)
            for old in checkpoint.steps(folder) if processes.is_first() else ():
                # the last checkpoint of each chunk of members stays: it holds what they have learned
                if old < number and old % (self.total + 1) != self.total:
                    checkpoint.remove(folder, old)
        except OSError as error:
            raise RunError(
                f"cannot write a checkpoint into {folder}: {error.strerror or error}. What was saved before is "
                f"intact; make room, then {_how_to_resume(self.folder)}"
            ) from error
        took = time.perf_counter() - began
        # so that saving takes at most a twentieth of the time
        self.saved_at = time.perf_counter() + max(
            0.0, _SAVING_SHARE * took - (self.record["checkpoint_seconds"] or 0)
        )

    def restore(self) -> _Position | None:
        """Return where the newest intact checkpoint left off; None where there is none."""
        if self.folder is None:
            return None
        folder = self.folder / records.CHECKPOINTS
        damaged: CorruptCheckpointError | None = None
        for number in reversed(checkpoint.steps(folder)):
            try:
                held = checkpoint.metadata(folder, number)
                order = np.asarray(held["order"])
                self.warmup = held["warmup"]
                self.total = -(
                    -(self.record["env_steps"] - self.warmup) // self.setup.algo.env_steps_per_step
                )
                results = self.no_results()
                like = {
                    "states": _stacked(self.state_shape, held["slots"]),
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
        self.who = _moved(self.who, results.population)
        self.results, self.ended = results, np.isin(np.arange(self.num), held["ended"])
        self.seconds, self.env_steps_done = held["seconds"], held["env_steps"]
        if held["held"] != self.plan_.chunk:
            raise RunError(
                f"the sweep held {held['held']} members at once, and now {self.plan_.chunk} would fit: continue it "
                f"with --chunk {held['held']} (chunk={held['held']})."
            )
        states = self.layout.spread(program.gather(content["states"], np.asarray(held["homes"])))
        return _Position(held["chunk"], held["step"], order, states)

    # ------------------------------------------------------------------------------------------ results

    def table(self) -> tables.Table:
        """Return the table of all members."""
        results, per_step = self.results, self.setup.algo.env_steps_per_step
        end = self.warmup + self.total * per_step
        ended = np.where(results.stopped_at >= 0, self.warmup + results.stopped_at * per_step, end)
        failed = results.failed_at >= 0
        frozen_at = self.warmup + results.failed_at.astype(np.int64) * per_step
        rows = len(results.history)
        steps = (
            np.minimum(np.arange(1, rows + 1) * self.record["chunk_length"], self.total) * per_step
            + self.warmup
        )
        evaluation = {name: results.evaluation[name].astype(float) for name in program.Evaluation._fields[:4]}
        evaluated = np.isfinite(evaluation["episode_return_mean"])
        leaves = members.names(self.who.hparams)
        tail = max(1, rows // 10)
        columns: dict[str, list[Any]] = {
            "member": list(range(self.num)),
            "seed": self.who.seeds.tolist(),
            **{name: exact(leaves[name]) for name in self.who.swept},
            **{
                name: [
                    float(value) if known else None for value, known in zip(values, evaluated, strict=True)
                ]
                for name, values in evaluation.items()
            },
            "num_episodes": [self.record["eval_episodes"] if known else None for known in evaluated],
            "train_return": _mean_of_rows(results.history[-tail:]).tolist(),
            "env_steps": np.where(failed, frozen_at, ended).tolist(),
            "status": [
                "frozen" if is_failed else "stopped" if stopped >= 0 else "ok"
                for is_failed, stopped in zip(failed, results.stopped_at, strict=True)
            ],
            "frozen_at": [
                int(at) if is_failed else None for at, is_failed in zip(frozen_at, failed, strict=True)
            ],
            "frozen_why": [results.reasons.get(member) for member in range(self.num)],
        }
        if results.population:
            columns[tables.LINEAGE] = results.lineages(np.concatenate([[0], steps[:-1]]))
        return tables.Table(columns, steps, results.history.T, self.who.swept)

    def best_setting(self) -> dict[str, Any] | None:
        """Return the swept values with the highest interquartile mean over seeds of the final return."""
        final = self.table().final_returns
        settings = sorted(set(self.who.settings))
        scores = np.array([_iqm(final[self.who.settings == setting]) for setting in settings])
        if not np.isfinite(scores).any():
            return None
        winner = settings[int(search_best(scores, 1)[0])]
        first = int(np.flatnonzero(self.who.settings == winner)[0])
        leaves = members.names(self.who.hparams)
        values = {name: exact(leaves[name])[first] for name in self.who.swept}
        return {"hparams": values, "return_iqm": float(np.nanmax(scores))}


def _stacked(state: PyTree, n: int) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Streams:
    """The keys of all members."""

    key: jax.Array


class _Position(NamedTuple):
    """Where training goes on: algorithm steps of the members ``order`` of a chunk, their states in slots."""

    chunk: int
    step: int
    order: np.ndarray
    states: Any


def _numbers(*values: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.int32(value) for value in values)


def _reason(report: program.Report, i: int, latest: Mapping[str, np.ndarray], member: int) -> str:
    """Say what was not finite, and what it was before: one step, or on average in the chunk before."""
    parts = []
    for name, values in sorted(report.at_failure.items(), key=lambda item: "loss" not in item[0]):
        if np.isfinite(values[i]):
            continue
        before = report.before_failure[name][i]
        if not np.isfinite(before) and name in latest:
            before = latest[name][member]
        parts.append(f"{name} {values[i]:g}" + (f" after {before:.4g}" if np.isfinite(before) else ""))
    return ", ".join(parts[:3]) or "a parameter is not finite"


def _mean_of_rows(rows: np.ndarray) -> np.ndarray:
    count = np.isfinite(rows).sum(0)
    return np.where(count > 0, np.nansum(rows, 0, dtype=float) / np.maximum(count, 1), np.nan)


def _score(rows: np.ndarray) -> float:
    """Return the interquartile mean over members (axis 1) of their mean return; NaN if any has none."""
    means = _mean_of_rows(rows)
    return _iqm(means)


def _iqm(values: np.ndarray) -> float:
    return math.nan if np.isnan(values).any() else float(statistics.fractional_interquartile_mean(values))
