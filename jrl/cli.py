"""The ``jrl`` command. jax is imported by the commands that need it, after its settings are in place.

Exit codes: 0 done; 2 bad input or a run folder or checkpoint that cannot be used; 3 NaN in training; 130
interrupted (the run can be resumed).
"""

from __future__ import annotations

import dataclasses
import io
import os
import select
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from jrl import _ALGORITHMS, __version__, records, xla
from jrl.progress import say, silence
from jrl.records import RunWarning

HELP = """\
usage: jrl COMMAND ...

  train ALGORITHM --env ID   train, evaluate and plot; `jrl train ppo --help` lists every setting
  resume RUN                 continue an interrupted run to its end; --env-steps extends it
  sweep ALGORITHM --env ID   seeds and hyperparameters side by side; `jrl sweep ppo --help` lists every setting
  plan ALGORITHM --env ID    what a sweep would take in memory and time, without running it
  pretrain --corpus FILE     train a language model on a text; `jrl pretrain --help` lists every setting
  generate MODEL             continue a prompt with one
  distill MODEL              train a smaller one to say what it says
  eval RUN                   play episodes with a run's policy
  plot RUN [RUN ...]         draw learning curves into one PNG
  inspect RUN                draw a run's values and advantages along an episode, and on a grid
  compare A B [...]          statistics of sweeps or runs side by side, with intervals and figures
  envs                       list environments
  algos                      list algorithms
  bench WHAT                 how fast the parts and the whole are here; `jrl bench --help` lists what
  doctor                     versions, devices and settings, and what is wrong with them

`jrl COMMAND --help` says more. --debug (or JRL_DEBUG=1) shows tracebacks; --version the version.
--quick-compile compiles in about half the processor time, for short runs on a CPU, best with --kernels native.
JRL_COMPILATION_CACHE=off switches off the cache of compiled programs, =FOLDER moves it.
"""

QUICK = "--quick-compile"
"""Of every command, since it has to be known before jax is imported (:func:`jrl.xla.configure`)."""

BENCH_HELP = """\
usage: jrl bench WHAT [WHAT ...] [--algo ppo|dqn] [--env ID] [--num-envs N ...] [--json FILE] [--plot FILE] [...]

  env        environment steps with random actions, resets included
  policy     the network forward and drawing actions
  update     gradient steps alone
  train      whole calls of algo.step
  sweep      whole calls of algo.step, seeds side by side (--members N ...)
  replay     adding to and sampling from a replay, over its capacity
  memory     bytes the training program and the process take
  compile    seconds of lowering and compiling, cold and with the persistent cache
  all        all of these

`jrl bench train --algo dqn --help` lists every setting.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors of input become one line on standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    _configure(args, os.environ)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # γ and ± must not end a run on an ASCII terminal
    enable_compilation_cache(os.environ)
    debug = "--debug" in args or os.environ.get("JRL_DEBUG", "0") not in ("", "0")
    args = [arg for arg in args if arg not in ("--debug", QUICK)]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", RunWarning)
            code = _command(args)
            sys.stdout.flush()  # here, where a reader that has gone is no error; not when Python ends
            return code
    except KeyboardInterrupt:
        return _complain("aborted; checkpoints that were saved are intact.", code=130)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            return 0  # `jrl envs | head`: the reader has what it wanted. (Training goes on: see jrl.progress.say.)
        if debug:
            traceback.print_exc()
        return _complain(str(error) or repr(error), code=3 if isinstance(error, FloatingPointError) else 2)


def _command(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        print(f"jrl {__version__}")
        return 0
    if args[0] not in COMMANDS:
        return _complain(f"there is no command {args[0]!r}. Commands: {', '.join(COMMANDS)}; see jrl --help.")
    try:
        return COMMANDS[args[0]](args[1:])
    except SystemExit:  # so ends what only prints a help
        sys.stdout.flush()
        raise


def enable_compilation_cache(environ: MutableMapping[str, str]) -> None:
    """Set JAX's persistent compilation cache in the environment, unless it is switched off or set already."""
    choice = environ.get("JRL_COMPILATION_CACHE", "")
    if choice.lower() in ("off", "0", "no", "false") or "JAX_COMPILATION_CACHE_DIR" in environ:
        return
    default = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jrl" / "xla"
    folder = Path(choice) if choice else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home: compile each time; jrl doctor says that the cache is off
    environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def _configure(args: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Put XLA's settings in place: for a sweep on a CPU each core is a device, unless ``--devices`` says otherwise.

    What goes on with a run or looks at it compiles as the run did; what begins one, over an earlier one too, as it is
    told to.
    """
    begins = (
        bool(args) and args[0] in ("train", "pretrain", "distill", "sweep", "plan") and "--resume" not in args
    )
    named = () if begins else (arg.rpartition("=")[2] for arg in args[1:])
    quick = QUICK in args or any(records.compiled_quickly(Path(arg)) for arg in named)
    sweeps = bool(args) and args[0] in ("sweep", "plan")
    sweeps |= bool(args) and args[0] == "resume" and any(_is_sweep(Path(arg)) for arg in args[1:])
    if not sweeps:  # nor is any network but jrl's own vmapped
        xla.configure(environ, vmapped=False, quick_compile=quick)
        return
    num_devices = 1 if "--distributed" in args else xla.cores()
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        name, _, joined = flag.partition("=")
        if name == "--devices" and (text := joined or value).isdecimal() and int(text) > 0:
            num_devices = int(text)
    xla.configure(environ, num_devices=num_devices, vmapped=False, quick_compile=quick)


def _is_sweep(path: Path) -> bool:
    try:
        return (path / records.SWEEP).exists() or (path / records.GROUPS).exists()
    except OSError:
        return False  # a name that is too long, say: the command that reads it says what is wrong


def _has_no_reader(stream: TextIO) -> bool:
    """Tell whether nobody can read any more what a stream is given, and drop what it still holds then."""
    try:
        stream.flush()
        gone = select.poll()
        gone.register(stream, 0)  # with PYTHONUNBUFFERED it holds nothing, and there is nothing to fail
        broken = any(event & select.POLLERR for _, event in gone.poll(0))
    except BrokenPipeError:
        broken = True
    except (AttributeError, OSError, ValueError):  # Windows, and what is no file of the system
        broken = False
    if broken:
        silence(stream)
    return broken


def _complain(text: str, code: int = 2) -> int:
    _has_no_reader(sys.stdout)  # what was printed before comes first
    say(f"error: {text}", sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
        return
    say(f"warning: {message}", sys.stderr)


# ------------------------------------------------------------------------------------------------- train


def train(args: Sequence[str]) -> int:
    """``jrl train ALGORITHM --env ID ...``."""
    if not args or args[0].startswith("-"):
        print(
            "usage: jrl train ALGORITHM --env ID [--env-steps N] [--seed N] [--out FOLDER] [...]\n\n"
            f"ALGORITHM is {' or '.join(_ALGORITHMS)}. `jrl train ppo --help` lists every setting of "
            "PPO with its default."
        )
        return 0 if args and args[0] in ("-h", "--help") else 2
    from jrl import configuration, flags

    algorithm = args[0]
    module = configuration.load(algorithm)
    options, env_kwargs, config, numbers = flags.parse(
        f"jrl train {algorithm}", flags.Options, module, args[1:]
    )
    hparams = module.HParams(**numbers)
    if options.env_param:
        from jrl.envs import make

        params = make(options.env, **env_kwargs).params
        changed = configuration.override_params(params, flags.pairs(options.env_param, "--env-param"))
        hparams = dataclasses.replace(hparams, env=changed)

    from jrl import driver, loggers

    out = options.out or _free_folder(f"{options.env}-{algorithm}-{options.seed}")
    chosen: list[loggers.Logger] = []
    if options.tensorboard:
        chosen.append(loggers.TensorBoardLogger(out / "tensorboard"))
    if options.wandb:
        chosen.append(loggers.WandbLogger(out, project=options.wandb_project, mode=options.wandb_mode))
    result = driver.run(
        algorithm,
        options.env,
        config=module.Config(**config),
        hparams=hparams,
        env_steps=options.env_steps,
        seed=options.seed,
        out=out,
        env_kwargs=env_kwargs,
        prng=options.prng,
        eval_episodes=options.eval_episodes,
        checkpoint_every=options.checkpoint_every,
        checkpoint_seconds=options.checkpoint_seconds,
        keep=options.keep,
        loggers=chosen,
        progress=None if options.progress == "auto" else options.progress,
        overwrite=options.overwrite,
    )
    return 130 if result.interrupted else 0


def sweep(args: Sequence[str]) -> int:
    """``jrl sweep ALGORITHM --env ID ...``."""
    return _of_algorithm("sweep", args, lambda command, rest: command.sweep(rest[0], rest[1:], _free_folder))


def plan(args: Sequence[str]) -> int:
    """``jrl plan ALGORITHM --env ID ...``."""
    return _of_algorithm("plan", args, lambda command, rest: command.plan(rest[0], rest[1:]))


def _of_algorithm(name: str, args: Sequence[str], call: Callable[[Any, Sequence[str]], int]) -> int:
    if not args or args[0].startswith("-"):
        print(
            f"usage: jrl {name} ALGORITHM --env ID [--seeds N] [--grid NAME=NUMBER,...] [--random N --space "
            f"NAME=KIND:LOW:HIGH] [...]\n\nALGORITHM is {' or '.join(_ALGORITHMS)}. `jrl {name} ppo --help` lists "
            "every setting with its default."
        )
        return 0 if args and args[0] in ("-h", "--help") else 2
    from jrl.sweep import command

    return call(command, args)


def _free_folder(name: str) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    folder, number = Path("runs") / name, 2
    while folder.exists() and any(folder.iterdir()):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def pretrain(args: Sequence[str]) -> int:
    """``jrl pretrain --corpus FILE ...``."""
    from jrl.language import commands

    return commands.pretrain(args, _free_folder)


def distill(args: Sequence[str]) -> int:
    """``jrl distill MODEL --student-config JSON ...``."""
    from jrl.language import commands

    return commands.distill(args, _free_folder)


def generate(args: Sequence[str]) -> int:
    """``jrl generate MODEL --prompt TEXT ...``."""
    from jrl.language import commands

    return commands.generate(args)


# ------------------------------------------------------------------------------------------ other commands


def resume(args: Sequence[str]) -> int:
    """``jrl resume RUN``."""

    def command(
        path: Path,
        env_steps: int | None = None,
        progress: Literal["auto", "bar", "lines", "none"] = "auto",
    ) -> int:
        """Continue a run from its newest checkpoint to its end, as if it had never stopped.

        Args:
            path: run folder.
            env_steps: a new, larger total of environment steps (of a language model: tokens).
            progress: auto: a bar on a terminal, lines elsewhere.
        """
        if _is_sweep(path):
            return _resume_sweep(path, env_steps, progress)
        shown = None if progress == "auto" else progress
        if _is_language_model(path):
            from jrl.language import runs

            result = runs.resume(path, env_steps, shown)
        else:
            from jrl import driver

            result = driver.resume(path, env_steps, progress=shown)
        if result.already_finished:
            steps, unit = result.summary["env_steps"], result.summary.get("unit", "env steps")
            again = f"jrl resume {shlex.quote(str(path))} --env-steps N"
            print(f"{path} is already finished: {steps:,} {unit}. Extend it: {again}")
        return 130 if result.interrupted else 0

    return _run("resume", command, args)


def _is_language_model(path: Path) -> bool:
    """Tell by ``run.json``; what is no run folder is none, and those who read it say so."""
    return (path / records.RUN).exists() and "corpus" in records.read_run(path)


def _resume_sweep(path: Path, env_steps: int | None, progress: str) -> int:
    if env_steps is not None:
        raise ValueError(f"--env-steps {env_steps}: a sweep cannot be extended; start a new one.")
    from jrl.sweep import command

    return command.resume(path, progress)


def evaluate(args: Sequence[str]) -> int:
    """``jrl eval RUN``."""

    def command(
        path: Path,
        episodes: int = 100,
        sample: bool = False,
        seed: int | None = None,
        step: int | None = None,
        member: int | None = None,
    ) -> int:
        """Play episodes with the policy of a run, or of a member of a sweep, on environments of their own.

        Of a language model: the loss on its validation text, for which there are no episodes to choose.

        Args:
            path: run folder, or a sweep's.
            episodes: how many, exactly.
            sample: draw actions as in training, instead of taking the most probable one.
            seed: of the episodes; the run's own by default, which repeats its final evaluation.
            step: the checkpoint, by the number of its folder; the newest by default.
            member: of a sweep, by its number in table.csv.
        """
        from jrl import driver, progress

        if not 1 <= episodes < 2**31:
            raise ValueError(f"--episodes {episodes}: must be at least 1 and below 2**31.")
        if _is_language_model(path):
            from jrl.language import runs

            chosen = {
                "--episodes": episodes != 100,
                "--sample": sample,
                "--seed": seed is not None,
                "--member": member is not None,
            }
            if given := [flag for flag, is_given in chosen.items() if is_given]:
                raise ValueError(
                    f"{', '.join(given)}: {path} is a run of a language model, which is evaluated by the loss on its "
                    f"validation text and plays no episodes; leave {given[0]} out."
                )
            print(progress.evaluation_line(runs.evaluate(path, step)))
            return 0
        evaluation = driver.evaluate(
            path, num_episodes=episodes, greedy=not sample, seed=seed, step=step, member=member
        )
        print(progress.evaluation_line(evaluation))
        return 0

    return _run("eval", command, args)


def plot(args: Sequence[str]) -> int:
    """``jrl plot RUN [RUN ...]``."""

    def command(paths: tuple[Path, ...], out: Path | None = None, title: str | None = None) -> int:
        """Draw the learning curves of one or more runs on the same axes.

        Args:
            paths: run folders.
            out: file, or folder for it; by default learning_curve.png in the run folder, for several runs
                learning_curves.png here.
            title: above the axes.
        """
        from jrl import plots, records

        if not paths:
            raise ValueError("jrl plot needs at least one run folder: jrl plot runs/cartpole")
        default = paths[0] / records.CURVE if len(paths) == 1 else Path("learning_curves.png")
        file = out or default
        if file.is_dir():
            file = file / default.name
        elif not file.suffix:
            file = file.with_name(f"{file.name}.png")
        plots.learning_curve(paths, out=file, title=title)
        print(file)
        return 0

    return _run("plot", command, args)


def inspect(args: Sequence[str]) -> int:
    """``jrl inspect RUN``."""

    def command(path: Path, steps: int = 200, seed: int = 0, step: int | None = None) -> int:
        """Draw what a run's policy expects: values and advantages along an episode, and on a grid.

        Args:
            path: run folder; the figures are written into it.
            steps: of the episode.
            seed: of the episode.
            step: the checkpoint, by the number of its folder; the newest by default.
        """
        from jrl import inspection_plots

        if not 1 <= steps < 2**31:
            raise ValueError(f"--steps {steps}: must be at least 1 and below 2**31.")
        for file in inspection_plots.inspect(path, num_steps=steps, seed=seed, step=step):
            print(file)
        return 0

    return _run("inspect", command, args)


def compare(args: Sequence[str]) -> int:
    """``jrl compare A B [...]``."""

    def command(
        paths: tuple[Path, ...], out: Path | None = None, best: bool = False, target: float | None = None
    ) -> int:
        """Print statistics of final returns side by side, and draw them.

        Args:
            paths: folders of sweeps (with table.csv) or of finished runs; the first is the one compared with.
            out: folder for the figures; none are drawn if it is not given.
            best: of each sweep only the setting whose interquartile mean is best. It was chosen by the same
                seeds, so that its mean is somewhat too good.
            target: return that the optimality gap is measured from; the best of any member by default.
        """
        if len(paths) < 2:
            raise ValueError("jrl compare needs at least two folders: jrl compare sweeps/ppo sweeps/dqn")
        from jrl import sweep_report, tables

        read = [tables.read(path) for path in paths]
        names = [path.resolve().name for path in paths]
        labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
        _warn_of_other_measures(read, paths)
        if best:
            chosen = [tables.best(table) for table in read]
            read = [table for _, table in chosen]
            labels = [
                f"{label}, {tables.setting(values)}" if values else label
                for label, (values, _) in zip(labels, chosen, strict=True)
            ]
        sweep_report.show(sweep_report.compare(read, labels, target=target))
        if out is not None:
            from jrl import sweep_plots

            for file in sweep_plots.compared_figures(read, labels, out, target=target):
                print(file)
        return 0

    return _run("compare", command, args)


def _warn_of_other_measures(read: Sequence[Any], paths: Sequence[Path]) -> None:
    """Say where returns are not of the same kind, so that their difference means something else."""
    without = [
        str(path) for table, path in zip(read, paths, strict=True) if table.num_scored and not table.evaluated
    ]
    if 0 < len(without) < len(read):
        warnings.warn(
            f"{', '.join(without)} has no final evaluation: its training return is compared with the evaluation "
            "of the others.",
            RunWarning,
            stacklevel=2,
        )
    names = dict.fromkeys(filter(None, map(records.environment_name, paths)))
    if len(names) > 1:
        warnings.warn(
            f"the folders are of different environments ({', '.join(names)}): their returns have no common unit.",
            RunWarning,
            stacklevel=2,
        )


def envs(args: Sequence[str]) -> int:
    """``jrl envs``."""

    def command() -> int:
        """List the environments that need no download, with what they show and take."""
        from jrl import doctor

        doctor.print_envs()
        return 0

    return _run("envs", command, args)


def algos(args: Sequence[str]) -> int:
    """``jrl algos``."""

    def command() -> int:
        """List the algorithms."""
        from jrl import doctor

        doctor.print_algos()
        return 0

    return _run("algos", command, args)


def bench(args: Sequence[str]) -> int:
    """``jrl bench WHAT ...``."""
    if not args or args[0].startswith("-"):
        print(BENCH_HELP, end="")
        return 0 if args and args[0] in ("-h", "--help") else 2
    from jrl.bench import command

    return command.main(args)


def doctor(args: Sequence[str]) -> int:
    """``jrl doctor``."""

    def command() -> int:
        """Print versions, devices, precision, cache and memory, and what is wrong with them."""
        from jrl import doctor

        doctor.print_report()
        return 0

    return _run("doctor", command, args)


def _run(name: str, command: Callable[..., int], args: Sequence[str]) -> int:
    import tyro

    # a function's `path` without a default is positional: jrl resume runs/cartpole
    return tyro.cli(command, prog=f"jrl {name}", args=list(args), config=(tyro.conf.PositionalRequiredArgs,))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sweep": sweep,
    "plan": plan,
    "resume": resume,
    "eval": evaluate,
    "pretrain": pretrain,
    "generate": generate,
    "distill": distill,
    "plot": plot,
    "inspect": inspect,
    "compare": compare,
    "envs": envs,
    "algos": algos,
    "bench": bench,
    "doctor": doctor,
}
