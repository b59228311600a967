"""Successive halving against the whole grid: which learning rate each finds, and with how many environment steps.

    python benchmarks/search.py                      # PPO on Acrobot-v1, 32 learning rates
    python benchmarks/search.py --algo dqn --env CartPole-v1

The grid trains every learning rate with every seed to the end; that is what is known of them. Then halving searches
the same learning rates several times, each time with seeds of its own, which the grid has not seen. A search has found
the best one if the grid's return there is within the 95 % interval of the grid's best. One JSON line is appended to
``benchmarks/results/search.jsonl``, and the figure ``search-<algorithm>-<environment>.png`` drawn beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, append, commit, count, load, machine, now, spread

from jrl import xla

LOW, HIGH = 1e-5, 1e-1


def returns(table: Any) -> dict[float, Any]:
    """Return the interval of the final return of each learning rate."""
    from jrl import statistics

    return {
        values["learning_rate"]: statistics.bootstrap_interval(
            statistics.interquartile_mean, part.final_returns
        )
        for values, part in table.groups()
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the grid and the searches."""
    import numpy as np

    from jrl import sweep

    rates = [float(f"{rate:.3g}") for rate in np.geomspace(LOW, HIGH, arguments.rates)]
    common: dict[str, Any] = {"env": arguments.env, "grid": {"learning_rate": rates}, "progress": "none"}
    common |= {"env_steps": arguments.env_steps, "eval_episodes": arguments.eval_episodes}
    grid = sweep.execute(arguments.algo, seeds=arguments.grid_seeds, **common)
    known = returns(grid.table)
    best = max(known, key=lambda rate: known[rate].estimate)
    print(f"grid: {best:g}, return {known[best].estimate:.1f}", flush=True)
    searches = []
    for repeat in range(arguments.searches):
        first = arguments.grid_seeds + repeat * arguments.seeds
        search = sweep.Halving(arguments.eta, arguments.rungs, arguments.min_env_steps)
        found = sweep.execute(
            arguments.algo, seeds=range(first, first + arguments.seeds), halving=search, **common
        )
        rate = found.summary["best"]["hparams"]["learning_rate"]
        spent = {
            values["learning_rate"]: float(np.mean(part.columns["env_steps"]))
            for values, part in found.table.groups()
        }
        ranks = sorted(known, key=lambda other: -known[other].estimate)
        searches.append({
            "learning_rate": rate,
            "rank_in_grid": 1 + ranks.index(rate),
            "return_in_grid": known[rate].estimate,
            "found": bool(known[rate].estimate >= known[best].low),
            "share_of_steps": sum(spent.values()) / (len(rates) * max(spent.values())),
            "env_steps": [spent[rate] for rate in rates],
            "seconds": found.summary["train_seconds"],
        })  # fmt: skip
        print({name: value for name, value in searches[-1].items() if name != "env_steps"}, flush=True)
    return {
        "learning_rates": rates,
        "grid": [list(known[rate]) for rate in rates],
        "grid_env_steps": grid.summary["env_steps"],
        "grid_seconds": grid.summary["train_seconds"],
        "best": {"learning_rate": best, "return": known[best].estimate},
        "searches": searches,
        "found": sum(search["found"] for search in searches),
        "share_of_steps": spread([search["share_of_steps"] for search in searches]),
    }


def draw(record: dict[str, Any], out: Path) -> None:
    """Draw the grid's returns, and below how far the searches trained each learning rate."""
    import numpy as np

    from jrl.plots import COLOURS, new_figure, plain

    rates, searches = record["learning_rates"], record["searches"]
    estimate, low, high = np.array(record["grid"]).T
    figure = new_figure(7.5, 5.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    above.fill_between(rates, low, high, color=COLOURS[0], alpha=0.2, lw=0)
    above.plot(rates, estimate, "o-", color=COLOURS[0], ms=4, label="grid: IQM over seeds, 95 % interval")
    for winner in sorted({search["learning_rate"] for search in searches}):
        count = sum(search["learning_rate"] == winner for search in searches)
        above.plot(
            winner, estimate[rates.index(winner)], "*", ms=15, color=COLOURS[1], mec="white",
            label=f"chosen by {count} of {len(searches)} searches: {winner:.3g}",
        )  # fmt: skip
    above.set_ylabel("final return")
    above.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    spent = 100 * np.mean([search["env_steps"] for search in searches], 0) / record["work"]["env_steps"]
    gap = rates[1] / rates[0]
    left = np.array(rates) * gap**-0.4
    below.bar(left, np.minimum(spent, 100), left * (gap**0.8 - 1), align="edge", color=COLOURS[1])
    below.set_xscale("log")
    below.set_ylim(0, 100)
    below.set_xlabel("learning_rate")
    below.set_ylabel("trained by a search,\n% of env_steps")
    plain(above)
    plain(below)
    share = 100 * record["share_of_steps"]["median"]
    above.set_title(
        f"{record['work']['algo']} on {record['work']['env']}: a search takes {share:.0f} % of the grid's steps",
        loc="left", fontsize=10,
    )  # fmt: skip
    figure.savefig(out, dpi=130)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--env", default="Acrobot-v1")
    parser.add_argument("--env-steps", type=count, default=100_000)
    parser.add_argument("--rates", type=int, default=32, help="learning rates, spaced by the logarithm")
    parser.add_argument("--grid-seeds", type=count, default=6)
    parser.add_argument("--seeds", type=count, default=3, help="of a search")
    parser.add_argument("--searches", type=count, default=5)
    parser.add_argument("--eta", type=float, default=3.0)
    parser.add_argument("--rungs", type=count, default=3, help="the last is the end of the run")
    parser.add_argument("--min-env-steps", type=int, default=0, help="before which a search stops nothing")
    parser.add_argument("--eval-episodes", type=count, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.rates < 2:
        parser.error(f"--rates {arguments.rates}: must be at least 2, to choose one of them.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    xla.configure(num_devices=xla.cores(), vmapped=False)
    work = {name: value for name, value in vars(arguments).items() if name != "out"}
    record = {"benchmark": "search", "time": now(), "commit": commit(Path(__file__).parent), "work": work}
    record |= {"load": load(), "machine": machine(), **compare(arguments)}
    append(arguments.out / "search.jsonl", record)
    draw(record, arguments.out / f"search-{arguments.algo}-{arguments.env}.png")
    print(
        f"found {record['found']} of {arguments.searches}, {record['share_of_steps']['median']:.3f} of the steps"
    )


if __name__ == "__main__":
    main()
