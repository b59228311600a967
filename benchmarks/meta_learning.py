"""MAML on the two problems of its paper (Finn et al., 2017, https://arxiv.org/abs/1703.03400) that need no downloads.

    python benchmarks/meta_learning.py sinusoid navigation --seeds 5

``sinusoid``: regression of sines whose amplitude [0.1, 5] and phase [0, π] differ by task, 10 points of each in
[-5, 5], by the paper's network of 2 × 40: squared error on 10 other points after 0 … 10 gradient steps of 0.01, over
2,000 tasks. ``navigation``: Navigation2D-jrl, goals in [-0.5, 0.5]²: return after 0 … 3 policy-gradient steps of 20
episodes each, over 50 goals; each number of steps by the step size that was best on 50 other goals. Both are compared
with pretraining: the same training without an inner step, one network for all tasks.

A record for each goes to ``benchmarks/results/meta-<name>.json``, a figure beside it; ``--plot`` draws that again.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

from jrl import xla

xla.configure()

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

import jrl
from jrl import maml, meta, stages
from jrl.bench.recording import commit

RESULTS = Path(__file__).parent / "results"
KINDS = {"maml": 1, "pretrained": 0}  # inner steps in training
EVAL_SEED = 10_000  # evaluation keys are those of seeds that no training uses
SINUSOID = {
    "shots": 10,
    "learning_rate": 3e-3,
    "inner_learning_rate": 0.01,
    "batch_size": 25,
    "tasks": 200_000,
}
NAVIGATION = {"learning_rate": 1e-2, "inner_learning_rate": 0.1}
CURVE_UPDATES = 10  # of navigation, a point of its learning curve
STEP_SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SINUSOID_BARS = ((1, 0.5), (10, 0.2))  # steps, error after them at most


# --------------------------------------------------------------------------------------------- sinusoids


class Sine(nn.Module):
    """The network of the paper, ``x [..., 1] ↦ y [...]``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in (40, 40):
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(1)(x)[..., 0]


def sinusoids(key: jax.Array, num: int) -> tuple[Any, Any]:
    """Draw tasks: ``(train, test)``, each ``(x [num, 10, 1], y [num, 10])``."""
    amplitude_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, (num, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, (num, 1), maxval=jnp.pi)
    x = jax.random.uniform(x_key, (num, 2 * SINUSOID["shots"]), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    (x, test_x), (y, test_y) = (jnp.split(leaf, 2, axis=1) for leaf in (x[..., None], y))
    return (x, y), (test_x, test_y)


def sine_loss(params: Any, data: Any) -> jax.Array:
    x, y = data
    return jnp.square(Sine().apply(params, x) - y).mean()


sine_objective = functools.partial(
    meta.objective, sine_loss, sine_loss, learning_rate=SINUSOID["inner_learning_rate"]
)


def train_sinusoids(key: jax.Array, *, num_steps: int, updates: int, first_order: bool = False) -> Any:
    """Return the parameters after so many updates, on tasks drawn anew for each key."""
    network_key, task_key, fit_key = jax.random.split(key, 3)
    params, _ = stages.fit(
        fit_key,
        functools.partial(sine_objective, num_steps=num_steps, first_order=first_order),
        Sine().init(network_key, jnp.zeros((1, 1))),
        sinusoids(task_key, SINUSOID["tasks"]),
        num_steps=updates,
        batch_size=SINUSOID["batch_size"],
        learning_rate=SINUSOID["learning_rate"],
    )
    return params


def errors(params: Any, tasks: Any, steps: tuple[int, ...]) -> list[float]:
    """Return the mean squared error on new points of each task after so many gradient steps."""
    return [round(float(_error(params, tasks, k)), 4) for k in steps]


@functools.partial(jax.jit, static_argnums=2)
def _error(params: Any, tasks: Any, num_steps: int) -> jax.Array:
    return sine_objective(params, tasks, num_steps=num_steps)


def measure_sinusoid(seeds: int, updates: int) -> dict[str, Any]:
    kinds = {"maml": (1, False), "first_order": (1, True), "pretrained": (0, False)}
    steps, tasks = tuple(range(11)), sinusoids(jax.random.key(EVAL_SEED), 2_000)
    records = []
    for kind, (num_steps, first_order) in kinds.items():
        train = jax.jit(
            functools.partial(train_sinusoids, num_steps=num_steps, updates=updates, first_order=first_order)
        )
        for seed in range(seeds):
            start = time.perf_counter()
            params = jax.block_until_ready(train(jax.random.key(seed)))
            seconds = round(time.perf_counter() - start, 1)
            records.append(
                {"kind": kind, "seed": seed, "score": errors(params, tasks, steps), "seconds": seconds}
            )
            print(f"sinusoid {kind} {seed}: {records[-1]['score']} in {seconds} s", flush=True)
    return {"settings": SINUSOID | {"updates": updates}, "steps": steps, "records": records}


# -------------------------------------------------------------------------------------------- navigation


def measure_navigation(seeds: int, updates: int) -> dict[str, Any]:
    env, steps, records = jrl.make("Navigation2D-jrl"), tuple(range(4)), []
    for kind, inner_steps in KINDS.items():
        # As many episodes an update for both.
        config = maml.Config(inner_steps=inner_steps, num_envs=20 if inner_steps else 40)
        algo, adapt = maml.make(env, config), maml.adaptation(env, maml.Config())
        env_steps = float(updates * algo.env_steps_per_step)
        hparams = jax.tree.map(np.float32, maml.HParams(**NAVIGATION, anneal_env_steps=env_steps))

        @jax.jit
        def returns(key, params, step_size, hparams=hparams, adapt=adapt):
            """Mean over 50 goals, ``[4]``."""

            def one(key):
                goal_key, adapt_key = jax.random.split(key)
                goal = jax.random.uniform(goal_key, (2,), minval=-0.5, maxval=0.5)
                task = hparams.replace(inner_learning_rate=step_size, env=env.params._replace(goal=goal))
                return adapt(adapt_key, params, task, steps[-1])[1]

            return jax.vmap(one)(jax.random.split(key, 50)).mean(0)

        init = jax.jit(algo.init)
        train = jax.jit(
            lambda state, algo=algo, hparams=hparams: jrl.train(algo, state, hparams, num_steps=CURVE_UPDATES)
        )
        for seed in range(seeds):
            start, state, curve = time.perf_counter(), init(jax.random.key(seed), hparams), []
            for _ in range(updates // CURVE_UPDATES):
                state, metrics = train(state)
                curve.append(round(float(metrics["episode_return"].mean()), 2))
            seconds = round(time.perf_counter() - start, 1)
            choose_key, test_key = jax.random.split(jax.random.key(EVAL_SEED + seed))
            chosen = np.stack([returns(choose_key, state.params, size) for size in STEP_SIZES])
            best = chosen.argmax(0)
            tested = {i: returns(test_key, state.params, STEP_SIZES[i]) for i in set(best.tolist())}
            records.append(
                {
                    "kind": kind,
                    "seed": seed,
                    "score": [round(float(tested[best[k]][k]), 2) for k in steps],
                    "step_size": [STEP_SIZES[i] for i in best],
                    "chosen_from": chosen.round(2).tolist(),
                    "curve": curve,
                    "env_steps": int(env_steps),
                    "seconds": seconds,
                }
            )
            print(f"navigation {kind} {seed}: {records[-1]['score']} in {seconds} s", flush=True)
    settings = NAVIGATION | {"updates": updates, "step_sizes": STEP_SIZES}
    return {"settings": settings, "steps": steps, "records": records}


# ------------------------------------------------------------------------------------ records and figures

PROBLEMS = {"sinusoid": (measure_sinusoid, 15_000), "navigation": (measure_navigation, 100)}


def scores(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return ``[seeds, steps]`` of each kind."""
    rows: dict[str, list] = {}
    for seed in record["records"]:
        rows.setdefault(seed["kind"], []).append(seed["score"])
    return {kind: np.array(values) for kind, values in rows.items()}


def plot(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, values in scores(record).items():
        (line,) = axes.plot(record["steps"], values.mean(0), marker="o", label=kind.replace("_", " "))
        axes.fill_between(record["steps"], values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    sinusoid = record["problem"] == "sinusoid"
    axes.set(
        xlabel="gradient steps on a new task",
        ylabel="mean squared error" if sinusoid else "return",
        xticks=record["steps"],
        yscale="log" if sinusoid else "linear",
        title=f"{record['problem']}, {record['seeds']} seeds: mean, and range over seeds",
    )
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", nargs="*", choices=[*PROBLEMS, []], metavar="PROBLEM")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="instead of the problem's own, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="draw the figures of the records again")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1.")
    if arguments.updates is not None and (arguments.updates < 1 or arguments.updates % CURVE_UPDATES):
        parser.error(
            f"--updates {arguments.updates}: must be a multiple of {CURVE_UPDATES}, each a point of a curve."
        )
    for name in arguments.problems or PROBLEMS:
        path = arguments.out / f"meta-{name}.json"
        if not arguments.plot:
            measure, updates = PROBLEMS[name]
            record = {
                "problem": name,
                "seeds": arguments.seeds,
                **measure(arguments.seeds, arguments.updates or updates),
                "jax": jax.__version__,
                "jrl": jrl.__version__,
                "device": str(jax.devices()[0]),
                "commit": commit(Path(__file__).parent),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
        elif not path.exists():
            parser.error(f"--plot: there is no record {path}; measure it first, without --plot.")
        record = json.loads(path.read_text())
        plot(record).savefig(path.with_suffix(".png"), dpi=120)
        for kind, values in scores(record).items():
            print(f"{name} {kind}: {values.mean(0).round(3).tolist()} after {record['steps']} steps")


if __name__ == "__main__":
    main()
