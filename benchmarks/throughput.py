"""Throughput of jrl alone: whole trainings, compile time, time per step over the kind of replay or memory.

    python benchmarks/throughput.py ppo --num-envs 64 --unroll-length 128 --core 0
    python benchmarks/throughput.py dqn --num-envs 10 --core 0
    python benchmarks/throughput.py pqn --core 0
    python benchmarks/throughput.py compile --algorithm ppo --core 0
    python benchmarks/throughput.py dqn-capacity --core 0
    python benchmarks/throughput.py dqn-prioritized --capacity 1000000 --fill --core 0
    python benchmarks/throughput.py dqn-rainbow --kernels native --core 0
    python benchmarks/throughput.py ppo-memory --memory gru --steps 10 --core 0

A repeat is a whole training from a fresh key, initialisation and (DQN) warm-up included, compiled beforehand
and timed until its results are ready. Each command appends one JSON line to ``benchmarks/results/``, raw
repeats included. ``against_peers.py`` measures the same work next to other libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Imports no jax, whose settings are still to come.
from jrl.bench.recording import (
    append,
    commit,
    compile_cold_and_cached,
    load,
    machine,
    now,
    pin,
    spread,
    timed,
)

RESULTS = Path(__file__).parent / "results"
EVAL_EPISODES = 128
EVAL_SEED = 10_000  # evaluation keys are those of seeds that no training uses


@dataclasses.dataclass(frozen=True)
class Work:
    """What one repeat computes; everything a peer needs to know to do the same."""

    algorithm: str
    env: str = "CartPole-v1"
    env_steps: int = 262_144
    num_envs: int = 64
    unroll_length: int = 128
    num_epochs: int = 4
    num_minibatches: int = 4
    batch_size: int = 128
    capacity: int = 10_000
    warmup_env_steps: int = 10_000
    learning_rate: float = 2.5e-4

    @property
    def target_period(self) -> int:
        """Environment steps between two target copies: about 500, and a multiple of one round's steps."""
        return self.num_envs * max(1, 500 // self.num_envs)


DEFAULTS = {
    "ppo": Work("ppo"),
    "dqn": Work("dqn", env_steps=100_000, num_envs=10, unroll_length=1),
    # PQN's own defaults.
    "pqn": Work("pqn", num_envs=128, unroll_length=32, num_epochs=2, num_minibatches=32, learning_rate=5e-4),
}


# ------------------------------------------------------------------------------------------ what is measured


def build(work: Work, **choices: Any) -> tuple[Any, Any, Any, int]:
    """Return ``(env, algo, hparams, num_steps)`` of jrl for ``work``; the peers' own settings, nothing tuned.

    ``choices`` are further fields of the algorithm's config.
    """
    import jax
    import numpy as np
    import optax

    import jrl

    env = jrl.make(work.env)
    if work.algorithm == "ppo":
        config = jrl.ppo.Config(
            num_envs=work.num_envs,
            unroll_length=work.unroll_length,
            num_epochs=work.num_epochs,
            num_minibatches=work.num_minibatches,
            **choices,
        )
        hparams = jrl.ppo.HParams(learning_rate=work.learning_rate, anneal_env_steps=work.env_steps)
        algo, warmup = jrl.ppo.make(env, config), 0
    elif work.algorithm == "pqn":
        config = jrl.pqn.Config(
            num_envs=work.num_envs,
            unroll_length=work.unroll_length,
            num_epochs=work.num_epochs,
            num_minibatches=work.num_minibatches,
        )
        hparams = jrl.pqn.HParams(learning_rate=work.learning_rate, anneal_env_steps=work.env_steps)
        algo, warmup = jrl.pqn.make(env, config), 0
    else:
        config = jrl.dqn.Config(
            num_envs=work.num_envs,
            unroll_length=work.unroll_length,
            batch_size=work.batch_size,
            capacity=work.capacity,
            warmup_env_steps=work.warmup_env_steps,
            **{"double": False, "layer_norm": False, **choices},
        )
        hparams = jrl.dqn.HParams(
            learning_rate=work.learning_rate,
            anneal_env_steps=0.0,
            epsilon_env_steps=work.env_steps / 2,
            target_period=work.target_period,
        )

        # Plain Adam: the DQN this is compared with clips no gradients.
        def adam(hparams: Any, learning_rate: Any) -> optax.GradientTransformation:
            return jrl.optim.adam(learning_rate, max_grad_norm=None, eps=1e-8, kernels=config.kernels)

        algo = jrl.dqn.make(env, config, optimizer=adam)
        warmup = -(-work.warmup_env_steps // algo.env_steps_per_step) * algo.env_steps_per_step
    if (work.env_steps - warmup) % algo.env_steps_per_step or work.env_steps <= warmup:
        raise ValueError(
            f"env_steps={work.env_steps}: must exceed the warm-up of {warmup} by a multiple of "
            f"{algo.env_steps_per_step}, so that all that are compared take the same number of steps."
        )
    # Arrays, not Python numbers: jit must not fold them into the program as constants.
    hparams = jax.tree.map(np.float32, hparams)
    return env, algo, hparams, (work.env_steps - warmup) // algo.env_steps_per_step


class Training:
    """A compiled whole training of jrl; each :meth:`repeat` runs it once more, with another seed."""

    def __init__(self, work: Work) -> None:
        import jax

        import jrl

        self.env, self.algo, self.hparams, num_steps = build(work)
        self.work = work

        def train(key: Any, hparams: Any) -> Any:
            return jrl.train(self.algo, self.algo.init(key, hparams), hparams, num_steps=num_steps)

        began = time.perf_counter()
        lowered = jax.jit(train).lower(jax.random.key(0), self.hparams)
        self.lower_seconds = time.perf_counter() - began
        began = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began

    def repeat(self, seed: int) -> dict[str, float]:
        """Train once; return seconds, env steps/s and the greedy return of what was learned."""
        import jax
        import numpy as np

        import jrl

        key = jax.random.key(seed)
        (state, _), seconds, cpu_seconds = timed(lambda: self.compiled(key, self.hparams))
        stats = jrl.evaluate(
            jax.random.key(EVAL_SEED + seed), self.env, self.algo.policy(state), num_episodes=EVAL_EPISODES
        )
        return {
            "seed": seed,
            "seconds": round(seconds, 5),
            "cpu_seconds": round(cpu_seconds, 5),
            "env_steps_per_second": round(self.work.env_steps / seconds, 1),
            "episode_return": round(float(np.mean(stats.episode_return)), 2),
        }


# ------------------------------------------------------------------------------------------------- records


def spread_of_returns(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return their spread without what is relative to the median, which may be 0; None where no episode ended."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": round(statistics.median(known), 2), "min": min(known), "max": max(known)}


def header(name: str, work: Work) -> dict[str, Any]:
    """Return the fields that every record begins with."""
    return {
        "benchmark": name,
        "time": now(),
        "commit": commit(Path(__file__).parent),
        "work": dataclasses.asdict(work),
        "load": load(),
    }


# ------------------------------------------------------------------------------------------------ commands


def measure_training(work: Work, repeats: int) -> dict[str, Any]:
    """Time ``repeats`` whole trainings, after one that warms up."""
    training = Training(work)
    training.repeat(0)
    rows = [training.repeat(1 + i) for i in range(repeats)]
    return {
        **header(work.algorithm, work),
        "env_steps_per_second": spread([row["env_steps_per_second"] for row in rows]),
        "episode_return": spread_of_returns([row["episode_return"] for row in rows]),
        "lower_seconds": round(training.lower_seconds, 3),
        "compile_seconds": round(training.compile_seconds, 3),
        "temporary_bytes": training.compiled.memory_analysis().temp_size_in_bytes,
        "machine": machine(),
        "repeats": rows,
    }


def measure_capacity(work: Work, capacities: Sequence[int], steps: int, repeats: int, fill: bool) -> dict:
    """Time DQN's steps at two capacities in turn; see :func:`measure_steps`.

    ``fill`` begins with a full replay at both capacities instead of with an equal warm-up: then the larger
    one has outgrown the processor's caches.
    """
    sides = [(with_capacity(work, capacity, fill), {}) for capacity in capacities]
    return {
        **header("dqn-capacity", work),
        "capacities": list(capacities),
        "full": fill,
        "warmup_env_steps": [one.warmup_env_steps for one, _ in sides],
        **measure_steps(sides, steps, repeats),
    }


def measure_prioritized(work: Work, steps: int, repeats: int, fill: bool) -> dict[str, Any]:
    """Time the steps of DQN with uniform and with prioritised replay in turn; see :func:`measure_steps`."""
    one = with_capacity(work, work.capacity, fill)
    return {
        **header("dqn-prioritized", work),
        "full": fill,
        "warmup_env_steps": one.warmup_env_steps,
        **measure_steps([(one, {}), (one, {"prioritized": True})], steps, repeats),
    }


def measure_rainbow(work: Work, steps: int, repeats: int, fill: bool, kernels: str) -> dict[str, Any]:
    """Time the steps of plain DQN and of Rainbow in turn, both by ``kernels``; see :func:`measure_steps`."""
    from jrl import dqn, rainbow

    one = with_capacity(work, work.capacity, fill)
    plain, all_six = dataclasses.asdict(dqn.Config()), dataclasses.asdict(rainbow.Config())
    choices = {name: value for name, value in all_six.items() if value != plain[name]}
    return {
        **header("dqn-rainbow", work),
        "choices": choices,
        "kernels": kernels,
        **measure_steps(
            [(one, {"kernels": kernels}), (one, {"kernels": kernels, "double": True, **choices})],
            steps,
            repeats,
        ),
    }


def measure_memory(work: Work, memory: str, steps: int, repeats: int) -> dict[str, Any]:
    """Time the steps of PPO without and with a memory in turn; see :func:`measure_steps`."""
    sides = [(work, {}), (work, {"memory": memory})]
    return {**header("ppo-memory", work), "memory": memory, **measure_steps(sides, steps, repeats)}


def with_capacity(work: Work, capacity: int, fill: bool) -> Work:
    """Return ``work`` with a replay of ``capacity``, full after the warm-up if ``fill``, and one step to take."""
    warmup = capacity if fill else work.warmup_env_steps
    env_steps = -(-warmup // work.num_envs) * work.num_envs + work.num_envs
    return dataclasses.replace(work, capacity=capacity, warmup_env_steps=warmup, env_steps=env_steps)


def measure_steps(sides: Sequence[tuple[Work, dict[str, Any]]], steps: int, repeats: int) -> dict[str, Any]:
    """Time the steps of two algorithms in turn; the ratio is that of each pair, the second's to the first's.

    A side is its work and what it changes of the config. The state is donated from call to call, as the driver
    does, so that the replay is updated in place.
    """
    import jax

    import jrl

    runs, states, compiled = [], [], []
    for work, choices in sides:
        _, algo, hparams, _ = build(work, **choices)
        state = jax.jit(algo.init)(jax.random.key(0), hparams)

        def chunk(state: Any, hparams: Any, algo: Any = algo) -> Any:
            return jrl.train(algo, state, hparams, num_steps=steps)

        compiled.append(jax.jit(chunk, donate_argnums=0).lower(state, hparams).compile())
        runs.append(lambda state, run=compiled[-1], hparams=hparams: run(state, hparams))
        states.append(state)
    pairs, cpu_pairs = [], []
    for pair in range(repeats + 1):
        seconds, cpu_seconds = [], []
        for which, run in enumerate(runs):
            (states[which], _), wall, cpu = timed(lambda run=run, which=which: run(states[which]))
            seconds.append(wall)
            cpu_seconds.append(cpu)
        if pair > 0:  # the first warms up
            pairs.append([round(wall / steps * 1e6, 3) for wall in seconds])
            cpu_pairs.append([round(cpu / steps * 1e6, 3) for cpu in cpu_seconds])
    return {
        "steps": steps,
        "microseconds_per_step": [spread(column) for column in zip(*pairs, strict=True)],
        "ratio": spread([second / first for first, second in pairs]),
        "cpu_ratio": spread([second / first for first, second in cpu_pairs]),
        "replay_bytes": [
            sum(leaf.nbytes for leaf in jax.tree.leaves(getattr(state, "replay", ()))) for state in states
        ],
        "temporary_bytes": [one.memory_analysis().temp_size_in_bytes for one in compiled],
        "machine": machine(),
        "pairs": pairs,
        "cpu_pairs": cpu_pairs,
    }


def compile_once(work: Work) -> dict[str, Any]:
    """Lower and compile the training in this process; with a cache only if the environment names one."""
    began = time.perf_counter()
    import jax

    import jrl

    jrl.ppo, jrl.dqn, jrl.pqn  # noqa: B018 - lazy: importing them is not compiling
    jax.devices()
    import_seconds = time.perf_counter() - began
    training = Training(work)
    return {
        "import_seconds": round(import_seconds, 3),
        "lower_seconds": round(training.lower_seconds, 3),
        "compile_seconds": round(training.compile_seconds, 3),
        "machine": machine(),
    }


def measure_compile(work: Work, repeats: int) -> dict[str, Any]:
    """Compile in fresh processes: cold, and again with the persistent cache that the cold one has filled."""
    command = [sys.executable, __file__, "--compile-once", json.dumps(dataclasses.asdict(work))]
    summary, rows = compile_cold_and_cached(command, repeats)
    return {**header("compile", work), **summary, "repeats": rows}


STEPS = ("dqn-capacity", "dqn-prioritized", "dqn-rainbow", "ppo-memory")


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Work):
        if field.name != "algorithm":
            kind = {"str": str, "int": int, "float": float}[field.type]
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind)


def work_from(arguments: argparse.Namespace, algorithm: str) -> Work:
    """Return the algorithm's default work with what the flags change."""
    changed = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Work)
        if field.name != "algorithm" and getattr(arguments, field.name) is not None
    }
    return dataclasses.replace(DEFAULTS[algorithm], **changed)


def cores(text: str) -> list[int]:
    """Parse ``0`` or ``0,1``."""
    return [int(part) for part in text.split(",") if part]


def count(text: str) -> int:
    """Parse a whole number of at least 1: of none there is no median."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1.")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=(*DEFAULTS, "compile", *STEPS))
    add_work_flags(parser)
    parser.add_argument("--algorithm", choices=tuple(DEFAULTS), default="ppo", help="for compile")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--core", type=cores, default=[], help="core(s) to pin to, such as 0 or 0,1")
    parser.add_argument("--capacities", type=count, nargs=2, default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=count, default=1_000, help="for dqn-…, ppo-memory: steps of a repeat")
    parser.add_argument("--memory", default="gru", help="for ppo-memory: gru or transformer")
    parser.add_argument("--kernels", choices=("xla", "native"), default="xla", help="for dqn-rainbow")
    parser.add_argument("--fill", action="store_true", help="for dqn-…: begin with full replays")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--compile-once", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.compile_once:
        print(json.dumps(compile_once(Work(**json.loads(arguments.compile_once)))))
        return
    if arguments.what is None:
        parser.error(f"say what to measure: {', '.join((*DEFAULTS, 'compile', *STEPS))}")
    pin(arguments.core)
    from jrl import xla

    xla.configure()
    if arguments.what in STEPS:
        name = arguments.what
        work = work_from(arguments, name.partition("-")[0])
        how = arguments.steps, arguments.repeats, arguments.fill
        if name == "dqn-capacity":
            record = measure_capacity(work, arguments.capacities, *how)
        elif name == "ppo-memory":
            record = measure_memory(work, arguments.memory, arguments.steps, arguments.repeats)
        elif name == "dqn-rainbow":
            record = measure_rainbow(work, *how, arguments.kernels)
        else:
            record = measure_prioritized(work, *how)
        print(f"ratio {record['ratio']}, of processor time {record['cpu_ratio']}")
    elif arguments.what == "compile":
        record = measure_compile(work_from(arguments, arguments.algorithm), arguments.repeats)
        print({key: value for key, value in record.items() if key.endswith("_seconds")})
        name = f"compile-{arguments.algorithm}"
    else:
        # Compile seconds are those of a first start: a cache of the user's would hide them.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        record = measure_training(work_from(arguments, arguments.what), arguments.repeats)
        print(f"env steps/s {record['env_steps_per_second']}  return {record['episode_return']}")
        name = f"throughput-{arguments.what}"
    append(arguments.out / f"{name}.jsonl", record)


if __name__ == "__main__":
    main()
