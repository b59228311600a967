"""Updates a second of thousands of independent tabular learners in one ``vmap``, for several layouts.

    python benchmarks/tabular.py --core 0
    python benchmarks/tabular.py --target q_learning --learners 1024 4096 --core 0

A repeat is ``env_steps`` environment steps over all learners together, each with its action, its step of the
environment and its update of the table; with planning each planned update counts too. Compiled beforehand and
timed until the results are ready. Rates are per second of wall clock and per second of processor time; on a
machine that others use the second says what the core can do. Layouts are the number of learners in one vmap
and, with ``--batch``, chunks of so many learners that ``lax.map`` runs in turn. One JSON line for each is
appended to ``benchmarks/results/tabular.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, append, cores, count, header, machine, pin, spread, timed


@dataclasses.dataclass(frozen=True)
class Learning:
    """What one repeat computes."""

    env: str = "GridWorld-jrl"
    target: str = "q_learning"
    planning_updates: int = 0
    learners: int = 4096
    batch: int = 0
    unroll_length: int = 64
    env_steps: int = 2**22

    @property
    def num_steps(self) -> int:
        """Steps of the algorithm for each learner."""
        return max(1, self.env_steps // (self.learners * self.unroll_length))

    @property
    def updates(self) -> int:
        """Updates of a table entry in one repeat."""
        return self.learners * self.num_steps * self.unroll_length * (1 + self.planning_updates)


class Learners:
    """A compiled training of all learners."""

    def __init__(self, work: Learning) -> None:
        import jax
        import jax.numpy as jnp

        import jrl
        from jrl import tabular

        config = tabular.Config(
            target=work.target, planning_updates=work.planning_updates, unroll_length=work.unroll_length
        )
        algo = tabular.make(jrl.make(work.env, raw=True), config)
        self.hparams = jax.tree.map(jnp.float32, tabular.HParams(gamma=0.9))

        def one(state: Any, hparams: Any) -> Any:
            return jax.lax.fori_loop(0, work.num_steps, lambda _, s: algo.step(s, hparams)[0], state)

        def run(states: Any, hparams: Any) -> Any:
            if work.batch:
                return jax.lax.map(lambda state: one(state, hparams), states, batch_size=work.batch)
            return jax.vmap(one, (0, None))(states, hparams)

        def init(key: Any, hparams: Any) -> Any:
            return jax.vmap(algo.init, (0, None))(jax.random.split(key, work.learners), hparams)

        self.init = lambda seed: jax.jit(init)(jax.random.key(seed), self.hparams)
        # Donated, so that every repeat goes on from the tables of the last, in place.
        self.compiled = jax.jit(run, donate_argnums=0).lower(self.init(0), self.hparams).compile()

    def repeat(self, states: Any) -> tuple[Any, float, float]:
        """Return the new states, wall-clock and processor seconds."""
        return timed(lambda: self.compiled(states, self.hparams))


def measure(work: Learning, repeats: int) -> dict[str, Any]:
    """Time ``repeats`` repeats after one that warms up."""
    import numpy as np

    learners = Learners(work)
    states = learners.init(1)
    rows: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        states, seconds, cpu = learners.repeat(states)
        rows.append({"seconds": round(seconds, 6), "cpu_seconds": round(cpu, 6)})
    del rows[0]
    return {
        **header("tabular", work),
        "updates_per_second": spread([work.updates / row["seconds"] for row in rows]),
        "updates_per_cpu_second": spread([work.updates / row["cpu_seconds"] for row in rows]),
        # What was learned, so that no layout can leave something out: with γ = 0.9 the start is worth 0.59049.
        "start_value": round(float(np.asarray(states.params)[..., 0, :].max(-1).mean()), 4),
        "machine": machine(),
        "repeats": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", default=["q_learning"])
    parser.add_argument("--planning", type=int, default=0, help="planned updates a step (Dyna-Q)")
    parser.add_argument("--learners", type=count, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[0], help="learners at once; 0: all")
    parser.add_argument("--unroll-length", type=count, nargs="+", default=[64])
    parser.add_argument("--env-steps", type=count, default=Learning.env_steps, help="of one repeat")
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--core", type=cores, default=[], help="core(s) to pin to, such as 0 or 0,1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    pin(arguments.core)
    from jrl import xla

    xla.configure()
    for target in arguments.target:
        for learners in arguments.learners:
            for unroll_length in arguments.unroll_length:
                for batch in arguments.batch:
                    work = Learning(
                        target=target,
                        planning_updates=arguments.planning,
                        learners=learners,
                        batch=batch,
                        unroll_length=unroll_length,
                        env_steps=arguments.env_steps,
                    )
                    record = measure(work, arguments.repeats)
                    wall, cpu = record["updates_per_second"], record["updates_per_cpu_second"]
                    print(
                        f"{target} x {learners} (batch {batch or 'all'}, unroll {unroll_length}): "
                        f"{wall['median'] / 1e6:.2f} M updates/s, {cpu['median'] / 1e6:.2f} M per processor second, "
                        f"start value {record['start_value']}",
                        flush=True,
                    )
                    append(arguments.out / "tabular.jsonl", record)


if __name__ == "__main__":
    main()
