"""Each refinement of DQN against plain DQN, on a task where its paper says it matters.

    python benchmarks/ablations.py double noisy
    python benchmarks/ablations.py --all
    python benchmarks/ablations.py --plot

Each ablation trains its variants with the same seeds, keeps what was measured along the way in
``benchmarks/results/ablation-<name>.json`` and draws ``ablation-<name>.png`` from it: a line a variant, the mean over
seeds, and a band from the worst seed to the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jrl import xla

xla.configure()

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jrl
from jrl import dqn, envs, r2d2
from jrl.algos import q_functions
from jrl.bench.recording import commit
from jrl.plots import COLOURS
from jrl.types import Discrete, Environment

RESULTS = Path(__file__).parent / "results"
POINTS = 20
NUM_ACTIONS = 10
# Two rewards, one after the other, each drawn from three values: the return has nine.
REWARDS, CHANCES, GAMMA = np.array([0.0, 1.0, 4.0]), np.array([0.5, 0.3, 0.2]), 0.9


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Variants on one environment.

    ``variants`` are label -> (fields of Config, fields of HParams), ``measure(algo, config, state, key) -> number`` is
    what the figure shows; None is the greedy return. ``expected`` is drawn as a line.
    """

    question: str
    source: str
    env: Callable[[], Environment]
    variants: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
    env_steps: int
    ylabel: str = "greedy return"
    measure: Callable[..., Any] | None = None
    module: Any = dqn
    expected: float | None = None
    seeds: int = 5


def zero_mean() -> Environment:
    """One state, ten actions, rewards from N(0, 1), no end: every value is 0."""

    def transition(key, state, action, params):
        return state, jnp.ones(1), jax.random.normal(key), False, False

    return envs.from_functions(
        lambda key, params: ((), jnp.ones(1)),
        transition,
        (),
        Discrete(NUM_ACTIONS),
        "ten actions of mean zero",
    )


def two_draws() -> Environment:
    """Two steps, each with a reward from ``REWARDS``, whatever one does."""

    def transition(key, time, action, params):
        reward = jax.random.choice(key, jnp.asarray(REWARDS), p=jnp.asarray(CHANCES))
        return time + 1, jnp.ones(1), reward, time == 1, False

    return envs.from_functions(
        lambda key, params: (jnp.int32(0), jnp.zeros(1)), transition, (), Discrete(2), "two draws"
    )


def two_arms() -> Environment:
    """One step, action 0 gives 0 and action 1 gives 0.1."""

    def transition(key, state, action, params):
        return state, jnp.ones(1), 0.1 * action, True, False

    return envs.from_functions(lambda key, params: ((), jnp.ones(1)), transition, (), Discrete(2), "two arms")


def catch_with_spare_actions() -> Environment:
    """Catch with 27 more actions that all stay where one is."""
    env = jrl.make("Catch-bsuite")
    return envs.transform_action(env, lambda action: jnp.where(action < 3, action, 1), Discrete(30))


def corridor(length: int = 50, num_actions: int = 4) -> Environment:
    """In each place one action leads on, for 1 / ``length``; any other ends the episode, and so does the last place."""
    ahead = jnp.asarray(np.random.default_rng(0).integers(num_actions, size=length))

    def transition(key, place, action, params):
        leads_on, last = action == ahead[place], place == length - 1
        place = jnp.minimum(place + 1, length - 1)
        reward = jnp.where(leads_on, 1.0 / length, 0.0)
        return place, jax.nn.one_hot(place, length), reward, ~leads_on | last, False

    return envs.from_functions(
        lambda key, params: (jnp.int32(0), jax.nn.one_hot(0, length)),
        transition,
        (),
        Discrete(num_actions),
        "corridor",
    )


def greedy_return(algo: Any, config: Any, state: Any, key: Any) -> Any:
    return jrl.evaluate(key, algo.env, algo.policy(state), num_episodes=64).episode_return.mean()


def mean_value(algo: Any, config: Any, state: Any, key: Any) -> Any:
    return algo.policy(state)(key, jnp.ones((1, 1)))[2]["q"].mean()


def action_gap(algo: Any, config: Any, state: Any, key: Any) -> Any:
    q = algo.policy(state)(key, jnp.ones((1, 1)))[2]["q"][0]
    return q[1] - q[0]


def learned_distribution(algo: Any, config: Any, state: Any) -> tuple[Any, Any]:
    """Return values and probabilities of the return at the first step, as the network has them."""
    q_function = q_functions.make(algo.env, config, None, "dqn")
    output = q_function.evaluate(state.params, jnp.zeros((1, 1)))
    match config.distribution:
        case "none":
            return output[0, :1], jnp.ones(1)
        case "categorical":
            return state.support, jax.nn.softmax(output[0, 0])
    value = output.value[0, 0]
    return value, jnp.full(value.shape, 1.0 / value.size)


def true_distribution() -> tuple[np.ndarray, np.ndarray]:
    return (REWARDS[:, None] + GAMMA * REWARDS).ravel(), (CHANCES[:, None] * CHANCES).ravel()


def wasserstein(algo: Any, config: Any, state: Any, key: Any) -> Any:
    """1-Wasserstein distance between learned and true distribution: the area between their functions."""
    value, probability = learned_distribution(algo, config, state)
    true_value, true_probability = true_distribution()
    grid = jnp.linspace(-4.0, 12.0, 1601)

    def cdf(value, probability):
        return (probability * (value <= grid[:, None])).sum(-1)

    difference = cdf(value, probability) - cdf(jnp.asarray(true_value), jnp.asarray(true_probability))
    return jnp.abs(difference).sum() * (grid[1] - grid[0])


SMALL = {
    "num_envs": 16,
    "unroll_length": 4,
    "num_updates": 4,
    "batch_size": 64,
    "capacity": 20_000,
    "warmup_env_steps": 1_000,
    "hidden_sizes": (64, 64),
}
DEEP_SEA = {"warmup_env_steps": 500, "capacity": 50_000, "batch_size": 64, "hidden_sizes": (64, 64)}
BARE = {"layer_norm": False}  # which would divide the noise on the first layers away
MOUNTAIN_CAR = {
    "num_envs": 8,
    "unroll_length": 2,
    "num_updates": 4,
    "batch_size": 64,
    "hidden_sizes": (64, 64),
}
MOUNTAIN_CAR_NUMBERS = {
    "learning_rate": 1e-3,
    "anneal_env_steps": 2e5,
    "target_period": 600.0,
    "epsilon_env_steps": 3e4,
    "epsilon_end": 0.02,
}
NOISY = {"epsilon_start": 0.0, "epsilon_end": 0.0}
RANDOM = {"epsilon_start": 1.0, "epsilon_end": 1.0}
DRAWS = RANDOM | {
    "gamma": GAMMA,
    "learning_rate": 2e-3,
    "anneal_env_steps": 100_000.0,
    "target_period": 512.0,
}


def distribution(name: str, source: str, **choices: Any) -> Ablation:
    return Ablation(
        "Does it learn the distribution of a return of nine values?",
        source,
        two_draws,
        {
            "plain (the mean alone)": (SMALL, DRAWS),
            # Quantiles of a sharp loss: with δ = 1, as for Atari, they are smoothed over about ± 1.
            name: (SMALL | choices, DRAWS | {"value_min": -2.0, "value_max": 10.0, "huber_delta": 0.05}),
        },
        100_000,
        ylabel="Wasserstein distance to the true distribution",
        measure=wasserstein,
        seeds=3,
    )  # fmt: skip


ABLATIONS = {
    "double": Ablation(
        "Ten actions of mean zero: how much is each overestimated?",
        "van Hasselt et al., 2016",
        zero_mean,
        {
            label: (
                SMALL
                | {"num_envs": 32, "batch_size": 32, "capacity": 65_536, "layer_norm": False}
                | {"hidden_sizes": (32,), "double": label == "double"},
                RANDOM
                | {"gamma": 0.9, "learning_rate": 1e-2, "anneal_env_steps": 0.0, "target_period": 6_400.0},
            )
            for label in ("plain", "double")
        },
        200_000,
        ylabel="mean action value (true: 0)",
        measure=mean_value,
        expected=0.0,
    ),
    "dueling": Ablation(
        "Catch with 27 spare actions: how soon is it learned?",
        "Wang et al., 2016",
        catch_with_spare_actions,
        {
            label: (
                SMALL | {"dueling": label == "dueling"},
                {"epsilon_env_steps": 20_000.0, "anneal_env_steps": 0.0},
            )
            for label in ("plain", "dueling")
        },
        80_000,
    ),
    "prioritized": Ablation(
        "DeepSea of size 11, a reward in 20,000 random steps: how soon is it learned?",
        "Schaul et al., 2016, figure 1",
        lambda: jrl.make("DeepSea-bsuite", size=11),
        {
            label: (
                DEEP_SEA
                | {"warmup_env_steps": 100_000, "capacity": 150_000, "num_updates": 4}
                | {"prioritized": label == "prioritized"},
                RANDOM | {"anneal_env_steps": 0.0, "target_period": 100.0},
            )
            for label in ("plain", "prioritized")
        },
        30_000,
    ),
    "n-step": Ablation(
        "Catch, where the reward comes at the end of an episode: how soon is it learned?",
        "Sutton, 1988; Hessel et al., 2018",
        lambda: jrl.make("Catch-bsuite"),
        {
            label: (SMALL | {"n_step": n}, {"epsilon_env_steps": 20_000.0, "anneal_env_steps": 0.0})
            for label, n in (("plain", 1), ("3 steps", 3), ("9 steps", 9))
        },
        40_000,
    ),
    "categorical": distribution("categorical", "Bellemare et al., 2017", distribution="categorical"),
    "quantile": distribution("quantile", "Dabney et al., 2018", distribution="quantile", num_atoms=32),
    "implicit": distribution("implicit", "Dabney et al., 2018 (IQN)", distribution="implicit", num_atoms=32),
    "noisy": Ablation(
        "DeepSea, where random actions rarely reach the reward: who explores to it?",
        "Fortunato et al., 2018",
        lambda: jrl.make("DeepSea-bsuite"),
        {
            "plain, ε = 0.05": (DEEP_SEA | BARE, {"epsilon_start": 0.05, "anneal_env_steps": 0.0}),
            "noisy, one draw for all": (DEEP_SEA | BARE | {"noisy": True}, NOISY | {"anneal_env_steps": 0.0}),
            "noisy, a draw an environment": (
                DEEP_SEA | BARE | {"noisy": True, "noise_draws": 10},
                NOISY | {"anneal_env_steps": 0.0},
            ),
        },
        50_000,
        seeds=8,
    ),
    "noisy-corridor": Ablation(
        "A corridor where three of four actions end the episode: how much of it is learned?",
        "Fortunato et al., 2018",
        corridor,
        {
            "no exploration": (DEEP_SEA | BARE, NOISY | {"anneal_env_steps": 0.0}),
            "ε = 0.05": (DEEP_SEA | BARE, {"epsilon_start": 0.05, "anneal_env_steps": 0.0}),
            **{
                f"noisy, σ₀ = {scale}": (
                    DEEP_SEA | BARE | {"noisy": True, "noise_draws": 10},
                    NOISY | {"anneal_env_steps": 0.0, "noise_scale": scale},
                )
                for scale in (0.5, 2.0)
            },
        },
        30_000,
        expected=1.0,
        seeds=8,
    ),
    "persistent": Ablation(
        "MountainCar, where independent random actions cancel out: who gets to the top?",
        "Dabney et al., 2021",
        lambda: jrl.make("MountainCar-v0"),
        {
            label: (MOUNTAIN_CAR | {"persistent": label == "persistent"}, MOUNTAIN_CAR_NUMBERS)
            for label in ("plain", "persistent")
        },
        150_000,
        seeds=4,
    ),
    "munchausen": Ablation(
        "Two arms that differ by 0.1: how far apart are their values? (0.1 / (1 − α))",
        "Vieillard et al., 2020",
        two_arms,
        {
            label: (
                SMALL | {"munchausen": alpha is not None, "double": alpha is None},
                RANDOM
                | {"munchausen_coef": alpha or 0.0, "munchausen_min": -100.0, "learning_rate": 2e-3}
                | {"anneal_env_steps": 100_000.0, "target_period": 512.0},
            )
            for label, alpha in (("plain", None), ("α = 0.5", 0.5), ("α = 0.9", 0.9))
        },
        100_000,
        ylabel="action gap",
        measure=action_gap,
        seeds=3,
    ),
    "memory": Ablation(
        "MemoryChain: the answer was shown at the start. Who knows it?",
        "Kapturowski et al., 2019",
        lambda: jrl.make("MemoryChain-bsuite"),
        {
            label: ({"memory": memory}, {"epsilon_env_steps": 30_000.0, "anneal_env_steps": 1e5})
            for label, memory in (("no memory", "none"), ("gru", "gru"))
        },
        60_000,
        module=r2d2,
        seeds=3,
    ),
}


def measure(name: str, ablation: Ablation, seeds: int, env_steps: int) -> dict[str, Any]:
    """Train every variant; return the record."""
    env, took, curves, extra = ablation.env(), time.perf_counter(), {}, {}
    of = ablation.measure or greedy_return
    for label, (choices, numbers) in ablation.variants.items():
        config = ablation.module.Config(**choices)
        algo = ablation.module.make(env, config)
        hparams = jax.tree.map(np.float32, ablation.module.HParams(**numbers))
        chunk = max(1, env_steps // algo.env_steps_per_step // POINTS)
        init = jax.jit(algo.init)

        @jax.jit
        def advance(state, key, algo=algo, config=config, hparams=hparams, chunk=chunk):
            state, _ = jrl.train(algo, state, hparams, num_steps=chunk)
            return state, of(algo, config, state, key)

        curves[label] = []
        for seed in range(seeds):
            state, curve = init(jax.random.key(seed), hparams), []
            for point in range(POINTS):
                state, value = advance(state, jax.random.fold_in(jax.random.key(10_000 + seed), point))
                curve.append([jrl.ops.counter.to_int(state.env_steps), round(float(value), 4)])
            curves[label].append(curve)
        print(f"{name}, {label}: {[curve[-1][1] for curve in curves[label]]}", flush=True)
        if ablation.measure is wasserstein:
            value, probability = learned_distribution(algo, config, state)
            extra[label] = np.round([value, probability], 4).tolist()
    return {
        "ablation": name,
        "question": ablation.question,
        "source": ablation.source,
        "env": env.name,
        "seeds": seeds,
        "ylabel": ablation.ylabel,
        "expected": ablation.expected,
        "variants": {label: {"config": c, "hparams": h} for label, (c, h) in ablation.variants.items()},
        "curves": curves,
        "distributions": extra,
        "seconds": round(time.perf_counter() - took, 1),
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
        "commit": commit(Path(__file__).parent),
    }


def plot(record: dict[str, Any]) -> Figure:
    """Draw the record: the curves, and of distributions their last state beside the truth."""
    distributions = record["distributions"]
    figure = Figure(figsize=(10, 4) if distributions else (6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if distributions else 1, squeeze=False)[0]
    for colour, (label, runs) in zip(COLOURS, record["curves"].items(), strict=False):
        steps, values = np.array(runs)[0, :, 0], np.array(runs)[:, :, 1]
        axes[0].plot(steps, values.mean(0), color=colour, label=label)
        axes[0].fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        if label in distributions:
            axes[1].step(*cumulative(*distributions[label]), where="post", color=colour, label=label)
    if record["expected"] is not None:
        axes[0].axhline(record["expected"], color="black", lw=0.8, ls=":")
    axes[0].set(xlabel="environment steps", ylabel=record["ylabel"])
    axes[0].legend(frameon=False)
    if distributions:
        axes[1].step(*cumulative(*true_distribution()), where="post", color="black", ls=":", label="true")
        axes[1].set(xlabel="return", ylabel="probability of at most this return", xlim=(-2.5, 10.5))
        axes[1].legend(frameon=False)
    figure.suptitle(
        f"{record['question']}\n{record['source']}; {record['seeds']} seeds, mean and range", fontsize=10
    )
    return figure


def cumulative(value: Any, probability: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of a distribution function from below its support to above it."""
    order = np.argsort(value)
    value, total = np.asarray(value)[order], np.asarray(probability)[order].cumsum()
    return np.concatenate([[-3.0], value, [11.0]]), np.concatenate([[0.0], total, total[-1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="ABLATION", help=", ".join(ABLATIONS))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--plot", action="store_true", help="draw the figures of the records again")
    parser.add_argument("--seeds", type=int, help="instead of the ablation's own")
    parser.add_argument("--env-steps", type=int, help="instead of the ablation's own, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(ABLATIONS))
    if unknown:
        parser.error(f"unknown ablation {', '.join(unknown)}: choose from {', '.join(ABLATIONS)}")
    if not (arguments.names or arguments.all or arguments.plot):
        parser.error(f"name an ablation, or --all: {', '.join(ABLATIONS)}")
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1.")
    absent = [name for name in arguments.names if not (arguments.out / f"ablation-{name}.json").exists()]
    if arguments.plot and absent:
        parser.error(
            f"--plot: there is no record of {absent[0]} in {arguments.out}; measure it first, without --plot."
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or (ABLATIONS if arguments.all or arguments.plot else ()):
        path, ablation = arguments.out / f"ablation-{name}.json", ABLATIONS[name]
        if not arguments.plot:
            record = measure(
                name, ablation, arguments.seeds or ablation.seeds, arguments.env_steps or ablation.env_steps
            )
            path.write_text(json.dumps(record) + "\n")
        if path.exists():
            plot(json.loads(path.read_text())).savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
