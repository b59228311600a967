"""A whole run from Python: :func:`run` trains, logs, checkpoints and evaluates; :func:`resume` goes on.

A thin layer over an :class:`~jrl.types.Algorithm`: everything that decides a number happens in the compiled
chunk of training and in :func:`jrl.evaluate`. One chunk is compiled for a run, its number of steps an
argument, so that the last (shorter) chunk and a resumed run are the very same program: bit for bit.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import shlex
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from jrl import checkpoint, configuration, doctor, loop, progress, records
from jrl import loggers as loggers_
from jrl.configuration import Setup
from jrl.interrupt import StopRequest
from jrl.records import CheckpointError, RunError, RunWarning
from jrl.saving import Start, restore
from jrl.types import Environment

NUM_CHUNKS = 200  # lines of metrics.jsonl that a run aims at ...
MAX_CHUNK = 2**18  # ... and the most environment steps one covers: Ctrl-C and checkpoints wait for its end


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves in memory.

    Attributes:
        state: the last state; ``algo.policy(state)`` plays it.
        summary: what ``summary.json`` holds.
        out: the run folder, or None.
        interrupted: True after Ctrl-C (or SIGTERM): the run can be resumed.
        already_finished: True where :func:`resume` found nothing left to do.
        algo: the algorithm.
        env: the environment.
        hparams: the hyperparameters, as arrays.
    """

    state: Any
    summary: dict[str, Any]
    out: Path | None
    interrupted: bool
    already_finished: bool
    algo: Any
    env: Environment
    hparams: Any


class Task(NamedTuple):
    """What differs in a run of a language model.

    Attributes:
        prepare: writes what the folder holds beside ``run.json``.
        evaluate: ``(state, stop) -> evaluation`` of the end, for ``summary.json``; None where it was stopped. Without
            it episodes are played.
        extra: a row of metrics -> what to add to it.
        summary: what to add to ``summary.json``.
    """

    prepare: Callable[[Path], None]
    evaluate: Callable[[Any, StopRequest], dict[str, Any] | None] | None
    extra: Callable[[dict[str, Any]], dict[str, Any]]
    summary: Mapping[str, Any]


def run(
    algorithm: Any,
    env: Any,
    *,
    config: Any = None,
    hparams: Any = None,
    env_steps: int,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    prng: str = "threefry",
    eval_episodes: int = 100,
    checkpoint_every: int | None = None,
    checkpoint_seconds: float | None = 60.0,
    keep: int = 3,
    loggers: Sequence[loggers_.Logger] = (),
    progress: str | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Train ``algorithm`` on ``env`` for ``env_steps`` environment steps, then evaluate it greedily.

    ::

        result = jrl.run("ppo", "CartPole-v1", env_steps=500_000, out="runs/cartpole")
        result.summary["evaluation"]["episode_return_mean"]

    Ctrl-C finishes the chunk in progress, saves, and returns with ``interrupted=True``; a second one raises
    KeyboardInterrupt at once, and what was saved stays.

    Args:
        algorithm: ``"ppo"``, ``"dqn"``, a module with ``make``, ``Config`` and ``HParams``, or an
            :class:`~jrl.types.Algorithm` (then with ``hparams``).
        env: an id, or what else :func:`jrl.make` takes.
        config: a ``Config``, a mapping of the fields to change, or None for the defaults.
        hparams: an ``HParams``, a mapping of the fields to change, or None for the defaults.
        env_steps: environment steps to train for, warm-up included; rounded up to whole algorithm steps.
        seed: everything random follows from it.
        out: run folder, new or empty; None writes no files.
        env_kwargs: keyword arguments for :func:`jrl.make`.
        prng: ``"threefry"``, JAX's own generator, or ``"hashed"``, a cheap one (:func:`jrl.ops.hashed`).
        eval_episodes: episodes of the final evaluation; 0 leaves it out.
        checkpoint_every: environment steps between two checkpoints; None saves by time only.
        checkpoint_seconds: seconds between two checkpoints (longer where saving is slow, so that it takes at
            most a twentieth of the time); None saves by steps only. The end of the run is always saved.
        keep: how many of the newest checkpoints stay.
        loggers: each is given the metrics of every chunk, beside ``metrics.jsonl``; closed at the end.
        progress: ``"bar"``, ``"lines"``, ``"none"``, or None for a bar on a terminal and lines elsewhere.
        overwrite: replace a run that is already in ``out``.

    Raises:
        RunError: (a ValueError) the run folder is in use, not writable or that of the model that the environment is
            made of, an unknown name or field, fewer ``env_steps`` than the warm-up takes. Raised before anything
            is computed, but for the last.
        NonFiniteError: a metric or a parameter became NaN or infinite; the last checkpoint is from before.
        ValueError, TypeError: what the algorithm or the environment refuses.
    """
    check_numbers(env_steps=env_steps, eval_episodes=eval_episodes, seed=seed, keep=keep)
    check_numbers(checkpoint_every=checkpoint_every, checkpoint_seconds=checkpoint_seconds)
    folder = None if out is None else Path(out)
    if folder is not None:
        records.check_new(folder, overwrite)
        records.check_not_needed(folder, (env_kwargs or {}).get("model"))
    setup = configuration.build(
        algorithm, env, config=config, hparams=hparams, env_kwargs=env_kwargs, prng=prng
    )
    record = {
        **configuration.to_json(setup),
        "env_steps": env_steps,
        "seed": seed,
        "eval_episodes": eval_episodes,
        "checkpoint_every": checkpoint_every,
        "checkpoint_seconds": checkpoint_seconds,
        "keep": keep,
    }
    return start_run(setup, record, folder, loggers, progress, _task(setup), overwrite)


def _task(setup: Setup) -> Task | None:
    """What a run on texts has beside that of any other environment."""
    if setup.module is None or not setup.module.startswith("jrl.language."):
        return None
    from jrl.language import runs  # imports this module

    return runs.text_task(setup)


def start_run(
    setup: Setup,
    record: Mapping[str, Any],
    folder: Path | None,
    loggers: Sequence[loggers_.Logger] = (),
    progress: str | None = None,
    task: Task | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Train from the beginning in a folder that :func:`jrl.records.check_new` has allowed, and write ``run.json``.

    Raises what :func:`run` raises in training.
    """
    record = {
        "format": records.FORMAT,
        "id": uuid.uuid4().hex[:12],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **record,
        "env_steps_per_step": setup.algo.env_steps_per_step,
        "chunk_length": chunk_length(record["env_steps"], setup.algo.env_steps_per_step),
        "loggers": [
            logger.spec(folder)
            for logger in loggers
            if isinstance(logger, loggers_.TensorBoardLogger | loggers_.WandbLogger)
        ],
        "versions": doctor.versions(),
        "device": doctor.device(),
    }
    with ExitStack() as stack:
        if folder is not None:
            records.create(folder)
            stack.enter_context(records.locked(folder))
            records.clear(folder, overwrite)
            if task is not None:
                task.prepare(folder)
            records.write_json(folder / records.RUN, record)
        try:
            return _train(setup, record, folder, None, loggers, progress, task)
        except BaseException:
            # Nothing learned yet, nothing to resume: the folder is free again for the corrected command.
            if folder is not None and not (folder / records.METRICS).exists():
                (folder / records.RUN).unlink(missing_ok=True)
            raise


def resume(
    path: str | os.PathLike,
    env_steps: int | None = None,
    *,
    algorithm: Any = None,
    env: Any = None,
    hparams: Any = None,
    loggers: Sequence[loggers_.Logger] | None = None,
    progress: str | None = None,
) -> RunResult:
    """Continue a run from its newest checkpoint to its end, as if it had never stopped: bit for bit.

    Lines of ``metrics.jsonl`` beyond the checkpoint are dropped and computed again. Without any checkpoint
    the run starts over. A finished run is left as it is, unless ``env_steps`` extends it.

    Args:
        path: the run folder.
        env_steps: a new total; None keeps that of the run.
        algorithm: for a run whose algorithm was given as an object: the same again.
        env: for a run whose environment was given as an object: the same again.
        hparams: for a run of a ready-made Algorithm: its hyperparameters (their structure; the values are
            those of the run).
        loggers: as in :func:`run`; None makes those again that the run had (TensorBoard, W&B).
        progress: as in :func:`run`.

    Raises:
        RunError: not a run folder, in use by another process, ``env_steps`` is less than already trained, or what the
            environment is made of (a frozen model, a corpus, prompts) has changed.
        CheckpointError: (a RunError) no checkpoint is intact, or it is of another configuration.
        NonFiniteError: as in :func:`run`.
    """

    def build(record: Mapping[str, Any]) -> tuple[Setup, Task | None]:
        setup = configuration.from_json(record, algorithm=algorithm, env=env, hparams=hparams)
        configuration.check_sources(record, setup.env, path)
        return setup, _task(setup)

    return resume_run(Path(path), env_steps, build, loggers, progress)


def resume_run(
    folder: Path,
    env_steps: int | None,
    build: Callable[[Mapping[str, Any]], tuple[Setup, Task | None]],
    loggers: Sequence[loggers_.Logger] | None = None,
    progress: str | None = None,
) -> RunResult:
    """Continue a run whose setup ``build`` makes again from ``run.json``; otherwise as :func:`resume`."""
    check_numbers(env_steps=env_steps)
    record = records.read_run(folder)
    with records.locked(folder):
        setup, task = build(record)
        warn_of_other_versions(record)
        if loggers is None:
            loggers = [loggers_.build(spec, folder) for spec in record["loggers"]]
        start = restore(folder, setup)
        trained = start.env_steps if start else 0
        if env_steps is not None and env_steps != record["env_steps"]:
            if env_steps < trained:
                raise RunError(
                    f"env_steps={env_steps}: the run in {folder} has already trained for {trained}. A run "
                    "can only be extended; pass a larger number, or start a new run."
                )
            record = {**record, "env_steps": env_steps}
            records.write_json(folder / records.RUN, record)
        summary = records.read_summary(folder)
        if start and summary and not summary["interrupted"] and trained >= record["env_steps"]:
            return RunResult(start.state, summary, folder, False, True, setup.algo, setup.env, setup.hparams)
        return _train(setup, record, folder, start, loggers, progress, task)


def load(
    path: str | os.PathLike,
    step: int | None = None,
    *,
    algorithm: Any = None,
    env: Any = None,
    hparams: Any = None,
) -> RunResult:
    """Read a run folder and restore its newest checkpoint (or that of ``step``), without training.

    Raises what :func:`resume` raises; CheckpointError too where the run has no checkpoint yet.
    """
    folder = Path(path)
    record = records.read_run(folder)
    setup = configuration.from_json(record, algorithm=algorithm, env=env, hparams=hparams)
    start = restore(folder, setup, step)
    if start is None:
        raise CheckpointError(
            f"run folder {folder} holds no checkpoint yet. One is written now and then in training and at "
            f"its end; continue the run first: jrl resume {shlex.quote(str(folder))}"
        )
    summary = records.read_summary(folder) or {}
    interrupted = bool(summary.get("interrupted"))
    return RunResult(start.state, summary, folder, interrupted, False, setup.algo, setup.env, setup.hparams)


def evaluate(
    path: str | os.PathLike,
    *,
    num_episodes: int = 100,
    greedy: bool = True,
    seed: int | None = None,
    step: int | None = None,
    member: int | None = None,
) -> dict[str, Any]:
    """Play ``num_episodes`` episodes with the policy of a run folder.

    Args:
        path: the run folder, or that of a sweep.
        num_episodes: how many, exactly.
        greedy: the most probable action, or samples as in training.
        seed: of the episodes; None repeats the run's final evaluation.
        step: the checkpoint; the newest by default.
        member: of a sweep.

    Returns:
        ``episode_return_mean``, ``_std``, ``_min``, ``_max``, ``num_episodes`` and more, as ``evaluation`` in
        ``summary.json``.

    Raises:
        RunError, CheckpointError: as :func:`load`.
        ValueError, TypeError: ``num_episodes`` is not in 1 … 2³¹ − 1, or ``seed`` not in 0 … 2³² − 1.
    """
    check_numbers(num_episodes=num_episodes, seed=seed)
    if (Path(path) / records.GROUPS).exists() and member is not None:
        from jrl.sweep import groups  # imports this module

        path, member = groups.locate(Path(path), member)
    if any((Path(path) / name).exists() for name in (records.SWEEP, records.GROUPS)):
        from jrl import sweep  # imports this module

        if member is None or step is not None:
            raise RunError(
                f"{path} holds a sweep: say which of its members, member=N (--member N), and no step."
            )
        loaded, record = sweep.load(path, member), records.read_sweep(path)
        own_seed = record["seeds"][member]
    elif member is not None:
        raise RunError(f"member={member}: {path} holds no sweep; leave it out.")
    else:
        loaded, record = load(path, step), records.read_run(path)
        own_seed = record["seed"]
    warn_of_other_sources(record, loaded.env, path)
    seed = own_seed if seed is None else seed
    evaluation = loop.evaluate(
        loaded.env, loaded.algo, loaded.hparams, loaded.state, seed, num_episodes, greedy
    )
    assert evaluation is not None  # None is for a requested stop, and there is no one to request it here
    return evaluation


def chunk_length(env_steps: int, env_steps_per_step: int) -> int:
    """Return how many algorithm steps are dispatched, logged and checked together.

    It follows from the configuration alone, never from a measured time, so that a repeated run is the same.
    """
    return max(1, min(env_steps // NUM_CHUNKS, MAX_CHUNK) // env_steps_per_step)


def _train(
    setup: Setup,
    record: Mapping[str, Any],
    folder: Path | None,
    start: Start | None,
    loggers: Sequence[loggers_.Logger],
    progress_kind: str | None,
    task: Task | None = None,
) -> RunResult:
    """Compile, train to the end, evaluate, write the summary."""
    _warn_of_zero_step_size(setup, record["env_steps"])
    show = progress.choose(progress_kind)
    for logger in loggers:
        if isinstance(logger, loggers_.WandbLogger):
            logger.record = record
    sinks = list(loggers)
    if folder is not None:
        checkpoint_folder = folder / records.CHECKPOINTS
        checkpoint_folder.mkdir(exist_ok=True)
        checkpoint.remove_leftovers(checkpoint_folder)
        records.drop_metrics_after(folder, env_steps=start.env_steps if start else 0)
        sinks.insert(0, loggers_.JsonlLogger(folder / records.METRICS))
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        stop = stack.enter_context(StopRequest(show.message))
        what = f"{setup.algorithm} on {setup.env.name}, seed {record['seed']}"
        show.message(f"{what}: compiling for {doctor.device()} ...")
        compiled = loop.compile_chunk(setup, record["seed"], record["chunk_length"], start)
        extra = task.extra if task else None
        trained = loop.train(compiled, setup, record, folder, sinks, show, stop, extra)
        evaluation = None
        if task is not None and task.evaluate is not None:
            evaluation = None if stop.requested else task.evaluate(trained.state, stop)
        elif not stop.requested and record["eval_episodes"]:
            evaluation = loop.evaluate(
                setup.env,
                setup.algo,
                setup.hparams,
                trained.state,
                record["seed"],
                record["eval_episodes"],
                stop=stop,
            )
    seconds = trained.seconds
    summary = {
        "algorithm": setup.algorithm,
        "environment": setup.env.name,
        "seed": record["seed"],
        "env_steps": trained.env_steps,
        "interrupted": stop.requested and (trained.env_steps < record["env_steps"] or evaluation is None),
        "evaluation": evaluation,
        "train_seconds": seconds,
        "env_steps_per_second": trained.env_steps_trained / seconds if seconds else 0.0,
        "compile_seconds": compiled.seconds,
        "device": doctor.device(),
        "precision": doctor.precision(),
        "versions": doctor.versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(task.summary if task else {}),
    }
    if folder is not None:
        records.write_json(folder / records.SUMMARY, records.plain(summary))
        _plot(folder)
    show.message(progress.report(summary, folder))
    return RunResult(
        trained.state, summary, folder, summary["interrupted"], False, setup.algo, setup.env, setup.hparams
    )


def _plot(folder: Path) -> None:
    from jrl import plots

    if plots.read(folder).env_steps.size:
        plots.learning_curve(folder, out=folder / records.CURVE)


def _warn_of_zero_step_size(setup: Setup, env_steps: int) -> None:
    numbers = configuration.named_leaves(setup.hparams)
    anneal = float(numbers.get("anneal_env_steps", 0.0))
    if 0.0 < anneal < env_steps and float(numbers.get("learning_rate_end", 1.0)) <= 0.0:
        warnings.warn(
            f"the learning rate is 0 from env step {anneal:,.0f} on, and the run has {env_steps:,}: nothing is "
            f"learned after that. Set anneal_env_steps={env_steps}, or learning_rate_end above 0.",
            RunWarning,
            stacklevel=4,
        )


def warn_of_other_versions(record: Mapping[str, Any]) -> None:
    """Warn of what goes on with other versions than ``run.json`` or ``sweep.json`` says it began with."""
    now = doctor.versions()
    before = {"compiler": "full", **record["versions"]}  # older records have none
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in before.items() if now.get(name) != old]
    if changed:
        warnings.warn(
            f"this was started with other versions ({', '.join(changed)}): it goes on, but not bit for "
            "bit as it would have.",
            RunWarning,
            stacklevel=3,
        )


def warn_of_other_sources(record: Mapping[str, Any], env: Environment, path: Any) -> None:
    """Warn of an environment that is made of other files than the run or sweep in ``path`` was trained with."""
    if changed := configuration.changed_sources(record, env):
        warnings.warn(
            f"changed since the training in {path} was started: {changed}. Episodes are rewarded by what is there now.",
            RunWarning,
            stacklevel=3,
        )


def check_numbers(**values: Any) -> None:
    """Raise TypeError or ValueError, naming it, for a number of a run that is none or too small."""
    lowest = {"seed": 0, "eval_episodes": 0}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r}: expected a number.")
        if name != "checkpoint_seconds" and not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: expected an integer.")
        if name == "checkpoint_seconds" and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: must be finite and at least 0, or None to save by steps only.")
        if name != "checkpoint_seconds" and value < lowest.get(name, 1):
            raise ValueError(f"{name}={value}: must be at least {lowest.get(name, 1)}.")
        if name == "seed" and value >= 2**32:
            raise ValueError(f"seed={value}: must be below 2**32.")
        if name in ("eval_episodes", "num_episodes", "num_steps") and value >= 2**31:
            raise ValueError(f"{name}={value}: must be below 2**31, as they are counted in 32 bits.")
