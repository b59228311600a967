"""Decoding speed: ``jrl.language.generation`` against two naive versions of it, in turn on the same core.

    python benchmarks/decoding.py --core 0
    python benchmarks/decoding.py --core 0 --model ../shared/data/stories260K/stories260K.bin --batch 256 --tokens 64

``ours`` is :func:`jrl.language.generation.generate`. ``stacked`` keeps layers and cache stacked: each token scans
over the layers, the cache goes in as the scan's xs and comes out as its ys, attention is a batch of matrix products,
and a token is drawn with Gumbel noise. ``cacheless`` has no cache: each token reads the whole text again. All draw
from the model's own distribution after a first token, in float32, and record log-probabilities. A repeat is compiled
beforehand and timed until its results are ready; the sides run in turn, A B C A B C; a ratio is that of neighbours.
Without ``--model`` the weights are random, of stories260K's sizes: the work is the same. With ``--requests`` so many
texts are drawn that end at ``--end-token``: in ``--batch`` slots that are used again, or in batches one after the
other. Processor seconds do not count what other processes took of the core. One JSON line is appended to
``benchmarks/results/decoding.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import RESULTS, append, cores, count, header, machine, pin, spread, timed

SIDES = ("ours", "stacked", "cacheless")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What one repeat computes."""

    batch: int = 256
    tokens: int = 64
    model: str | None = None
    requests: int = 0
    end_token: int = -1


def build(work: Decoding, params: Any, config: Any, side: str) -> Any:
    """Return ``(key, params) -> (tokens, log_prob)`` of one side."""
    import jax
    import jax.numpy as jnp

    from jrl.language import generation
    from jrl.networks import transformer

    N, T = work.batch, work.tokens
    start = jnp.ones((N, 1), jnp.int32)

    def slots(key: Any, params: Any) -> Any:
        settings = generation.Settings(max_new_tokens=T, end_token=work.end_token, num_slots=N)
        starts = jnp.ones((work.requests, 1), jnp.int32)
        texts = generation.generate(key, params, config, starts, starts[:, 0], settings)
        return texts.length, texts.log_prob

    def batches(key: Any, params: Any) -> Any:
        settings = generation.Settings(max_new_tokens=T, end_token=work.end_token)

        def batch(key: Any) -> Any:
            texts = generation.generate(key, params, config, start, start[:, 0], settings)
            return texts.length, texts.log_prob

        return jax.lax.map(batch, jax.random.split(key, work.requests // N))

    def ours(key: Any, params: Any) -> Any:
        settings = generation.Settings(max_new_tokens=T)
        texts = generation.generate(key, params, config, start, jnp.ones((N,), jnp.int32), settings)
        return texts.tokens, texts.log_prob

    def gumbel(key: Any, logits: Any) -> Any:
        token = jax.random.categorical(key, logits)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]

    def stacked(key: Any, params: Any) -> Any:
        shape = (config.num_layers, N, T, config.num_kv_heads, config.d)

        def step(carry: Any, x: Any) -> Any:
            (token, keys, values), (index, key) = carry, x
            position = jnp.full((N,), index)
            rotation = transformer._rotation(config, position)

            def layer(hidden: Any, xs: Any) -> Any:
                weights, k_cache, v_cache = xs

                def attend(q: Any, k: Any, v: Any) -> Any:
                    ks, vs = k_cache.at[:, index].set(k), v_cache.at[:, index].set(v)
                    scores = jnp.einsum("nkgd,nckd->nkgc", q, ks) * config.d**-0.5
                    p = jax.nn.softmax(jnp.where(jnp.arange(T) <= index, scores, -1e30), axis=-1)
                    return jnp.einsum("nkgc,nckd->nkgd", p, vs), (ks, vs)

                return transformer._block(weights, config, hidden, rotation, attend)

            hidden = transformer._embed(params, config, token, position)
            hidden, (keys, values) = jax.lax.scan(layer, hidden, (params["layers"], keys, values))
            token, log_prob = gumbel(key, transformer._read_out(params, config, hidden).logits)
            return (token, keys, values), (token, log_prob)

        carry = (start[:, 0], jnp.zeros(shape), jnp.zeros(shape))
        _, (tokens, log_prob) = jax.lax.scan(step, carry, (jnp.arange(T), jax.random.split(key, T)))
        return tokens.T, log_prob.T

    def cacheless(key: Any, params: Any) -> Any:
        def step(texts: Any, x: Any) -> Any:
            index, key = x
            logits = transformer.forward(params, config, texts).logits[:, index]
            token, log_prob = gumbel(key, logits)
            return texts.at[:, index + 1].set(token, mode="drop"), (token, log_prob)

        texts = jnp.pad(start, ((0, 0), (0, T - 1)))
        _, (tokens, log_prob) = jax.lax.scan(step, texts, (jnp.arange(T), jax.random.split(key, T)))
        return tokens.T, log_prob.T

    sides = {"ours": ours, "stacked": stacked, "cacheless": cacheless, "slots": slots, "batches": batches}
    return sides[side]


def measure(work: Decoding, pairs: int, sides: Sequence[str] = SIDES) -> dict[str, Any]:
    """Time the sides in turn, after one repeat of each that warms up."""
    import jax

    from jrl.language import weights
    from jrl.networks import transformer

    if work.model:
        params, config = weights.read(work.model)
    else:
        config = transformer.Config(
            512, num_layers=5, num_heads=8, num_kv_heads=4, width=64, mlp_width=172, max_length=512
        )
        params = jax.jit(lambda: transformer.init(jax.random.key(0), config))()
    programs, compiling = {}, {}
    for side in sides:
        began, cpu = time.perf_counter(), time.process_time()
        programs[side] = jax.jit(build(work, params, config, side)).lower(jax.random.key(0), params).compile()
        compiling[side] = {
            "seconds": round(time.perf_counter() - began, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }
    rows: list[dict[str, Any]] = []
    for pair in range(pairs + 1):
        row: dict[str, Any] = {"seed": pair}
        for side, program in programs.items():
            (first, log_prob), seconds, cpu = timed(lambda: program(jax.random.key(pair), params))  # noqa: B023
            drawn = int(first.sum()) if work.requests else first.size
            row[side] = {
                "seconds": round(seconds, 6),
                "cpu_seconds": round(cpu, 6),
                "tokens": drawn,
                "log_prob": round(float(log_prob.sum()) / drawn, 4),
            }
        rows.append(row)
    del rows[0]
    best, *others = sides

    def rate(side: str, unit: str) -> list[float]:
        return [row[side]["tokens"] / row[side][unit] for row in rows]

    def ratio(side: str, unit: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(rate(best, unit), rate(side, unit), strict=True)])

    return {
        **header("decoding", work),  # type: ignore[arg-type]
        "num_params": transformer.num_params(params),
        "tokens_per_second": {s: spread(rate(s, "seconds")) for s in sides},
        "tokens_per_cpu_second": {s: spread(rate(s, "cpu_seconds")) for s in sides},
        "ratio": {s: ratio(s, "seconds") for s in others},
        "cpu_ratio": {s: ratio(s, "cpu_seconds") for s in others},
        "compile": compiling,
        "machine": machine(),
        "pairs": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=count, default=Decoding.batch)
    parser.add_argument("--tokens", type=count, default=Decoding.tokens)
    parser.add_argument("--model", help="a model's folder, or llama2.c's .bin")
    parser.add_argument("--pairs", type=count, default=5)
    parser.add_argument("--requests", type=int, default=0, help="so many texts: slots against batches")
    parser.add_argument("--end-token", type=int, default=-1, help="that ends a text, with --requests")
    parser.add_argument("--core", type=cores, default=[], help="core(s) to pin to, such as 0 or 0,1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.requests < 0 or 0 < arguments.requests < arguments.batch:
        parser.error(
            f"--requests {arguments.requests}: must be at least --batch {arguments.batch}, one batch of texts, or 0."
        )
    pin(arguments.core)
    from jrl import xla

    xla.configure()
    work = Decoding(
        arguments.batch, arguments.tokens, arguments.model, arguments.requests, arguments.end_token
    )
    sides = ("slots", "batches") if work.requests else SIDES
    record = measure(work, arguments.pairs, sides)
    record["work"]["model"] = (
        Path(work.model).name if work.model else None
    )  # not where it lies on this machine
    for side in sides:
        rate, cpu_rate = (record[f"tokens_per_{unit}"][side]["median"] for unit in ("second", "cpu_second"))
        ratio = (
            "" if side == sides[0] else f", {sides[0]} is {record['ratio'][side]['median']:.2f} times as fast"
        )
        print(
            f"{side:10} {rate:>10,.0f} tokens/s, {cpu_rate:>10,.0f} a second of processor time, compiled in "
            f"{record['compile'][side]}{ratio}",
            flush=True,
        )
    append(arguments.out / "decoding.jsonl", record)


if __name__ == "__main__":
    main()
