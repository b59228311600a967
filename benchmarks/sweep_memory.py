"""Memory of sweeps against their plan, over the number of members: DQN with its replays.

    python benchmarks/sweep_memory.py                        # 32, 64 and 128 members
    python benchmarks/sweep_memory.py --algo ppo --members 128 256 512

Each number of members is a sweep in a process of its own, which plans, trains for a short while, evaluates and writes a
checkpoint; ``taken`` is by how much that process grew at the highest while it trained, once everything was compiled.
A process takes some MiB whatever its members (threads, small programs); what a further member costs is the slope
between the smallest and the largest sweep. All is written to ``benchmarks/results/sweep-memory-<algorithm>.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, commit, count, load, machine, now

from jrl import xla


def sweep_once(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a sweep of ``arguments.members[0]`` members planned and took, in bytes."""
    from jrl import sweep

    with tempfile.TemporaryDirectory() as folder:
        finished = sweep.execute(
            arguments.algo, env=arguments.env, seeds=arguments.members[0], env_steps=arguments.env_steps,
            config=json.loads(arguments.config), eval_episodes=8, checkpoint_seconds=None, progress="none",
            figures=False, out=Path(folder) / "sweep",
        )  # fmt: skip
    plan, summary = finished.plan, finished.summary
    return {
        "members": plan.members,
        "held_at_once": plan.chunk,
        "bytes_per_member": plan.bytes_per_member,
        "planned": plan.bytes_total,
        "taken": summary["training_bytes"],
        "taken_by_plan": summary["training_bytes"] / plan.bytes_total,
        "saving": summary["saving_bytes"],
        "evaluating": summary["evaluating_bytes"],
        "train_seconds": summary["train_seconds"],
        "machine": machine(),
    }


def slope(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Return the bytes that a further member costs, from the smallest to the largest sweep."""
    first, last = rows[0], rows[-1]
    return (last[name] - first[name]) / (last["members"] - first["members"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", default="dqn")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--config", default='{"capacity": 100000}', help="fields of the Config, as JSON")
    parser.add_argument("--env-steps", type=count, default=11_000, help="of a member, the warm-up among them")
    parser.add_argument("--members", type=count, nargs="+", default=[32, 64, 128])
    parser.add_argument("--once", action="store_true", help="one sweep, in this process; prints its numbers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.once:
        xla.configure(num_devices=xla.cores(), vmapped=False)
        print(json.dumps(sweep_once(arguments)))
        return
    rows = []
    for members in sorted(arguments.members):
        given = ["--algo", arguments.algo, "--env", arguments.env, "--config", arguments.config]
        given += ["--env-steps", str(arguments.env_steps), "--members", str(members), "--once"]
        ran = subprocess.run(
            [sys.executable, __file__, *given], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print({name: value for name, value in rows[-1].items() if name != "machine"}, flush=True)
    record = {
        "benchmark": "sweep-memory",
        "command": " ".join(
            ["python", "benchmarks/sweep_memory.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        "time": now(),
        "commit": commit(Path(__file__).parent),
        "work": {name: getattr(arguments, name) for name in ("algo", "env", "config", "env_steps")},
        "load": load(),
        "machine": rows[-1].pop("machine"),
        "sweeps": [{name: value for name, value in row.items() if name != "machine"} for row in rows],
    }
    if len(rows) > 1:
        record["bytes_of_a_further_member"] = {name: slope(rows, name) for name in ("planned", "taken")}
        print(record["bytes_of_a_further_member"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"sweep-memory-{arguments.algo}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
