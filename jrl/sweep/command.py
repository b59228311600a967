"""``jrl sweep`` and ``jrl plan``."""

from __future__ import annotations

import dataclasses
import shlex
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
    """Settings drawn at random from the spaces, equal ones once (each with every combination of the grid)."""
    space: tuple[str, ...] = ()
    """NAME=KIND:NUMBER:NUMBER with uniform, loguniform, normal or choice, as in gamma=uniform:0.9:0.999; repeatable."""
    search_seed: int = 0
    """The random settings follow from it."""
    halving: bool = False
    """Stop the worst settings early: successive halving."""
    eta: float = 3.0
    """With halving: the factor by which settings get fewer at each rung."""
    rungs: int = 0
    """With halving: rungs, the end of the run among them; 0 for as many as leave one setting. With fewer the first
    decision is later, and several settings are trained to the end."""
    min_env_steps: int = 0
    """With halving: environment steps of a member before which nothing is stopped; where episodes last until a time
    limit at first, take at least twice the limit times num_envs, or the first rung compares nothing but luck."""
    pbt: bool = False
    """Replace the worst members by changed copies of the best ones: population-based training."""
    pbt_interval: int = 0
    """With pbt: environment steps of a member between two rounds; 0 for a twentieth of env_steps."""
    explore: tuple[str, ...] = ()
    """With pbt: NAME=LOW:HIGH, a hyperparameter that changes and its bounds; repeatable. By default those of
    --space, where uniform or loguniform."""
    static_grid: tuple[str, ...] = ()
    """NAME=JSON,JSON,..., values of a field of Config: one compilation and one sub-folder each, and one table of all;
    repeatable."""
    out: Path | None = None
    """Folder, new or empty. Default: runs/ENV-ALGORITHM-sweep, numbered if taken."""
    env_param: tuple[str, ...] = ()
    """NAME=NUMBER, a parameter of the environment for all members; repeatable."""
    env_kwarg: tuple[str, ...] = ()
    """NAME=JSON, an argument of the environment's constructor (static); repeatable."""
    prng: Literal["threefry", "hashed"] = "threefry"
    """Random number generator: JAX's own, or a cheap one, quicker to compile (jrl.ops.hashed)."""
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
    settings |= {"out": options.out or free_folder(f"{options.env}-{algorithm}-sweep")}
    settings |= {"overwrite": options.overwrite, "resume": options.resume}
    if options.static_grid:
        return _sweep_groups(algorithm, options, settings, args)
    from jrl.sweep import runner

    return _end(runner.execute(algorithm, **settings), settings["out"])


def resume(path: Path, progress: str) -> int:
    """``jrl resume`` of a sweep's folder, or of one with a sweep for each of several static choices."""
    from jrl import records
    from jrl.sweep import runner

    shown = None if progress == "auto" else progress
    if not (path / records.GROUPS).exists():
        return _end(runner.resume(path, progress=shown), path)
    command = records.read_groups(path)["command"]
    if not command:
        raise RunError(
            f"the sweeps in {path} were begun from Python: go on with the same call of jrl.sweep.run and resume=True."
        )
    options, settings = _parse("sweep", command[0], command[1:])
    settings |= {"out": path, "resume": True, "progress": shown}
    return _sweep_groups(command[0], options, settings, command[1:])


def plan(algorithm: str, args: Sequence[str]) -> int:
    """``jrl plan ALGORITHM --env ID ...``."""
    options, settings = _parse("plan", algorithm, args)
    from jrl.sweep import groups, runner

    for fields in groups.combinations(algorithm, _static_grid(options)):
        if fields:
            print(_named(fields))
        print(runner.plan(algorithm, **{**settings, "config": {**settings["config"], **fields}}))
    return 0


def _sweep_groups(algorithm: str, options: Options, settings: dict[str, Any], args: Sequence[str]) -> int:
    from jrl import sweep_report
    from jrl.sweep import groups, processes

    found, table = groups.execute(
        algorithm, static_grid=_static_grid(options), command=[algorithm, *args], **settings
    )
    interrupted = found[-1].finished.interrupted
    if processes.is_first():
        for fields, finished in found:
            print(_named(fields))
            _report(finished)
        if interrupted:
            print(f"interrupted  continue with: jrl resume {shlex.quote(str(settings['out']))}")
        else:
            sweep_report.show(sweep_report.render(table))
            print(f"all sweeps   {settings['out']}")
    return 130 if interrupted else 0


def _end(finished: Any, out: Path) -> int:
    from jrl import sweep_report
    from jrl.sweep import processes

    if processes.is_first():
        if not finished.interrupted:
            sweep_report.show(sweep_report.render(finished.table))
        _report(finished)
        if finished.interrupted:
            print(f"interrupted  continue with: jrl resume {shlex.quote(str(out))}")
    return 130 if finished.interrupted else 0


def _parse(command: str, algorithm: str, args: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """Return the flags, and the arguments of :func:`jrl.sweep.execute` that follow from them."""
    from jrl import configuration
    from jrl.sweep import processes

    module = configuration.load(algorithm)
    options, env_kwargs, config, numbers = flags.parse(f"jrl {command} {algorithm}", Options, module, args)
    joining = (options.coordinator, options.num_processes, options.process_id)
    if options.distributed:
        processes.initialize(*joining)
    elif any(value is not None for value in joining):
        raise RunError(
            "--coordinator, --num-processes and --process-id are of several processes; add --distributed."
        )
    hparams = module.HParams(**numbers)
    if options.env_param:
        from jrl.envs import make

        params = make(options.env, **env_kwargs).params
        changed = configuration.override_params(params, flags.pairs(options.env_param, "--env-param"))
        hparams = dataclasses.replace(hparams, env=changed)

    import jax

    from jrl.sweep import spaces

    devices = jax.devices()
    if options.devices < 0 or (options.devices > len(devices) and not options.distributed):
        raise RunError(f"--devices {options.devices}: there are {len(devices)}; 0 is for all.")
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
        "prng": options.prng,
        "env_steps": options.env_steps,
        "seeds": options.seeds,
        "grid": grid,
        "random": random,
        "num_random": options.random,
        "search_seed": options.search_seed,
        "halving": _halving(options),
        "pbt": _pbt(options, random),
        "eval_episodes": options.eval_episodes,
        # of several processes each brings its own
        "devices": devices if options.distributed else devices[: options.devices or None],
        "width": int(options.side_by_side) if options.side_by_side.isdecimal() else options.side_by_side,
        "chunk": options.chunk,
        "checkpoint_seconds": options.checkpoint_seconds,
        "progress": None if options.progress == "auto" else options.progress,
    }


def _halving(options: Options) -> Any:
    """Return what the flags say of successive halving; None where they do not ask for it."""
    from jrl.sweep import search

    if not options.halving:
        if options.eta != Options.eta or options.rungs or options.min_env_steps:
            raise RunError("--eta, --rungs and --min-env-steps are of successive halving; add --halving.")
        return None
    return search.Halving(options.eta, options.rungs or None, options.min_env_steps)


def _pbt(options: Options, random: dict[str, Any]) -> Any:
    """Return what the flags say of population-based training; None where they do not ask for it."""
    from jrl.sweep import search

    explore = {}
    for name, text in flags.pairs(options.explore, "--explore").items():
        low, _, high = text.partition(":")
        where = f"--explore {name}={text}"
        explore[name] = (_number(low, where, "LOW:HIGH"), _number(high, where, "LOW:HIGH"))
    if not options.pbt:
        if explore or options.pbt_interval:
            raise RunError("--explore and --pbt-interval are of population-based training; add --pbt.")
        return None
    bounds = {name: (space.low, space.high) for name, space in random.items() if hasattr(space, "low")}
    if not (explore or bounds):
        raise RunError(
            "--pbt: no hyperparameter to change; give --explore NAME=LOW:HIGH, or draw with --random and --space."
        )
    return search.PBT(
        explore or bounds,
        interval=options.pbt_interval or max(1, options.env_steps // 20),
        seed=options.search_seed,
    )


def _number(text: str, flag: str, form: str = "NUMBER,NUMBER,...") -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RunError(f"{flag}: {text!r} is not a number; give NAME={form}") from error


def _static_grid(options: Options) -> dict[str, list[Any]]:
    items = flags.pairs(options.static_grid, "--static-grid")
    return {
        name: [flags.json_value(part) for part in flags.split_values(text)] for name, text in items.items()
    }


def _named(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _report(finished: Any) -> None:
    from jrl.doctor import readable_size
    from jrl.progress import readable_duration

    summary = finished.summary
    print(
        f"training     {summary['env_steps']:,} env steps in {readable_duration(summary['train_seconds'])} "
        f"({summary['env_steps_per_second']:,.0f} steps/s), after {finished.plan.compile_seconds:.1f} s of compiling"
    )
    taken = summary["training_bytes"]
    print(
        f"memory       {readable_size(finished.plan.bytes_total)} planned"
        + (f", {readable_size(taken)} taken by training (this process)" if taken else "")
    )
    if finished.out is not None:
        print(f"sweep folder {finished.out}")
