"""Learning quality: final return of ten seeds, interquartile mean with a bootstrap 95 % interval.

    python benchmarks/learning.py ppo-cartpole dqn-cartpole --seeds 10
    python benchmarks/learning.py --list
    python benchmarks/learning.py --table

Each row trains every seed in turn, evaluates the final parameters greedily over 100 episodes with keys of
their own, and writes ``benchmarks/results/learning-<row>.json``: settings, versions, device, commit, one
record a seed with its learning curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from jrl import xla

xla.configure()

import jax
import numpy as np

import jrl
from jrl import statistics
from jrl.statistics import fractional_interquartile_mean as interquartile_mean

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
TABLE_START, TABLE_END = "<!-- learning-table:start -->", "<!-- learning-table:end -->"
CURVE_POINTS = 50
EVAL_SEED = 10_000  # evaluation keys are those of seeds that no training uses


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: what is trained, for how long, and what it should reach."""

    algorithm: str
    env: str
    env_steps: int
    goal: float
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hparams: dict[str, Any] = dataclasses.field(default_factory=dict)


# PPO's settings for boards, and the steps of the rows that are to take minutes; the goals are those of 10 million.
MINATAR = {
    "num_envs": 64,
    "num_minibatches": 8,
    "activation": "relu",
    "hidden_sizes": (64,),
    "shared_torso": True,
}
FEWER = 1_000_000

ROWS = {
    "ppo-cartpole": Row("ppo", "CartPole-v1", 500_000, 495.0),
    "dqn-cartpole": Row("dqn", "CartPole-v1", 500_000, 490.0),
    "pqn-cartpole": Row("pqn", "CartPole-v1", 500_000, 495.0),
    "dqn-acrobot": Row("dqn", "Acrobot-v1", 500_000, -82.0),
    "dqn-mountaincar": Row(
        "dqn",
        "MountainCar-v0",
        200_000,
        -110.0,
        {
            "num_envs": 8,
            "unroll_length": 2,
            "num_updates": 4,
            "batch_size": 64,
            "hidden_sizes": (64, 64),
            "persistent": True,
        },
        {
            "learning_rate": 1e-3,
            "anneal_env_steps": 2e5,
            "target_period": 600.0,
            "epsilon_env_steps": 3e4,
            "epsilon_end": 0.02,
        },
    ),
    "dqn-catch": Row(
        "dqn",
        "Catch-bsuite",
        100_000,
        1.0,
        {"warmup_env_steps": 2_000},
        {"anneal_env_steps": 1e5, "epsilon_env_steps": 3e4},
    ),
    "dqn-deepsea": Row(
        "dqn",
        "DeepSea-bsuite",
        100_000,
        0.99,
        {"warmup_env_steps": 2_000},
        {"anneal_env_steps": 1e5, "epsilon_env_steps": 3e4},
    ),
    "r2d2-memorychain": Row(
        "r2d2", "MemoryChain-bsuite", 100_000, 1.0, {}, {"anneal_env_steps": 1e5, "epsilon_env_steps": 3e4}
    ),
    "ppo-pendulum": Row(
        "ppo",
        "Pendulum-v1",
        1_000_000,
        -160.0,
        {
            "num_envs": 32,
            "num_epochs": 10,
            "num_minibatches": 32,
            "normalize_rewards": True,
            "clip_value": False,
        },
        {"learning_rate": 5e-4, "anneal_env_steps": 1e6, "gamma": 0.95, "entropy_coef": 0.0},
    ),
    "ppo-mountaincar-continuous": Row(
        "ppo",
        "MountainCarContinuous-v0",
        100_000,
        92.0,
        {
            "num_epochs": 10,
            "num_minibatches": 8,
            "normalize_observations": True,
            "normalize_rewards": True,
        },
        {"gamma": 0.999, "entropy_coef": 0.0},
    ),
    "ppo-acrobot": Row(
        "ppo",
        "Acrobot-v1",
        500_000,
        -78.0,
        {
            "num_epochs": 10,
            "num_minibatches": 8,
            "normalize_observations": True,
            "normalize_rewards": True,
            "clip_value": False,
        },
        {"anneal_env_steps": 5e5, "entropy_coef": 0.0},
    ),
    "ppo-catch": Row("ppo", "Catch-bsuite", 500_000, 1.0),
    "ppo-gru-memorychain": Row(
        "ppo", "MemoryChain-bsuite", 200_000, 1.0, {"memory": "gru"}, {"anneal_env_steps": 2e5}
    ),
    "ppo-memorychain": Row("ppo", "MemoryChain-bsuite", 200_000, 1.0, {}, {"anneal_env_steps": 2e5}),
    "sac-pendulum": Row("sac", "Pendulum-v1", 100_000, -155.0, {}, {"anneal_env_steps": 1e5}),
    "td3-pendulum": Row("td3", "Pendulum-v1", 100_000, -155.0, {}, {"anneal_env_steps": 1e5}),
    "td3-mountaincar-continuous": Row(
        "td3",
        "MountainCarContinuous-v0",
        100_000,
        92.0,
        {},
        {"anneal_env_steps": 1e5, "exploration_noise": 0.5, "noise_correlation": 0.95},
    ),
    "a2c-cartpole": Row(
        "a2c",
        "CartPole-v1",
        500_000,
        495.0,
        {"unroll_length": 128},
        {"learning_rate": 7e-3, "anneal_env_steps": 5e5, "max_grad_norm": 10.0},
    ),
    "reinforce-cartpole": Row("reinforce", "CartPole-v1", 500_000, 495.0, {}, {"anneal_env_steps": 5e5}),
    "ppo-breakout-minatar": Row(
        "ppo",
        "Breakout-MinAtar",
        10_000_000,
        45.0,
        MINATAR,
        {"learning_rate": 5e-3, "anneal_env_steps": 1e7},
    ),
    **{
        f"ppo-{game.lower()}-minatar": Row(
            "ppo",
            f"{game}-MinAtar",
            FEWER,
            goal,
            MINATAR,
            {"learning_rate": 5e-3, "anneal_env_steps": float(FEWER)},
        )
        for game, goal in (("Asterix", 18.0), ("Freeway", 60.0), ("SpaceInvaders", 140.0))
    },
    "pqn-breakout-minatar": Row(
        "pqn",
        "Breakout-MinAtar",
        FEWER,
        37.0,
        {"hidden_sizes": (128,)},
        {"anneal_env_steps": float(FEWER), "epsilon_env_steps": 0.1 * FEWER, "q_lambda": 0.65},
    ),
}


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the interquartile mean."""
    interval = statistics.bootstrap_interval(interquartile_mean, values, resamples=resamples)
    return round(float(interval.low), 2), round(float(interval.high), 2)


def measure(name: str, row: Row, seeds: int) -> dict[str, Any]:
    """Train and evaluate ``seeds`` seeds of ``row``; return its record."""
    module = getattr(jrl, row.algorithm)
    env = jrl.make(row.env)
    algo = module.make(env, module.Config(**row.config))
    hparams = jax.tree.map(np.float32, module.HParams(**row.hparams))
    init = jax.jit(algo.init).lower(jax.random.key(0), hparams).compile()
    state = init(jax.random.key(0), hparams)
    num_steps = -(-(row.env_steps - jrl.ops.counter.to_int(state.env_steps)) // algo.env_steps_per_step)
    chunk = -(-num_steps // CURVE_POINTS)
    train = jax.jit(lambda state: jrl.train(algo, state, hparams, num_steps=chunk), donate_argnums=0)
    train = train.lower(state).compile()
    records = []
    for seed in range(seeds):
        state = init(jax.random.key(seed), hparams)
        curve, seconds, processor = [], 0.0, 0.0
        for _ in range(-(-num_steps // chunk)):
            start, processor_start = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(train(state))
            seconds += time.perf_counter() - start
            processor += time.process_time() - processor_start  # without the pauses of a shared machine
            summary = jrl.training.summarize(metrics)
            curve.append(
                [jrl.ops.counter.to_int(state.env_steps), round(float(summary["episode_return"]), 2)]
            )
        stats = jrl.evaluate(jax.random.key(EVAL_SEED + seed), env, algo.policy(state), num_episodes=100)
        returns = np.asarray(stats.episode_return)
        records.append(
            {
                "seed": seed,
                "return_mean": round(float(returns.mean()), 2),
                "return_std": round(float(returns.std()), 2),
                "return_min": round(float(returns.min()), 2),
                "episodes_completed": int(stats.completed.sum()),
                "env_steps": curve[-1][0],
                "train_seconds": round(seconds, 2),
                "train_processor_seconds": round(processor, 2),
                "curve": curve,
            }
        )
        print(f"{name} seed {seed}: {records[-1]['return_mean']} in {seconds:.1f} s", flush=True)
    finals = np.array([record["return_mean"] for record in records])
    return {
        "row": name,
        **dataclasses.asdict(row),
        "seeds": seeds,
        "eval_episodes": 100,
        "greedy": True,
        "iqm": round(interquartile_mean(finals), 2),
        "iqm_interval_95": bootstrap_interval(finals),
        "mean": round(float(finals.mean()), 2),
        "worst": float(finals.min()),
        "jax": jax.__version__,
        "jrl": jrl.__version__,
        "device": str(jax.devices()[0]),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "records": records,
    }


def table() -> str:
    """Return the README's table, made from the records alone."""
    lines = [
        "| Algorithm | Environment | Environment steps | Seeds | Return, IQM [95 % interval] | Worst seed | Goal |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in ROWS:
        path = RESULTS / f"learning-{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        memory = f" with {record['config']['memory'].upper()}" if "memory" in record["config"] else ""
        low, high = record["iqm_interval_95"]
        digits = 1 if abs(record["goal"]) >= 10 else 2  # a return of 0.99 is not one of 1.0
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if record["seeds"] > 2 else ""
        lines.append(
            f"| {record['algorithm'].upper()}{memory} | {record['env']} | {record['env_steps']:,} | {record['seeds']} "
            f"| {record['iqm']:.{digits}f}{interval} | {record['worst']:.{digits}f} | {record['goal']:g} |"
        )
    return "\n".join(lines) + "\n"


def insert_table(readme: str) -> str:
    """Return the README's text with the table of the records between its two markers."""
    before, rest = readme.split(TABLE_START)
    _, after = rest.split(TABLE_END)
    return before + TABLE_START + "\n" + table() + TABLE_END + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--env-steps", type=int, help="instead of the row's own, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true", help="write the table of the records into the README")
    arguments = parser.parse_args()
    if arguments.table:
        README.write_text(insert_table(README.read_text()))
        return
    unknown = sorted(set(arguments.rows) - set(ROWS))
    if unknown:
        parser.error(f"unknown row {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    if arguments.list or not arguments.rows:
        for name, row in ROWS.items():
            print(f"{name:32} {row.algorithm} on {row.env}, {row.env_steps:,} env steps, goal {row.goal}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.rows:
        row = ROWS[name]
        if arguments.env_steps:
            row = dataclasses.replace(row, env_steps=arguments.env_steps)
        record = measure(name, row, arguments.seeds)
        path = arguments.out / f"learning-{name}.json"
        text = json.dumps(record, indent=1)
        path.write_text(text + "\n")
        print(f"{name}: IQM {record['iqm']} {record['iqm_interval_95']}, goal {row.goal} -> {path}")


if __name__ == "__main__":
    main()
