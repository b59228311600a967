"""The loop around the compiled chunk: dispatch, check, log, save, stop; and the final evaluation.

The next chunk is dispatched before the scalars of the last one are fetched, so that the device does not wait
for the host. The state is donated from chunk to chunk; where it is to be saved it is copied to the host
first, and written to disk while the next chunk computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.configuration import Setup
from jrl.interrupt import StopRequest, wait
from jrl.loggers import Logger
from jrl.ops import counter
from jrl.progress import Progress
from jrl.records import RunError
from jrl.saving import Saver, Start, check_finite
from jrl.types import Algorithm, Environment

# What a key drawn from the seed is for; a number is never used for something else.
INIT, EVALUATION = 0, 1


class Compiled(NamedTuple):
    """``chunk(state, hparams, num_steps) -> (state, metrics [chunk_length])``, and where it starts from."""

    chunk: Callable[..., Any]
    start: Start
    seconds: float


class Trained(NamedTuple):
    """The state at the end; ``env_steps_trained`` leaves out those of the warm-up."""

    state: Any
    env_steps: int
    env_steps_trained: int
    seconds: float


def compile_chunk(setup: Setup, seed: int, length: int, start: Start | None) -> Compiled:
    """Compile a chunk of at most ``length`` steps; initialise the state where there is no ``start``."""
    # jitted here: then each is traced once, for its shapes and for its program
    init = jax.jit(setup.algo.init)
    algo = setup.algo._replace(init=init, step=jax.jit(setup.algo.step))
    hparams = setup.hparams
    began = time.perf_counter()
    init_key = jax.random.fold_in(jax.random.key(seed), INIT)
    state_shape = jax.eval_shape(algo.init, init_key, hparams)
    metrics_shape = jax.eval_shape(algo.step, state_shape, hparams)[1]
    for name, metric in metrics_shape.items():
        if metric.shape != ():
            raise RunError(
                f"metric {name} has shape {metric.shape}: algo.step must return scalars, shape ()."
            )

    def chunk(state: Any, hparams: Any, num_steps: jax.Array) -> Any:
        # The number of steps is an argument: the shorter last chunk is the same program, to the last bit.
        def body(index: jax.Array, carry: Any) -> Any:
            state, rows = carry
            state, metrics = algo.step(state, hparams)
            return state, {name: rows[name].at[index].set(metrics[name]) for name in rows}

        rows = {name: jnp.zeros((length,), metric.dtype) for name, metric in metrics_shape.items()}
        return jax.lax.fori_loop(0, num_steps, body, (state, rows))

    compiled = jax.jit(chunk, donate_argnums=0).lower(state_shape, hparams, jnp.int32(0)).compile()
    if start is None:
        start_state = init.lower(init_key, hparams).compile()
        seconds = time.perf_counter() - began
        state = start_state(init_key, hparams)
        taken = counter.to_int(state.env_steps) if hasattr(state, "env_steps") else 0
        start = Start(state, 0, taken, 0.0)
    else:
        seconds = time.perf_counter() - began
    return Compiled(compiled, start, seconds)


def train(
    compiled: Compiled,
    setup: Setup,
    record: Mapping[str, Any],
    folder: Path | None,
    loggers: Sequence[Logger],
    show: Progress,
    stop: StopRequest,
    extra: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Trained:
    """Train to ``record["env_steps"]`` environment steps, or until a stop is requested.

    ``extra``: a row of metrics -> what to add to it.

    Raises:
        RunError: the warm-up alone takes as many steps.
        NonFiniteError: a metric or a parameter is NaN or infinite.
    """
    state, step, _, seconds_before = compiled.start
    per_step = setup.algo.env_steps_per_step
    taken_by_init = compiled.start.env_steps - step * per_step
    total = -(-(record["env_steps"] - taken_by_init) // per_step)
    if total < 1:
        raise RunError(
            f"env_steps={record['env_steps']}: the warm-up alone takes {taken_by_init} environment steps. "
            "Training starts after it; pass more env_steps, or a Config with a shorter warm-up."
        )

    def env_steps(step: int) -> int:
        return taken_by_init + step * per_step

    saver = None if folder is None else Saver(folder, setup, record, compiled.start)
    pending: list[tuple[int, int, Any]] = []  # dispatched, not fetched: (step after it, its steps, rows)
    jax.block_until_ready(state)
    began = last = time.perf_counter()

    def fetch() -> None:
        nonlocal last
        after, num_steps, rows = pending.pop(0)
        wait(rows, stop)
        now = time.perf_counter()
        metrics = {name: np.asarray(values)[:num_steps] for name, values in rows.items()}
        check_finite(
            metrics, [env_steps(after - num_steps + i + 1) for i in range(num_steps)], setup, record, saver
        )
        row = {
            "step": after,
            "seconds": round(seconds_before + now - began, 4),
            "env_steps_per_second": round(num_steps * per_step / max(now - last, 1e-9), 1),
            **reduce_rows(metrics),
        }
        if extra is not None:
            row |= extra(row)
        last = now
        for logger in loggers:
            logger.write(env_steps(after), row)
        show.update(env_steps(after), row)

    show.start(env_steps(step), env_steps(total))
    try:
        while step < total and not stop.requested:
            num_steps = min(record["chunk_length"], total - step)
            state, rows = compiled.chunk(state, setup.hparams, jnp.int32(num_steps))
            step += num_steps
            pending.append((step, num_steps, rows))
            if saver is not None:
                saver.write()  # while the chunk computes
            ends = step >= total or (saver is not None and saver.due(env_steps(step), num_steps * per_step))
            while len(pending) > (0 if ends or stop.requested else 1):
                fetch()
            if saver is not None and (ends or stop.requested):
                saver.take(state, step, env_steps(step), seconds_before + time.perf_counter() - began)
        if saver is not None:
            saver.write()
    finally:
        show.stop()
    stop.announce()
    seconds = seconds_before + (last - began)
    return Trained(state, env_steps(step), step * per_step, seconds)


def reduce_rows(metrics: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Reduce metrics ``[T]`` to one number each, as :func:`jrl.training.summarize` does, on the host.

    (On the device it would wait for the chunk that has just been dispatched.) Episode statistics are None
    where no episode ended.
    """
    count = metrics.get("num_episodes")
    total = 0.0 if count is None else float(count.sum())
    row: dict[str, float | None] = {}
    for name, values in metrics.items():
        if name == "num_episodes":
            row[name] = total
        elif name.startswith("episode_") and count is not None:
            ended = values[count > 0].astype(float)
            if not ended.size:
                row[name] = None
            elif name.endswith("_min"):
                row[name] = float(ended.min())
            elif name.endswith("_max"):
                row[name] = float(ended.max())
            else:
                row[name] = float(np.average(ended, weights=count[count > 0]))
        else:
            row[name] = float(values.astype(float).mean())
    # seven digits are what a float32 holds
    return {name: None if value is None else float(f"{value:.7g}") for name, value in row.items()}


def evaluate(
    env: Environment,
    algo: Algorithm,
    hparams: Any,
    state: Any,
    seed: int,
    num_episodes: int,
    greedy: bool = True,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Play ``num_episodes`` episodes; the result is what ``summary.json`` has as ``evaluation``.

    Returns None where a stop was requested meanwhile.
    """
    from jrl import training

    key = jax.random.fold_in(jax.random.key(seed), EVALUATION)
    policy = algo.policy(state, greedy=greedy)
    params = getattr(hparams, "env", None)
    max_steps = training.DEFAULT_MAX_STEPS
    stats = training.evaluate(key, env, policy, num_episodes=num_episodes, params=params, max_steps=max_steps)
    wait(stats, stop, leave_early=True)
    if stop is not None and stop.requested:
        return None
    returns = np.asarray(stats.episode_return, np.float64)
    lengths, completed = np.asarray(stats.episode_length), np.asarray(stats.completed)
    return {
        "episode_return_mean": float(returns.mean()),
        "episode_return_std": float(returns.std()),
        "episode_return_min": float(returns.min()),
        "episode_return_max": float(returns.max()),
        "episode_length_mean": float(lengths.mean()),
        "num_episodes": int(returns.size),
        "num_cut_short": int((~completed).sum()),
        "max_steps": max_steps,
        "greedy": greedy,
        "seed": seed,
    }
