"""jrl against another library, in turn: A B A B, each in its own interpreter, on the same pinned cores.

    python benchmarks/against_peers.py purejaxrl-ppo --peer-path CLONE --peer-python PYTHON --core 0
    python benchmarks/against_peers.py purejaxql-pqn --peer-path CLONE --peer-python PYTHON --core 0
    python benchmarks/against_peers.py rejax-dqn --peer-python PYTHON --core 0
    python benchmarks/against_peers.py purejaxrl-ppo ... --num-envs 4 --seeds 32 --devices 2 --core 0,1
    python benchmarks/against_peers.py purejaxrl-ppo ... --devices 2 --core 0,1
    python benchmarks/against_peers.py purejaxrl-ppo ... --env Breakout-MinAtar --num-minibatches 8 \\
        --activation relu --learning-rate 5e-3 --env-steps 1048576
    python benchmarks/against_peers.py purejaxrl-ppo ... --compile
    python benchmarks/against_peers.py purejaxrl-dqn ... --memory
    python benchmarks/against_peers.py purejaxrl-ppo ... --kernels native --compiler quick
    python benchmarks/against_peers.py --table

The other library is imported by an interpreter that has it (PyPI: rejax, stable-baselines3, sbx-rl) or that has
what it needs, from a clone (``--peer-path``: PureJaxRL, purejaxql, Stoix); see ``peers/``, one adapter each. Both sides
train on the same environment with the same network sizes, hyperparameters and number of environment steps.

A repeat is a whole training from a fresh key, compiled beforehand, timed until its results are ready. Then what
was learned is evaluated, greedily and acting as in training (the greedy policy of a half-trained network is
noisy), and the mean return of the last episodes of training is taken where it is logged, so that speed is not
bought with learning. Only ratios within a pair are to be trusted on a machine that others use.

In place of the speed, ``--compile`` compares compiling in fresh processes without a cache, and ``--memory`` what
the compiled program needs and how far the process's resident memory rises. One JSON line a comparison, raw
repeats included, is appended to ``benchmarks/results/peers-*.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import throughput
from peers import DEFAULTS, PEERS, Work
from peers.protocol import Job, Worker

RETURNS = ("episode_return", "sampled_return", "training_return")
# 10^4 transitions each, a full replay and some updates.
MEMORY_DEFAULTS = {"seeds": 128, "env_steps": 12_000}


def make_jobs(
    name: str,
    work: Work,
    peer_path: Path | None,
    peer_python: str,
    threads: int | None = None,
    peer_threads: int | None = None,
) -> dict[str, Job]:
    """Return the two sides of a comparison; ``threads`` size XLA's pools (None: as pinned, and safe)."""
    peer, source = PEERS[name], None
    if peer.file is not None:
        if peer_path is None:
            raise SystemExit(f"{name}: it is imported from a clone; pass --peer-path.")
        source = str(peer_path.resolve() / peer.file)
        if not Path(source).exists():
            raise SystemExit(f"--peer-path {peer_path}: it has no {peer.file}; pass a clone of the peer.")
    # No cache: compile seconds are those of a first start. Flags, cores and pool size are inherited by both.
    ours = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    # jrl's own path must not decide which packages the peer gets.
    theirs = {key: value for key, value in ours.items() if key != "PYTHONPATH"}
    if peer_threads is not None:
        theirs["NPROC"] = str(peer_threads)
    if threads is not None:
        ours["NPROC"] = str(threads)
    elif work.devices > 1:
        ours.pop("NPROC", None)  # pinned to one thread
    from jrl import xla

    # As jrl sweep: jrl's networks need no larger pool (see jrl.xla), and one would only contend for the cores.
    xla.configure(
        ours,
        num_devices=work.devices if work.devices > 1 else None,
        vmapped=False,
        quick_compile=work.compiler == "quick",
    )
    plain = dataclasses.asdict(work)
    return {
        "jrl": Job(sys.executable, ours, "ours", peer.algorithm, plain),
        "peer": Job(peer_python, theirs, peer.module, peer.algorithm, plain, source),
    }


def measure_speed(jobs: Mapping[str, Job], pairs: int, limit: float) -> dict[str, Any]:
    """Run ``pairs`` pairs of whole trainings after one that warms up."""
    workers: dict[str, Worker] = {}
    try:
        for side, job in jobs.items():  # one after the other: both on the same cores
            workers[side] = Worker(job.module, job, limit)
        rows = []
        for pair in range(pairs + 1):
            row: dict[str, Any] = {side: worker.repeat(pair) for side, worker in workers.items()}
            if pair == 0:  # first calls allocate, and page in what others pushed out
                continue
            for ratio, field in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
                row[ratio] = round(row["peer"][field] / row["jrl"][field], 4)
            rows.append(row)
            rates = ", ".join(f"{side} {row[side]['env_steps_per_second']:,.0f}/s" for side in workers)
            print(f"pair {pair}: {rates}, ratio {row['ratio']:.2f}, {_returns(row)}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    compiling = {side: compile_seconds(worker) for side, worker in workers.items()}
    return {
        "compile_ratio": round(compiling["peer"] / compiling["jrl"], 3) if compiling["peer"] else None,
        "ratio": throughput.spread([row["ratio"] for row in rows]),
        "cpu_ratio": throughput.spread([row["cpu_ratio"] for row in rows]),
        **{
            side: {
                "env_steps_per_second": throughput.spread(_column(rows, side, "env_steps_per_second")),
                **{name: throughput.spread_of_returns(_column(rows, side, name)) for name in RETURNS},
                **workers[side].ready,
            }
            for side in jobs
        },
        "pairs": rows,
    }


def measure_compile(jobs: Mapping[str, Job], pairs: int, limit: float) -> dict[str, Any]:
    """Lower and compile in fresh processes, in turn; ratios of the sums of both."""
    rows, where = [], {}
    for pair in range(pairs):
        row: dict[str, Any] = {}
        for side, job in jobs.items():
            with Worker(job.module, job, limit) as worker:
                if compile_seconds(worker) is None:
                    raise SystemExit(
                        f"{job.module}: it has no compiled program; --compile is for those that do."
                    )
                row[side] = {name: worker.ready[name] for name in ("lower_seconds", "compile_seconds")}
                where[side] = worker.ready["machine"]
        totals = {side: sum(row[side].values()) for side in jobs}
        row["ratio"] = round(totals["peer"] / totals["jrl"], 4)
        rows.append(row)
        print(
            f"pair {pair + 1}: jrl {totals['jrl']:.2f} s, peer {totals['peer']:.2f} s, "
            f"ratio {row['ratio']:.2f}",
            flush=True,
        )
    return {
        "ratio": throughput.spread([row["ratio"] for row in rows]),
        **{
            side: {
                **{name: throughput.spread(_column(rows, side, name)) for name in rows[0][side]},
                "machine": where[side],
            }
            for side in jobs
        },
        "pairs": rows,
    }


def measure_memory(jobs: Mapping[str, Job], pairs: int, limit: float) -> dict[str, Any]:
    """Train once in fresh processes, in turn.

    ``program`` is what the compiled program's own analysis says (arguments, outputs and temporaries);
    ``process`` how far the process's resident memory rose while it trained (Linux; else None).
    """
    rows, where = [], {}
    for pair in range(pairs):
        row: dict[str, Any] = {}
        for side, job in jobs.items():
            with Worker(job.module, job, limit) as worker:
                if compile_seconds(worker) is None:
                    raise SystemExit(
                        f"{job.module}: it has no compiled program; --memory is for those that do."
                    )
                one = worker.repeat(pair)
                where[side] = worker.ready["machine"]
                program = worker.ready["program_bytes"]
                row[side] = {**one, "program_bytes": program["total"], "program_parts": program}
                if one["peak_bytes"] is not None:
                    row[side]["process_bytes"] = one["peak_bytes"] - one["resident_bytes"]
        for what in ("program", "process"):
            both = [row[side].get(f"{what}_bytes") for side in ("peer", "jrl")]
            row[f"{what}_ratio"] = round(both[0] / both[1], 4) if all(both) else None
        rows.append(row)
        print(
            f"pair {pair + 1}: "
            + "; ".join(
                f"{side} program {row[side]['program_bytes'] / 1e6:.1f} MB, "
                f"process +{row[side].get('process_bytes', 0) / 1e6:.1f} MB"
                for side in jobs
            ),
            flush=True,
        )
    process = [row["process_ratio"] for row in rows if row["process_ratio"] is not None]
    return {
        "ratio": throughput.spread([row["program_ratio"] for row in rows]),
        "process_ratio": throughput.spread(process) if process else None,
        **{side: {"machine": where[side]} for side in jobs},
        "pairs": rows,
    }


def compile_seconds(worker: Worker) -> float | None:
    """Return its seconds of lowering and compiling; None where it has no program of its own."""
    if "compile_seconds" not in worker.ready:
        return None
    return worker.ready["lower_seconds"] + worker.ready["compile_seconds"]


def _column(rows: Sequence[dict[str, Any]], side: str, field: str) -> list[Any]:
    return [row[side][field] for row in rows]


def _returns(row: dict[str, Any]) -> str:
    def listed(side: str) -> str:
        values = (row[side][name] for name in RETURNS)
        return " / ".join("-" if value is None else f"{value:.1f}" for value in values)

    return f"returns greedy / sampled / in training: {listed('jrl')} and {listed('peer')}"


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Work):
        if field.name == "hidden_sizes":
            parser.add_argument("--hidden-sizes", type=int, nargs="+")
        else:
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default))


def work_from(arguments: argparse.Namespace, algorithm: str) -> Work:
    """Return the algorithm's default work with what the flags change."""
    flags = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Work)}
    changed = {name: value for name, value in flags.items() if value is not None}
    if "hidden_sizes" in changed:
        changed["hidden_sizes"] = tuple(changed["hidden_sizes"])
    memory = MEMORY_DEFAULTS if arguments.memory else {}
    return Work(**{**DEFAULTS[algorithm], **memory, **changed})


DEFAULT_WORK = {field.name: field.default for field in dataclasses.fields(Work)}
MEASURES = {"speed": measure_speed, "compile": measure_compile, "memory": measure_memory}


CARTPOLE = {"env": "CartPole-v1", "num_envs": 64, "unroll_length": 128}
MANY = {"env": "CartPole-v1", "num_envs": 2048, "unroll_length": 16}
FEW = {"env": "CartPole-v1", "num_envs": 4, "unroll_length": 128}
DQN = {"env": "CartPole-v1", "num_envs": 10}
ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("PPO CartPole, 64 environments × 128 steps", "PureJaxRL", "purejaxrl-ppo", CARTPOLE),
    ("", "rejax", "rejax-ppo", CARTPOLE),
    ("", "Stoix", "stoix-ppo", CARTPOLE),
    ("PPO CartPole, 2,048 × 16", "PureJaxRL", "purejaxrl-ppo", MANY),
    ("PPO CartPole, 4 × 128", "PureJaxRL", "purejaxrl-ppo", FEW),
    (
        "PPO Breakout-MinAtar, 64 × 128, 64-64 network on the flat board",
        "PureJaxRL",
        "purejaxrl-ppo",
        {"env": "Breakout-MinAtar"},
    ),
    ("DQN CartPole, 10 environments, batch 128", "PureJaxRL", "purejaxrl-dqn", DQN),
    ("", "rejax", "rejax-dqn", DQN),
    (
        "PQN CartPole, 128 environments × 64, 256-256 network",
        "purejaxql",
        "purejaxql-pqn",
        {"num_envs": 128},
    ),
    (
        "the same, one run on two cores",
        "purejaxql, on the same two",
        "purejaxql-pqn",
        {"num_envs": 128, "devices": 2},
    ),
    (
        "PPO CartPole, 64 × 128, one run on two cores",
        "PureJaxRL, on the same two",
        "purejaxrl-ppo",
        {**CARTPOLE, "devices": 2},
    ),
    (
        "PPO CartPole, 2,048 × 16, one run on two cores",
        "PureJaxRL, on the same two",
        "purejaxrl-ppo",
        {**MANY, "devices": 2},
    ),
    (
        "PPO CartPole, 4 × 128, 512 seeds, two cores",
        "PureJaxRL, vmapped",
        "purejaxrl-ppo",
        {**FEW, "seeds": 512, "devices": 2},
    ),
    (
        "PPO CartPole, 4 × 128, 32 seeds, two cores",
        "PureJaxRL, vmapped",
        "purejaxrl-ppo",
        {**FEW, "seeds": 32, "devices": 2},
    ),
    (
        "DQN CartPole, 32 seeds, two cores",
        "PureJaxRL, vmapped",
        "purejaxrl-dqn",
        {**DQN, "seeds": 32, "devices": 2},
    ),
]
"""The README's table: work, library, peer, and what the work has that is not as of one run on one device."""
TABLE_START, TABLE_END = "<!-- peers-table:start -->", "<!-- peers-table:end -->"
README = Path(__file__).parent.parent / "README.md"


def newest(peer: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the last record of ``peer`` in the results whose work is ``wanted``, None without any."""
    wanted = {"seeds": 1, "devices": 1, "prng": "threefry", "kernels": "xla", "compiler": "full", **wanted}
    found = None
    for line in (throughput.RESULTS / f"peers-{peer}.jsonl").read_text().splitlines():
        record = json.loads(line)
        # Fields that a record lacks did not exist, and were as they are by default.
        if wanted.items() <= {**DEFAULT_WORK, **record["work"]}.items():
            found = record
    return found


def table() -> str:
    """Return the README's table of ratios, by the newest record of each row: with XLA's products, with our own, and so
    compiled quickly."""
    lines = [
        "| Work | Library | Ratio | `--kernels native` | and `--quick-compile` |",
        "|---|---|---:|---:|---:|",
    ]
    for work, library, peer, wanted in ROWS:
        cells = []
        for kernels, compiler in (("xla", "full"), ("native", "full"), ("native", "quick")):
            record = newest(peer, {**wanted, "kernels": kernels, "compiler": compiler})
            cells.append(
                "" if record is None else "{median:.2f} ({min:.2f} to {max:.2f})".format(**record["ratio"])
            )
        lines.append("".join(f"| {cell} " if cell else "| " for cell in (work, library, *cells)) + "|")
    return "\n".join(lines) + "\n"


def insert_table(readme: str) -> str:
    """Return the README's text with the table of the records between its two markers."""
    before, rest = readme.split(TABLE_START)
    _, after = rest.split(TABLE_END)
    return before + TABLE_START + "\n" + table() + TABLE_END + after


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", nargs="?", choices=tuple(PEERS))
    parser.add_argument("--table", action="store_true", help="write the table of the records into the README")
    parser.add_argument("--peer-path", type=Path, help="a clone of the peer, for those not on PyPI")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that can import it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compile", action="store_true", help="compare cold compiling instead of speed")
    what.add_argument("--memory", action="store_true", help="compare peak memory instead of speed")
    add_work_flags(parser)
    parser.add_argument("--pairs", type=throughput.count, default=5)
    parser.add_argument("--core", type=throughput.cores, default=[0], help="core(s) for both, as 0 or 0,1")
    parser.add_argument("--threads", type=int, help="of XLA's pool, jrl's side (default: what is safe)")
    parser.add_argument("--peer-threads", type=int, help="of the other's (default: 1 on one core, else 4)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a worker may take for an answer")
    parser.add_argument("--out", type=Path, default=throughput.RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.table:
        README.write_text(insert_table(README.read_text()))
        return
    if arguments.peer is None:
        parser.error(f"name a library: {', '.join(PEERS)}")
    work = work_from(arguments, PEERS[arguments.peer].algorithm)
    throughput.pin(arguments.core)
    jobs = make_jobs(
        arguments.peer,
        work,
        arguments.peer_path,
        arguments.peer_python,
        arguments.threads,
        arguments.peer_threads,
    )
    measure = "compile" if arguments.compile else "memory" if arguments.memory else "speed"
    name = f"peers-{arguments.peer}" if measure == "speed" else f"peers-{measure}-{arguments.peer}"
    record = {
        **throughput.header(name, work),
        "algorithm": PEERS[arguments.peer].algorithm,
        "peer": arguments.peer,
        "peer_commit": throughput.commit(arguments.peer_path) if arguments.peer_path else None,
        **MEASURES[measure](jobs, arguments.pairs, arguments.limit),
        "load_after": throughput.load(),
    }
    throughput.append(arguments.out / f"{name}.jsonl", record)
    better = {"speed": "its speed", "compile": "faster to compile", "memory": "less memory"}[measure]
    ratio = record["ratio"]
    print(
        f"jrl / {arguments.peer}: {ratio['median']:.2f} × {better} (min {ratio['min']:.2f}, max {ratio['max']:.2f})"
    )


if __name__ == "__main__":
    main()
