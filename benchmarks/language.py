"""Records of finished runs of language models: what was trained, to which loss on unseen text, in which time.

    architecture="--max-length 64 --batch-size 16 --num-heads 4 --warmup-tokens 100000 --corpus input.txt"
    jrl pretrain $architecture --num-layers 4 --width 128 --mlp-width 344 --tokens 2000000 --out runs/lm
    jrl pretrain $architecture --num-layers 2 --width 88 --mlp-width 240 --tokens 1000000 --out runs/plain
    jrl distill runs/lm --student-config '{"num_layers": 2, "width": 88, "mlp_width": 240}' --batch-size 16 \
        --warmup-tokens 100000 --tokens 1000000 --out runs/small
    python benchmarks/language.py runs/lm runs/plain runs/small

One JSON line for each folder is appended to ``benchmarks/results/language.jsonl``: all of ``run.json`` but where the
corpus lies, ``summary.json``, and validation losses on the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, append, commit, now

from jrl import records


def record(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run."""
    run, summary = records.read_run(folder), records.read_summary(folder)
    if summary is None or summary["interrupted"]:
        raise SystemExit(f"{folder} is not finished: jrl resume {folder}")
    run["corpus"] = {**run["corpus"], "name": Path(run["corpus"]["name"]).name}
    rows = records.read_metrics(folder)
    shown = rows[:: max(1, len(rows) // 20)]
    return {
        "benchmark": "language",
        "time": now(),
        "commit": commit(Path(__file__).parent),
        "run": run,
        "summary": summary,
        "validation_losses": [[row["env_steps"], row["validation_loss"]] for row in shown],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="+", type=Path, help="finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    for folder in arguments.folder:
        line = record(folder)
        evaluation, seconds = line["summary"]["evaluation"], line["summary"]["train_seconds"]
        print(
            f"{folder}: {line['summary']['num_params']:,} parameters, {line['summary']['env_steps']:,} tokens in "
            f"{seconds:.0f} s, validation loss {evaluation['validation_loss']:.4f}"
        )
        append(arguments.out / "language.jsonl", line)


if __name__ == "__main__":
    main()
