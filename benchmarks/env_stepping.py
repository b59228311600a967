"""Environment stepping alone: ``jrl.make`` and ``vectorize`` against gymnax's own ``step`` under ``vmap``.

    python benchmarks/env_stepping.py --core 0
    python benchmarks/env_stepping.py SpaceInvaders-MinAtar --num-envs 64 1024 --core 0

Both scan over the same random actions, drawn beforehand, and over one key a step, which gymnax's side splits
for its environments. Everything a step returns is carried to the next, gymnax's ``final_observation``
included, so that none of it can be left out. A repeat is compiled beforehand and timed until its results are
ready; the two run in turn, A B A B, in one process, and a ratio is that of a pair. The episodes that ended in
all repeats are counted for both: under equal rules they agree but for chance. One JSON line for each
environment and size is appended to ``benchmarks/results/env-stepping.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, append, cores, count, header, machine, pin, spread, timed

SIDES = ("jrl", "gymnax")


@dataclasses.dataclass(frozen=True)
class Stepping:
    """What one repeat computes."""

    env: str
    num_envs: int = 1024
    env_steps: int = 524_288

    @property
    def num_steps(self) -> int:
        """Steps of the whole batch."""
        return max(1, self.env_steps // self.num_envs)


def ours(work: Stepping) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return ``(reset, step, params)`` of jrl; ``step`` returns obs, reward, terminated, truncated, next_obs."""
    import jrl

    env = jrl.envs.vectorize(jrl.make(work.env), work.num_envs)
    return env.reset, env.step, env.params


def gymnaxs(work: Stepping) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return the same of gymnax."""
    import gymnax
    import jax
    import jax.numpy as jnp

    env, params = gymnax.make(work.env)

    def reset(key: Any, params: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, work.num_envs)
        obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, params)
        return jax.tree.map(lambda leaf, s: jnp.asarray(leaf, s.dtype), env_state, spec), obs

    def step(key: Any, env_state: Any, action: Any, params: Any) -> tuple[Any, tuple]:
        keys = jax.random.split(key, work.num_envs)
        stepped = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, env_state, action, params)
        obs, env_state, reward, terminated, truncated, info = stepped
        return env_state, (obs, reward, terminated, truncated, info["final_observation"])

    def one_step(key: Any) -> Any:
        action = env.action_space(params).sample(key)
        return env.step(key, env.reset(key, params)[1], action, params)[1]

    spec = jax.eval_shape(one_step, jax.random.key(0))  # a scan needs the dtypes that step returns
    return reset, step, params


class Rollout:
    """A compiled scan over the steps of one side."""

    def __init__(self, work: Stepping, side: str) -> None:
        import jax
        import jax.numpy as jnp

        import jrl

        reset, step, params = {"jrl": ours, "gymnax": gymnaxs}[side](work)
        action_space = jrl.make(work.env).action
        shape = (work.num_steps, work.num_envs)
        keys = jax.random.split(jax.random.key(1), shape)
        self.actions = jax.jit(jax.vmap(jax.vmap(action_space.sample)))(keys)

        def run(key: Any, actions: Any, params: Any) -> Any:
            reset_key, steps_key = jax.random.split(key)
            env_state, _ = reset(reset_key, params)
            struct = jax.eval_shape(step, key, env_state, actions[0], params)[1]
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), struct)

            def body(carry: tuple, x: tuple) -> tuple[tuple, None]:
                env_state, _, episodes = carry
                env_state, out = step(x[0], env_state, x[1], params)
                return (env_state, out, episodes + (out[2] | out[3])), None

            start = (env_state, nothing, jnp.zeros(work.num_envs, jnp.int32))
            return jax.lax.scan(body, start, (jax.random.split(steps_key, work.num_steps), actions))[0]

        self.params = jax.tree.map(jnp.asarray, params)  # arrays: jit must not fold them into the program
        self.compiled = jax.jit(run).lower(jax.random.key(0), self.actions, self.params).compile()

    def repeat(self, seed: int) -> tuple[float, float, int]:
        """Return wall-clock seconds, processor seconds, and the episodes that ended."""
        import jax

        key = jax.random.key(seed)
        (_, _, episodes), seconds, cpu = timed(lambda: self.compiled(key, self.actions, self.params))
        return seconds, cpu, int(episodes.sum())


def measure(work: Stepping, pairs: int) -> dict[str, Any]:
    """Time both sides in turn, after one repeat of each that warms up."""
    rollouts = {side: Rollout(work, side) for side in SIDES}
    env_steps = work.num_envs * work.num_steps
    rows: list[dict[str, Any]] = []
    for pair in range(pairs + 1):
        row: dict[str, Any] = {"seed": pair}
        for side, rollout in rollouts.items():
            seconds, cpu, episodes = rollout.repeat(pair)
            row[side] = {"seconds": round(seconds, 6), "cpu_seconds": round(cpu, 6), "episodes": episodes}
        row["ratio"] = round(row["gymnax"]["seconds"] / row["jrl"]["seconds"], 4)
        rows.append(row)
    del rows[0]
    return {
        **header("env-stepping", work),
        "ratio": spread([row["ratio"] for row in rows]),
        "cpu_ratio": spread([row["gymnax"]["cpu_seconds"] / row["jrl"]["cpu_seconds"] for row in rows]),
        "env_steps_per_second": {
            side: spread([env_steps / row[side]["seconds"] for row in rows]) for side in SIDES
        },
        "episodes": {side: sum(row[side]["episodes"] for row in rows) for side in SIDES},
        "machine": machine(),
        "pairs": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("env", nargs="*", help="ids; all that jrl has its own version of where none is given")
    parser.add_argument("--num-envs", type=count, nargs="+", default=[64, 1024])
    parser.add_argument("--env-steps", type=count, default=Stepping.env_steps, help="of one repeat")
    parser.add_argument("--pairs", type=count, default=7)
    parser.add_argument("--core", type=cores, default=[], help="core(s) to pin to, such as 0 or 0,1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    pin(arguments.core)
    from jrl import xla

    xla.configure()
    from jrl.envs.gymnax import FAST

    for env in arguments.env or FAST:
        for num_envs in arguments.num_envs:
            record = measure(Stepping(env, num_envs, arguments.env_steps), arguments.pairs)
            rates = {side: rate["median"] / 1e6 for side, rate in record["env_steps_per_second"].items()}
            print(
                f"{env} x {num_envs}: jrl {rates['jrl']:.2f}, gymnax {rates['gymnax']:.2f} M env steps/s, "
                f"ratio {record['ratio']}, episodes {record['episodes']}",
                flush=True,
            )
            append(arguments.out / "env-stepping.jsonl", record)


if __name__ == "__main__":
    main()
