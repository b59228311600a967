"""Learning quality: final return of ten seeds, interquartile mean with a bootstrap 95 % interval.

    python benchmarks/learning.py ppo-cartpole dqn-cartpole --seeds 10
    python benchmarks/learning.py --list
    python benchmarks/learning.py --table

Each row trains every seed in turn, or with ``--at-once`` all of them side by side in one program, which is what a GPU
is for; it evaluates the final parameters greedily over 100 episodes with keys of their own, and writes
``benchmarks/results/learning-<row>.json``: settings, versions, device, commit, one record a seed with its learning
curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from jrl import xla

xla.configure()

import jax
import numpy as np

import jrl
from jrl import statistics
from jrl.bench import recording
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

    def lasting(self, env_steps: int) -> Row:
        """Return the row of another length, with schedules that end where they did in proportion."""
        share = env_steps / self.env_steps
        hparams = {
            name: value * share if name.endswith("env_steps") else value
            for name, value in self.hparams.items()
        }
        return dataclasses.replace(self, env_steps=env_steps, hparams=hparams)


# PPO's settings for boards.
MINATAR = {
    "num_envs": 64,
    "num_minibatches": 8,
    "activation": "relu",
    "hidden_sizes": (64,),
    "shared_torso": True,
}
MINATAR_STEPS = 10_000_000

ROWS = {
    "ppo-cartpole": Row("ppo", "CartPole-v1", 500_000, 495.0),
    "dqn-cartpole": Row("dqn", "CartPole-v1", 500_000, 495.0),
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
        MINATAR_STEPS,
        45.0,
        {
            **MINATAR,
            "hidden_sizes": (64, 64),
            "torso": "mlp",
            "shared_torso": False,
            "clip_value": False,  # a trial of one seed had 81 so, 17 with clipping
        },
        {"learning_rate": 5e-3, "anneal_env_steps": float(MINATAR_STEPS)},
    ),
    **{
        f"ppo-{game.lower()}-minatar": Row(
            "ppo",
            f"{game}-MinAtar",
            MINATAR_STEPS,
            goal,
            MINATAR,
            {"learning_rate": 5e-3, "anneal_env_steps": float(MINATAR_STEPS)},
        )
        for game, goal in (("Asterix", 18.0), ("Freeway", 60.0), ("SpaceInvaders", 140.0))
    },
    **{
        f"pqn-{game.lower()}-minatar": Row(
            "pqn",
            f"{game}-MinAtar",
            MINATAR_STEPS,
            goal,
            {"hidden_sizes": (128,)},
            {
                "anneal_env_steps": float(MINATAR_STEPS),
                "epsilon_env_steps": 0.1 * MINATAR_STEPS,
                "q_lambda": 0.65,
            },
        )
        for game, goal in (("Breakout", 37.0), ("Asterix", 55.0), ("Freeway", 63.0), ("SpaceInvaders", 128.0))
    },
}


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the interquartile mean."""
    interval = statistics.bootstrap_interval(interquartile_mean, values, resamples=resamples)
    return round(float(interval.low), 2), round(float(interval.high), 2)


def curve_point(env_steps: jax.Array, metrics: jrl.types.Metrics) -> tuple[int, float | None]:
    """Return the steps so far and the mean return of the episodes in ``metrics``; None where none ended."""
    summary = jrl.training.summarize(metrics)
    returned = round(float(summary["episode_return"]), 2) if summary["num_episodes"] > 0 else None
    return jrl.ops.counter.to_int(env_steps), returned


def measure(
    name: str, row: Row, seeds: int, at_once: bool = False, kernels: str | None = None
) -> dict[str, Any]:
    """Train and evaluate ``seeds`` seeds of ``row``, in turn or ``at_once``; return its record.

    ``kernels`` is a field of the algorithm's config, None where it has none: what computes, and no part of the row.
    """
    # Before the training, in which the clone may move on.
    commit = recording.commit(Path(__file__).parent)
    module = getattr(jrl, row.algorithm)
    env = jrl.make(row.env)
    choice = {} if kernels is None else {"kernels": kernels}
    algo = module.make(env, module.Config(**row.config, **choice))
    hparams = jax.tree.map(np.float32, module.HParams(**row.hparams))
    groups = [list(range(seeds))] if at_once else [[seed] for seed in range(seeds)]
    each = jax.vmap if at_once else lambda function: function

    def keys(group: list[int], base: int = 0) -> jax.Array:
        made = [jax.random.key(base + seed) for seed in group]
        return jax.numpy.stack(made) if at_once else made[0]

    def members(tree: Any, group: list[int]) -> list[Any]:
        if not at_once:
            return [tree]
        leaves, treedef = jax.tree.flatten(tree)
        return [jax.tree.unflatten(treedef, [leaf[i] for leaf in leaves]) for i in range(len(group))]

    def evaluate(key: jax.Array, state: Any) -> Any:
        return jrl.evaluate(key, env, algo.policy(state), num_episodes=100)

    init = jax.jit(each(lambda key: algo.init(key, hparams))).lower(keys(groups[0])).compile()
    state = init(keys(groups[0]))
    begun = jrl.ops.counter.to_int(members(state.env_steps, groups[0])[0])
    num_steps = -(-(row.env_steps - begun) // algo.env_steps_per_step)
    chunk = -(-num_steps // CURVE_POINTS)
    train = each(lambda state: jrl.train(algo, state, hparams, num_steps=chunk))
    train = jax.jit(train, donate_argnums=0).lower(state).compile()
    records = []
    for group in groups:
        state = init(keys(group))
        curves: list[list] = [[] for _ in group]
        seconds, processor = 0.0, 0.0
        for _ in range(-(-num_steps // chunk)):
            start, processor_start = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(train(state))
            seconds += time.perf_counter() - start
            processor += time.process_time() - processor_start  # without the pauses of a shared machine
            counters = members(state.env_steps, group)
            for curve, counter, metric in zip(curves, counters, members(metrics, group), strict=True):
                curve.append(curve_point(counter, metric))
        stats = members(each(evaluate)(keys(group, EVAL_SEED), state), group)
        for seed, curve, stat in zip(group, curves, stats, strict=True):
            returns = np.asarray(stat.episode_return)
            records.append(
                {
                    "seed": seed,
                    "return_mean": round(float(returns.mean()), 2),
                    "return_std": round(float(returns.std()), 2),
                    "return_min": round(float(returns.min()), 2),
                    "episodes_completed": int(stat.completed.sum()),
                    "env_steps": curve[-1][0],
                    "train_seconds": round(seconds, 2),  # at once: of all seeds together
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
        "at_once": at_once,
        "kernels": kernels or "xla",
        "eval_episodes": 100,
        "greedy": True,
        "iqm": round(interquartile_mean(finals), 2),
        "iqm_interval_95": bootstrap_interval(finals),
        "mean": round(float(finals.mean()), 2),
        "worst": float(finals.min()),
        "jax": jax.__version__,
        "jrl": jrl.__version__,
        "device": f"{jax.devices()[0]} {jax.devices()[0].device_kind}",
        "commit": commit,
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
    parser.add_argument("--env-steps", type=int, help="instead of the row's own; schedules too")
    parser.add_argument(
        "--kernels", choices=("xla", "native"), help="of the rows whose config has the choice"
    )
    parser.add_argument("--at-once", action="store_true", help="all seeds in one program, for a GPU")
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
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1.")
    if arguments.list or not arguments.rows:
        for name, row in ROWS.items():
            print(f"{name:32} {row.algorithm} on {row.env}, {row.env_steps:,} env steps, goal {row.goal}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.rows:
        row = ROWS[name]
        if arguments.env_steps:
            row = row.lasting(arguments.env_steps)
        has_kernels = hasattr(getattr(jrl, row.algorithm).Config, "kernels")
        kernels = arguments.kernels if has_kernels else None
        record = measure(name, row, arguments.seeds, arguments.at_once, kernels)
        path = arguments.out / f"learning-{name}.json"
        text = json.dumps(record, indent=1)
        path.write_text(text + "\n")
        print(f"{name}: IQM {record['iqm']} {record['iqm_interval_95']}, goal {row.goal} -> {path}")


if __name__ == "__main__":
    main()
