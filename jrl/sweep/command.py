"""``jrl sweep`` and ``jrl plan``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jrl import flags
from jrl.records import RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """The sweep, beside the algorithm's own settings."""

    env: str
    """Environment id; `jrl envs` lists them."""
    env_steps: int = 500_000
    """Environment steps of each member, warm-up included."""
    seeds: int = 1
    """Seeds of each setting, counted from 0."""
    grid: tuple[str, ...] = ()
    """NAME=NUMBER,NUMBER,..., values of a hyperparameter (or env.NAME); every combination is a setting; repeatable."""
    random: int = 0
    """Settings drawn at random from the spaces (each with every combination of the grid)."""
    space: tuple[str, ...] = ()
    """NAME=KIND:NUMBER:NUMBER with uniform, loguniform, normal or choice, as in gamma=uniform:0.9:0.999; repeatable."""
    search_seed: int = 0
    """The random settings follow from it."""
    halving: bool = False
    """Stop the worst settings early: successive halving."""
    eta: float = 3.0
    """With halving: the factor by which settings get fewer at each rung."""
    static_grid: tuple[str, ...] = ()
    """NAME=JSON,JSON,..., values of a field of Config: one compilation and one sub-folder each; repeatable."""
    out: Path | None = None
    """Folder, new or empty. Default: runs/ENV-ALGORITHM-sweep, numbered if taken."""
    env_param: tuple[str, ...] = ()
    """NAME=NUMBER, a parameter of the environment for all members; repeatable."""
    env_kwarg: tuple[str, ...] = ()
    """NAME=JSON, an argument of the environment's constructor (static); repeatable."""
    eval_episodes: int = 100
    """Episodes of each member's final evaluation; 0 leaves it out."""
    devices: int = 0
    """Devices to shard members over; 0 for all: every accelerator, or every core of a CPU.
    With distributed: of this process, by default one on a CPU."""
    side_by_side: str = "auto"
    """Members side by side on a device: a number, all, or auto (1 on a CPU, all on an accelerator)."""
    chunk: int | None = None
    """Members in memory at once; by default as many as fit."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    distributed: bool = False
    """This is one of several processes, perhaps on other hosts; all are started with the same command. What the
    three flags below leave out is found from SLURM, Open MPI or Kubernetes."""
    coordinator: str | None = None
    """With distributed: HOST:PORT where the first process listens."""
    num_processes: int | None = None
    """With distributed: how many there are."""
    process_id: int | None = None
    """With distributed: which one this is, counted from 0."""
    overwrite: bool = False
    """Replace a sweep that is already in the folder."""
    resume: bool = False
    """Go on with the sweep in the folder, if there is one; it must be the same."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a bar on a terminal, lines elsewhere."""


def sweep(algorithm: str, args: Sequence[str], free_folder: Any) -> int:
    """``jrl sweep ALGORITHM --env ID ...``."""
    options, settings = _parse("sweep", algorithm, args)
    from jrl.sweep import processes, runner

    out = options.out or free_folder(f"{options.env}-{algorithm}-sweep")
    settings |= {"overwrite": options.overwrite, "resume": options.resume}
    interrupted = False
    found = []
    for fields in _static_combinations(algorithm, options.static_grid):
        where = out / "-".join(f"{name}={value}" for name, value in fields.items()) if fields else out
        finished = runner.execute(
            algorithm, out=where, **{**settings, "config": {**settings["config"], **fields}}
        )
        interrupted |= finished.interrupted
        found.append((fields, finished))
        if interrupted:
            break
    if not processes.is_first():
        return 130 if interrupted else 0
    for fields, finished in found:
        _report(fields, finished)
    if interrupted:
        again = out if len(found) == 1 else f"(one by one, below) {out}"
        print(f"interrupted  continue with: jrl resume {again}")
    return 130 if interrupted else 0


def resume(path: Path, progress: str) -> int:
    """``jrl resume`` of a sweep's folder."""
    from jrl.sweep import runner

    finished = runner.resume(path, progress=None if progress == "auto" else progress)
    _report({}, finished)
    if finished.interrupted:
        print(f"interrupted  continue with: jrl resume {path}")
    return 130 if finished.interrupted else 0


def plan(algorithm: str, args: Sequence[str]) -> int:
    """``jrl plan ALGORITHM --env ID ...``."""
    options, settings = _parse("plan", algorithm, args)
    from jrl.sweep import runner

    for fields in _static_combinations(algorithm, options.static_grid):
        if fields:
            print(", ".join(f"{name}={value}" for name, value in fields.items()))
        print(runner.plan(algorithm, **{**settings, "config": {**settings["config"], **fields}}))
    return 0


def _parse(command: str, algorithm: str, args: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """Return the flags, and the arguments of :func:`jrl.sweep.execute` that follow from them."""
    from jrl import configuration
    from jrl.sweep import processes

    module = configuration.load(algorithm)
    options, env_kwargs, config, numbers = flags.parse(f"jrl {command} {algorithm}", Options, module, args)
    if options.distributed:
        processes.initialize(options.coordinator, options.num_processes, options.process_id)
    hparams = module.HParams(**numbers)
    if options.env_param:
        from jrl.envs import make

        params = make(options.env, **env_kwargs).params
        changed = configuration.override_params(params, flags.pairs(options.env_param, "--env-param"))
        hparams = dataclasses.replace(hparams, env=changed)

    import jax

    from jrl.sweep import search, spaces

    devices = jax.devices()
    if options.devices > len(devices) and not options.distributed:
        raise RunError(f"--devices {options.devices}: there are {len(devices)}.")
    if not options.side_by_side.isdecimal() and options.side_by_side not in ("auto", "all"):
        raise RunError(f"--side-by-side {options.side_by_side}: expected a number, all or auto.")
    grid = {
        name: [_number(part, f"--grid {name}={text}") for part in text.split(",")]
        for name, text in flags.pairs(options.grid, "--grid").items()
    }
    random = {name: spaces.parse(text) for name, text in flags.pairs(options.space, "--space").items()}
    return options, {
        "hparams": hparams,
        "env": options.env,
        "config": config,
        "env_kwargs": env_kwargs,
        "env_steps": options.env_steps,
        "seeds": options.seeds,
        "grid": grid,
        "random": random,
        "num_random": options.random,
        "search_seed": options.search_seed,
        "halving": search.Halving(options.eta) if options.halving else None,
        "eval_episodes": options.eval_episodes,
        # of several processes each brings its own
        "devices": devices if options.distributed else devices[: options.devices or None],
        "width": int(options.side_by_side) if options.side_by_side.isdecimal() else options.side_by_side,
        "chunk": options.chunk,
        "checkpoint_seconds": options.checkpoint_seconds,
        "progress": None if options.progress == "auto" else options.progress,
    }


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RunError(f"{flag}: {text!r} is not a number; give NAME=NUMBER,NUMBER,...") from error


def _static_combinations(algorithm: str, items: Sequence[str]) -> list[dict[str, Any]]:
    from jrl import configuration

    fields = [field.name for field in dataclasses.fields(configuration.load(algorithm).Config)]
    values = {}
    for name, text in flags.pairs(items, "--static-grid").items():
        if name not in fields:
            raise RunError(
                f"--static-grid {name}: Config has no such field. {configuration.nearest(name, fields)}Its fields "
                f"are: {', '.join(fields)}."
            )
        values[name] = [_hashable(flags.json_value(part)) for part in flags.split_values(text)]
    return [
        dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())
    ]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value


def _report(fields: dict[str, Any], finished: Any) -> None:
    from jrl import sweep_report
    from jrl.doctor import readable_size
    from jrl.progress import readable_duration

    if fields:
        print(", ".join(f"{name}={value}" for name, value in fields.items()))
    if not finished.interrupted:
        sweep_report.show(sweep_report.render(finished.table))
    summary = finished.summary
    print(
        f"training     {summary['env_steps']:,} env steps in {readable_duration(summary['train_seconds'])} "
        f"({summary['env_steps_per_second']:,.0f} steps/s), after {finished.plan.compile_seconds:.1f} s of compiling"
    )
    taken = readable_size(summary["training_bytes"])
    print(
        f"memory       {readable_size(finished.plan.bytes_total)} planned, {taken} taken by training (this process)"
    )
    if finished.out is not None:
        print(f"sweep folder {finished.out}")
