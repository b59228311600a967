"""Token environments by the thousand: tokens a second over how many texts are written side by side.

    python benchmarks/token_envs.py --core 0
    python benchmarks/token_envs.py --plot

``write`` steps N token environments T times in one program: a decoder with the sizes of stories260K reads its key/value
cache and says a token, the environment takes it, and each whole text is rated (distinct pairs of tokens). ``learn`` is
a whole step of ``grpo`` on as many texts, gradient included. The weights are random: the work is the same. A repeat is
compiled beforehand and timed until its results are ready; processor seconds do not count what other processes took.
Utilisation is that of the large matrix product the device was measured to do, the model's products alone counted. One
JSON line is appended to ``benchmarks/results/token-envs.jsonl``, and ``token-envs.png`` is drawn from the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, append, cores, count, header, machine, pin, spread, timed

SIDES = ("write", "learn")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What one repeat computes."""

    num_envs: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    tokens: int = 64
    minibatch: int = 256
    vocab_size: int = 512
    num_layers: int = 5
    width: int = 64


def build(work: Texts, num_envs: int) -> tuple[dict[str, Any], dict[str, float], Any]:
    """Return both programs, ``state -> (state, rewards)``, their operations a token, and a state to start from."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jrl
    from jrl import envs, rollout
    from jrl.language import models, rewards
    from jrl.language.environments import Prompts, Rating, at_end, token_mdp
    from jrl.networks import transformer
    from jrl.types import Policy

    prompts = Prompts(np.arange(16)[:, None], np.ones(16, int))
    env = token_mdp(
        prompts,
        at_end(lambda text: jnp.float32(0)),
        vocab_size=work.vocab_size,
        max_new_tokens=work.tokens,
        rating=Rating({"distinct": rewards.distinct(2)}, {"distinct": 1.0}),
    )
    decoder = transformer.Config(
        work.vocab_size, num_layers=work.num_layers, num_heads=8, num_kv_heads=4, width=work.width, mlp_width=172,
        max_length=work.tokens + 1, value_head=True,
    )  # fmt: skip
    model = models.from_transformer(env, decoder)
    config = jrl.grpo.Config(
        num_prompts=num_envs // 16, group_size=16, num_minibatches=max(1, num_envs // work.minibatch),
        penalty="none", cache=True,
    )  # fmt: skip
    algo = jrl.grpo.make(env, config, model=model)
    hparams = jax.tree.map(np.float32, jrl.grpo.HParams())
    vector, act = (
        envs.vectorize(env._replace(step=env.step.unrated), num_envs),
        models.actor(model, cache=True),
    )

    def write(state: Any) -> Any:
        key, unroll_key = jax.random.split(state.key)
        start = state.rollout._replace(memory=model.start(state.params, state.rollout.obs))
        policy = Policy(act, state.params, rollout.keep_memory)
        after, said, _ = rollout.unroll(unroll_key, vector, env.params, policy, start, work.tokens)
        texts = start.env_state.text._replace(
            tokens=said.next_obs[-1], length=start.env_state.text.length + work.tokens
        )
        rating, _ = jax.vmap(env.step.rating)(texts)
        return dataclasses.replace(state, rollout=after._replace(memory=()), key=key), rating.mean()

    def learn(state: Any) -> Any:
        state, metrics = algo.step(state, hparams)
        return state, metrics["episode_return"]

    one = transformer.flops_per_token(decoder, work.tokens + 1)
    flops = {"write": one, "learn": one + 3 * one * (work.tokens + 1) / work.tokens}
    return {"write": write, "learn": learn}, flops, jax.jit(algo.init)(jax.random.key(0), hparams)


def measure(work: Texts, repeats: int) -> dict[str, Any]:
    """Time both programs at each size, after one repeat that warms up."""
    import jax

    from jrl.bench import calibrate

    peak, rows = calibrate.peak(), []
    for num_envs in work.num_envs:
        programs, flops, start = build(work, num_envs)
        for side, program in programs.items():
            compiled = jax.jit(program).lower(start).compile()
            (state, _), times = jax.block_until_ready(compiled(start)), []
            for _ in range(repeats):
                (state, rating), seconds, cpu = timed(lambda: compiled(state))  # noqa: B023
                assert 0.0 < float(rating) <= 1.0
                times.append({"seconds": round(seconds, 6), "cpu_seconds": round(cpu, 6)})
            tokens = num_envs * work.tokens
            rate = [tokens / row["seconds"] for row in times]
            rows.append(
                {
                    "num_envs": num_envs,
                    "side": side,
                    "tokens": tokens,
                    "tokens_per_second": spread(rate),
                    "tokens_per_cpu_second": spread([tokens / row["cpu_seconds"] for row in times]),
                    "model_flop_utilization": round(spread(rate)["median"] * flops[side] / peak, 4),
                    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "repeats": times,
                }
            )
            print(
                f"{num_envs:>6} texts, {side:5} {rows[-1]['tokens_per_second']['median']:>9,.0f} tokens/s, "
                f"{rows[-1]['model_flop_utilization']:.1%} of peak",
                flush=True,
            )
    return {
        **header("token-envs", work),  # type: ignore[arg-type]
        "peak_flops_per_second": peak,
        "machine": machine(),
        "rows": rows,
    }


def plot(record: dict[str, Any]) -> Any:
    """Draw tokens a second of processor time over the number of texts; bars from the slowest repeat to the fastest."""
    from matplotlib.figure import Figure

    from jrl.plots import COLOURS

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for colour, side, words in zip(COLOURS, SIDES, ("writing texts", "writing and learning"), strict=False):
        rows = [row for row in record["rows"] if row["side"] == side]
        sizes = [row["num_envs"] for row in rows]
        rates = [row["tokens_per_cpu_second"] for row in rows]
        middle = [rate["median"] for rate in rates]
        low, high = ([abs(rate[end] - rate["median"]) for rate in rates] for end in ("min", "max"))
        axes.errorbar(sizes, middle, (low, high), color=colour, marker="o", capsize=3)
        axes.annotate(
            words,
            (sizes[-1], rates[-1]["min"]),
            (0, -16),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    sizes = record["work"]["num_envs"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"texts of {record['work']['tokens']} tokens side by side, in one program")
    axes.set_title("Tokens a second of processor time", loc="left")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--num-envs", type=cores, default=list(Texts.num_envs), help="such as 64,4096; multiples of 16"
    )
    parser.add_argument("--tokens", type=count, default=Texts.tokens)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--core", type=cores, default=[], help="core(s) to pin to, such as 0 or 0,1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="draw the last record and measure nothing")
    arguments = parser.parse_args(argv)
    path = arguments.out / "token-envs.jsonl"
    if not arguments.plot:
        pin(arguments.core)
        from jrl import xla

        xla.configure()
        append(path, measure(Texts(tuple(arguments.num_envs), arguments.tokens), arguments.repeats))
    elif not path.exists():
        parser.error(f"--plot: there is no record {path}; measure first, without --plot.")
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    plot(record).savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
