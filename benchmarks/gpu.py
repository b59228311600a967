"""Everything that is to be measured on a machine with a GPU, in one run of under ten minutes.

    python benchmarks/gpu.py --out gpu-results
    python benchmarks/gpu.py --out gpu-results --toy      the same at toy size, on any machine

Each stage is a process of its own with a limit of its own, so that one that fails or hangs does not lose the
others. Those with a goal of time compile side by side, then wait for each other and take turns; MinAtar's rows of
``learning.py`` and then the learning checks, whose time says nothing, run side by side at the end. ``gpu.jsonl`` gets
each record as soon as it is there, ``gpu.log`` what the stages print, ``summary.json`` how each stage ended; the
figures are ``bench-*.png``, MinAtar's records ``learning-*.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a clone suffices
TOTAL_SECONDS = 570.0
MAX_REPEATS = 5
CHECKS_AT_ONCE = 8
MEETING_SECONDS = 120.0  # how long the timed trainings wait for each other to have compiled
EVAL_SEED = 10_000  # evaluation keys are those of seeds that no training uses


@dataclasses.dataclass(frozen=True)
class Training:
    """Seeds trained side by side in one program; the goals are for all of them together."""

    algorithm: str
    env: str
    env_steps: int
    members: int
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hparams: dict[str, float] = dataclasses.field(default_factory=dict)
    goal_seconds: float | None = None
    goal_return: float | None = None
    eval_episodes: int = 100
    limit: float = 90.0
    """Seconds for compiling, repeats and evaluation."""
    repeats: int = 1

    def change(self, **config: Any) -> Training:
        """Return the same with other static choices; the goal of the return was that of the old ones."""
        return dataclasses.replace(self, config={**self.config, **config}, goal_return=None)


def trainings() -> dict[str, Training]:
    """Return what is trained; the learning checks are the rows of ``learning.py``, ten seeds at once."""
    import learning

    def row(name: str, members: int, **changes: Any) -> Training:
        r = learning.ROWS[name]
        return Training(
            r.algorithm, r.env, r.env_steps, members, r.config, r.hparams, goal_return=r.goal, **changes
        )

    return {
        # The size that PureJaxRL published, with its settings.
        "ppo-cartpole-2048-seeds": Training(
            "ppo",
            "CartPole-v1",
            500_000,
            2_048,
            {"num_envs": 4, "unroll_length": 128},
            {"learning_rate": 2.5e-4, "anneal_env_steps": 5e5},
            goal_seconds=10.0,
            eval_episodes=8,
            limit=100.0,
            repeats=MAX_REPEATS,
        ),
        # Likewise, clipping values as it does.
        "ppo-breakout-256-seeds": row(
            "ppo-breakout-minatar", 256, goal_seconds=60.0, eval_episodes=8, limit=150.0, repeats=MAX_REPEATS
        ).change(clip_value=True),
        "dqn-breakout-alone": Training(
            "dqn",
            "Breakout-MinAtar",
            1_000_000,
            1,
            {"num_envs": 128, "capacity": 100_000},
            {"epsilon_env_steps": 1e5, "anneal_env_steps": 1e6},
            goal_seconds=20.0,
            limit=60.0,
            repeats=MAX_REPEATS,
        ),
        **{f"learning-{name}": row(name, 10) for name in learning.ROWS if "minatar" not in name},
    }


def toy(training: Training) -> Training:
    """Return the same program, as small as can be."""
    small = {"num_envs": 4, "unroll_length": 8, "hidden_sizes": (8,)}
    if training.algorithm == "ppo":
        small |= {"num_minibatches": 2, "num_epochs": 1}
    else:
        small |= {"warmup_env_steps": 64, "capacity": 256, "batch_size": 8}
    config = {**training.config, **small}
    changes: dict[str, Any] = {"env_steps": 256, "members": 2, "eval_episodes": 2, "limit": 200.0}
    return dataclasses.replace(training, config=config, **changes)


def bench_stages(small: bool) -> dict[str, tuple[float, str]]:
    """Return the limit and the arguments of each ``jrl bench`` stage."""
    if small:
        tiny = (
            "--num-envs 2 4 --members 1 2 --capacities 64 --unroll-length 4 --hidden-sizes 8 --seconds 0.05"
        )
        dqn = "--warmup-env-steps 32 --capacity 64 --batch-size 4"
        return {
            "bench-dqn": (200.0, f"env train replay --algo dqn {tiny} {dqn}"),
            "bench-ppo": (200.0, f"policy update sweep --algo ppo --num-minibatches 2 {tiny}"),
        }
    return {
        "bench-ppo": (210.0, "all --algo ppo --num-envs 256 4096 --members 16 256"),
        "bench-dqn": (60.0, "replay train --algo dqn --num-envs 128"),
    }


def minatar_stages(small: bool) -> dict[str, tuple[float, str]]:
    """Return the limit and the arguments of each stage of ``learning.py``: two rows of ten million steps for a game."""
    size = "--seeds 2 --env-steps 9000" if small else "--seeds 10"
    return {
        f"minatar-{game}": (240.0, f"ppo-{game}-minatar pqn-{game}-minatar --at-once {size}")
        for game in ("breakout", "asterix", "freeway", "spaceinvaders")
    }


# --------------------------------------------------------------------------------------------- one training


@contextlib.contextmanager
def turn(name: str, folder: Path | None, others: int) -> Iterator[None]:
    """Wait until all of ``others`` are here, then for the turn: one at a time measures."""
    if folder is None:
        yield
        return
    (folder / f"{name}.ready").touch()
    deadline = time.monotonic() + MEETING_SECONDS
    while len(list(folder.glob("*.ready"))) < others and time.monotonic() < deadline:
        time.sleep(0.2)
    with (folder / "turn.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def train(
    name: str, training: Training, folder: Path | None = None, others: int = 1
) -> Iterator[dict[str, Any]]:
    """Compile, then train from fresh seeds as often as the limit allows, ``repeats`` times at most; evaluate.

    Yields a record of the speed, then one of the returns: what fails last does not lose what went before. With a
    ``folder`` it waits there until as many ``others`` have compiled, and then for its turn.
    """
    import jax
    import numpy as np
    from learning import interquartile_mean

    import jrl
    from jrl import configuration
    from jrl.bench import recording

    setup = configuration.build(
        training.algorithm, training.env, config=training.config, hparams=training.hparams
    )
    algo, hparams = setup.algo, setup.hparams
    warmup = getattr(setup.config, "warmup_env_steps", 0)
    num_steps = -(-(training.env_steps - warmup) // algo.env_steps_per_step)

    def one(key: Any, hparams: Any) -> Any:
        state, metrics = jrl.train(algo, algo.init(key, hparams), hparams, num_steps=num_steps)
        # The policy alone: the state of all members would double the memory of a replay.
        return algo.policy(state), metrics["episode_return"]

    def play(key: Any, policy: Any) -> Any:
        stats = jrl.evaluate(key, setup.env, policy, num_episodes=training.eval_episodes)
        return stats.episode_return.mean()

    def keys(repeat: int) -> Any:
        return jax.random.split(jax.random.key(repeat), training.members)

    compile_began = time.perf_counter()
    run = jax.jit(jax.vmap(one, in_axes=(0, None))).lower(keys(0), hparams).compile()
    compile_seconds = time.perf_counter() - compile_began
    policies = jax.eval_shape(jax.vmap(one, in_axes=(0, None)), keys(0), hparams)[0]
    evaluate = jax.jit(jax.vmap(play)).lower(keys(EVAL_SEED), policies).compile()
    total = training.members * (warmup + num_steps * algo.env_steps_per_step)
    seconds: list[float] = []
    with turn(name, folder, others):
        began = time.perf_counter()
        while len(seconds) < training.repeats:
            (policy, _), taken, _ = recording.timed(lambda: run(keys(len(seconds)), hparams))
            seconds.append(round(taken, 4))
            print(f"{name}: {taken:.2f} s, {total / taken:,.0f} env steps/s", flush=True)
            if time.perf_counter() - began + 1.2 * taken > 0.5 * training.limit:
                break
        head = {
            "benchmark": f"gpu-{name}",
            "time": recording.now(),
            "commit": recording.commit(ROOT),
            **dataclasses.asdict(training),
            "machine": recording.machine(),
        }
        goal = training.goal_seconds
        yield {
            **head,
            "all_env_steps": total,
            "compile_seconds": round(compile_seconds, 2),
            "seconds": recording.spread(seconds),
            "env_steps_per_second": recording.spread([total / each for each in seconds], digits=1),
            "in_time": None if goal is None else statistics.median(seconds) <= goal,
            "temporary_bytes": run.memory_analysis().temp_size_in_bytes,
            "load": recording.load(),
            "seconds_of_repeats": seconds,
        }
        returns = np.asarray(evaluate(keys(EVAL_SEED), policy))
    iqm = interquartile_mean(returns)
    goal = training.goal_return
    yield {
        **head,
        "benchmark": f"gpu-{name}-return",
        "iqm": round(iqm, 2),
        "worst": round(float(returns.min()), 2),
        "learned": None if goal is None else iqm >= goal,
        "returns": returns.round(2).tolist(),
    }


# -------------------------------------------------------------------------------------------------- stages


def run_stage(command: Sequence[str], limit: float, log: Path, environ: dict[str, str]) -> str:
    """Run a process with all it starts, and return how it ended: ``"done"`` or what went wrong."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n$ {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        try:
            code = process.wait(max(limit, 1.0))
        except subprocess.TimeoutExpired:
            return f"stopped after its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "done" if code == 0 else f"exit code {code}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--toy", action="store_true", help="at toy size, on any device")
    parser.add_argument("--stages", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of the whole run")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--meet", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    resize: Callable[[Training], Training] = toy if arguments.toy else lambda training: training
    if arguments.train:
        from jrl.bench import recording

        training = resize(trainings()[arguments.train])
        folder, others = arguments.meet or (None, 1)
        for record in train(arguments.train, training, folder and Path(folder), int(others)):
            recording.append(out / "gpu.jsonl", record)
        return 0

    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    flags = ["--toy"] if arguments.toy else []
    minatar = minatar_stages(arguments.toy)
    names = [*trainings(), *bench_stages(arguments.toy), *minatar]
    if unknown := sorted(set(arguments.stages or ()) - set(names)):
        parser.error(f"unknown stage {', '.join(unknown)}: choose from {', '.join(names)}")

    # Several processes share the device: none may take all of its memory beforehand.
    environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    platform = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"],
        env=environ, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    if platform != "gpu" and not arguments.toy:
        parser.error(
            f"jax computes on {platform or 'nothing'}, not on a GPU (jrl doctor); --toy runs anywhere"
        )

    ends: dict[str, Any] = {}
    writing = threading.Lock()

    def stage(name: str, limit: float, command: Sequence[str]) -> None:
        left = arguments.seconds - (time.perf_counter() - began)
        start = time.perf_counter()
        end = run_stage(command, min(limit, left), out / "gpu.log", environ) if left > 5 else "no time left"
        with writing:
            ends[name] = {"end": end, "seconds": round(time.perf_counter() - start, 1)}
            (out / "summary.json").write_text(json.dumps(ends, indent=1) + "\n")
        print(f"{name}: {end} ({ends[name]['seconds']} s)", flush=True)

    chosen = {
        name: resize(training)
        for name, training in trainings().items()
        if not arguments.stages or name in arguments.stages
    }
    timed = [name for name in chosen if not name.startswith("learning-")]
    checks = [name for name in chosen if name.startswith("learning-")]

    def training_command(name: str) -> list[str]:
        return [sys.executable, __file__, "--out", str(out), "--train", name, *flags]

    with tempfile.TemporaryDirectory() as meeting, ThreadPoolExecutor(max(len(timed), 1)) as pool:
        limit = sum(chosen[name].limit for name in timed)
        meet = ["--meet", meeting, str(len(timed))]
        list(pool.map(lambda name: stage(name, limit, [*training_command(name), *meet]), timed))
    for name, (limit, words) in bench_stages(arguments.toy).items():
        if not arguments.stages or name in arguments.stages:
            files = ["--json", str(out / "gpu.jsonl"), "--plot", str(out / f"{name}.png")]
            stage(name, limit, [sys.executable, "-m", "jrl", "bench", *words.split(), *files])
    with ThreadPoolExecutor(max(len(minatar), 1)) as pool:
        script = [sys.executable, str(Path(__file__).with_name("learning.py")), "--out", str(out)]
        games = [name for name in minatar if not arguments.stages or name in arguments.stages]
        list(
            pool.map(lambda name: stage(name, minatar[name][0], [*script, *minatar[name][1].split()]), games)
        )
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        list(pool.map(lambda name: stage(name, chosen[name].limit, training_command(name)), checks))
    print(f"{time.perf_counter() - began:.0f} s in all; records in {out / 'gpu.jsonl'}")
    return 0 if all(end["end"] == "done" for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
