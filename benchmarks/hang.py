"""Does a vmapped training program hang under XLA's default CPU settings, and under jrl's?

    python benchmarks/hang.py --runs 10

Starts fresh processes, each of which compiles and runs eight vmapped PPO members several times, under XLA's
defaults and under ``jrl.xla.configure``, with one device and with two. One that has not finished within the limit and
computes nothing for some seconds has hung; one that still computes is given longer. Appends one JSON line a process to
``benchmarks/results/hang.jsonl``; those without a commit are of the time when members were initialised by a batch of
QR factorisations, which jrl's networks no longer have (:func:`jrl.networks.mlp.orthogonal`). Linux only: it reads a
process's CPU time from ``/proc``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

from throughput import count

from jrl import xla
from jrl.bench.recording import commit
from jrl.trial import hangs

RESULTS = Path(__file__).parent / "results"
SETTINGS = ["default", "configured", "two devices", "two devices, configured"]

PROGRAM = """
import jax, jrl
import numpy as np
from jax.sharding import Mesh, PartitionSpec
algo = jrl.ppo.make(jrl.make("CartPole-v1"), jrl.ppo.Config(num_envs={num_envs}, unroll_length=128))
hparams = jrl.ppo.HParams()
def member(key):
    return jrl.train(algo, algo.init(key, hparams), hparams, num_steps={num_steps})[1]
run = jax.vmap(member)
if jax.device_count() > 1:
    mesh, members = Mesh(np.array(jax.devices()), ("members",)), PartitionSpec("members")
    run = jax.shard_map(run, mesh=mesh, in_specs=members, out_specs=members, check_vma=False)
run = jax.jit(run)
for seed in range({repeats}):
    jax.block_until_ready(run(jax.random.split(jax.random.key(seed), 8)))
"""


def environment(setting: str) -> dict[str, str]:
    """Return the environment variables of one setting."""
    environ = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    if setting == "two devices, configured":
        xla.configure(environ, num_devices=2)
    elif setting == "two devices":
        xla.configure(environ, num_devices=2, vmapped=False)
    elif setting == "configured":
        xla.configure(environ)
    return environ


def size(text: str) -> tuple[int, int]:
    """Parse ``4x50``."""
    num_envs, times, num_steps = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"{text}: must be environments x calls of step, such as 4x50.")
    return count(num_envs), count(num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=count, default=10, help="processes for each setting and size")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds before a process is looked at")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        default=[(4, 50), (64, 5)],
        metavar="ENVSxCALLS",
        help="environments and calls of step, such as 4x50",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "hang.jsonl")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for run in range(arguments.runs):
        for num_envs, num_steps in arguments.sizes:
            program = PROGRAM.format(num_envs=num_envs, num_steps=num_steps, repeats=arguments.repeats)
            for setting in arguments.settings:
                environ = environment(setting)
                start = time.perf_counter()
                hung = hangs(program, environ, arguments.limit)
                record = {
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "commit": commit(Path(__file__).parent),
                    "setting": setting,
                    "hung": hung,
                    "seconds": round(time.perf_counter() - start, 1),
                    "run": run,
                    "num_envs": num_envs,
                    "num_steps": num_steps,
                    "repeats": arguments.repeats,
                    "NPROC": environ.get("NPROC"),
                    "XLA_FLAGS": environ.get("XLA_FLAGS"),
                    "cores": len(os.sched_getaffinity(0)),
                    "jaxlib": importlib.metadata.version("jaxlib"),
                    "python": platform.python_version(),
                }
                with arguments.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(
                    f"{setting:28} {f'{num_envs}x{num_steps}':6} {'HUNG' if hung else 'ran'} {record['seconds']} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
