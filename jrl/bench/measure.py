"""The benchmarks: what each compiles, what it times, and the record it makes of that.

Every timed program is a loop whose length is an argument and whose state is donated, as the driver's chunk
is; its length is chosen so that a repeat takes ``--seconds``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import configuration, replay
from jrl.bench import calibrate, recording
from jrl.bench.options import Options
from jrl.bench.work import Work, count, count_jaxpr, nbytes
from jrl.configuration import Setup
from jrl.envs import vectorize
from jrl.envs.build import action_struct
from jrl.records import RunError, plain
from jrl.types import ActionSpace, Algorithm, Array, Discrete, Key, Transition

Record = dict[str, Any]

ENV_STEPS = 64  # environment steps whose keys are drawn at once, as a rollout does
NUM_OBSERVATIONS = 8  # batches of observations the policy is shown in turn
EXTRA_UPDATES = 4  # see update()
UPDATES_FIELD = {"ppo": "num_epochs", "dqn": "num_updates"}
BLOCK_STEPS = 16  # environment steps of a block that is written to the replay, at most


class Program(NamedTuple):
    """A compiled loop.

    Attributes:
        run: ``(state, count) -> state`` runs the body ``count`` times; the state is donated.
        state: where it starts.
        units: environment steps (or transitions) of one run of the body.
        work: what one run of the body needs.
    """

    run: Callable[[Any, int], Any]
    state: Any
    units: float
    work: Work


def loop(
    body: Callable[..., Any], state: Any, constants: Any, *, units: float, work: Work | None = None
) -> Program:
    """Compile ``state = body(index, state, constants)`` as a loop; its work is counted unless given."""

    traced = trace(body, state, constants)
    compiled = traced.lower().compile()

    def run(state: Any, length: int) -> Any:
        return compiled(state, constants, jnp.int32(length))

    # A loop of unknown length counts once: the work of one run of its body.
    return Program(run, state, units, count_jaxpr(traced.jaxpr.jaxpr) if work is None else work)


def trace(body: Callable[..., Any], state: Any, constants: Any) -> Any:
    """Trace ``chunk(state, constants, length)``, which runs ``body`` so often; arguments may be shapes."""

    def chunk(state: Any, constants: Any, length: Array) -> Any:
        return jax.lax.fori_loop(0, length, lambda index, state: body(index, state, constants), state)

    return jax.jit(chunk, donate_argnums=0).trace(state, constants, jnp.int32(0))


# ------------------------------------------------------------------------------------------------- timing


def repeat(programs: Sequence[Program], repeats: int, seconds: float) -> list[list[dict[str, float]]]:
    """Time the programs in turn, ``repeats`` times each after a warm-up.

    Returns:
        For each program its repeats: how often the body ran, wall-clock and processor seconds.
    """
    states, lengths = [], []
    for program in programs:
        state, length = _warm_up(program, seconds)
        states.append(state)
        lengths.append(length)
    rows: list[list[dict[str, float]]] = [[] for _ in programs]
    for _ in range(repeats):
        for which, program in enumerate(programs):
            run = functools.partial(program.run, states[which], lengths[which])
            states[which], wall, cpu = recording.timed(run)
            row = {"count": lengths[which], "seconds": round(wall, 6), "cpu_seconds": round(cpu, 6)}
            rows[which].append(row)
    return rows


def _warm_up(program: Program, seconds: float) -> tuple[Any, int]:
    """Return the state after a warm-up, and the length of a loop that takes about ``seconds``."""
    state, length = jax.block_until_ready(program.run(program.state, 1)), 1
    while True:
        state, first, _ = recording.timed(functools.partial(program.run, state, length))
        state, second, _ = recording.timed(functools.partial(program.run, state, length))
        taken = min(first, second)  # one that was disturbed would end the search too early
        if taken >= 0.7 * seconds:
            return state, length
        # Twenty times at most: the first runs say little.
        length = min(20 * length, int(length * seconds / max(taken, 1e-7)) + 1)


def timing(
    name: str,
    program: Program,
    rows: Any,
    unit: str,
    seconds: Sequence[float] | None = None,
    **fields: Any,
) -> Record:
    """Return what a record says about the repeats of one program.

    Args:
        name: the benchmark.
        program: what was timed.
        rows: its raw repeats.
        unit: what ``program.units`` counts.
        seconds: of one run of its body in each repeat, where ``rows`` do not say.
        **fields: what else the record should have.
    """
    seconds = [row["seconds"] / row["count"] for row in rows] if seconds is None else seconds
    return {
        "benchmark": name,
        **fields,
        "unit": f"{unit}/s",
        "rate": recording.spread([program.units / each for each in seconds if each > 0], digits=1),
        "seconds": recording.spread(seconds, digits=9),
        "units": program.units,
        "processor_share": processor_share(rows),
        "roofline": calibrate.roofline(program.work, statistics.median(seconds)),
        "repeats": rows,
    }


def processor_share(rows: Any) -> float:
    """Return processor over wall-clock seconds of raw repeats, which may be nested."""
    flat = [row for each in rows for row in ([each] if "seconds" in each else each.values())]
    return round(sum(row["cpu_seconds"] for row in flat) / sum(row["seconds"] for row in flat), 3)


# ------------------------------------------------------------------------------------------ steps per second


def env(setup: Setup, options: Options) -> Record:
    """Step the environments with random actions; episodes that end are reset within."""
    environment, num_envs = setup.env, setup.config.num_envs
    envs = vectorize(environment, num_envs)
    env_params = setup.hparams.env
    env_state = jax.jit(envs.reset)(jax.random.key(0), env_params)[0]
    action = jax.eval_shape(lambda key: random_actions(environment.action, key, num_envs), jax.random.key(0))
    time_step = zeros(jax.eval_shape(envs.step, jax.random.key(0), env_state, action, env_params)[1])

    def one(carry: Any, keys: Key, env_params: Any) -> Any:
        action = random_actions(environment.action, keys[0], num_envs)
        # All of the time step is carried, so that none of it is left out as unused.
        return envs.step(keys[1], carry[0], action, env_params)

    def body(index: Array, state: Any, env_params: Any) -> Any:
        key, carry = state
        key, steps_key = jax.random.split(key)
        keys = jax.random.split(steps_key, (ENV_STEPS, 2))
        carry, _ = jax.lax.scan(lambda carry, keys: (one(carry, keys, env_params), None), carry, keys)
        return key, carry

    # A step reads the states and writes them, and writes the time step.
    carry = (jax.tree.map(jnp.copy, env_state), time_step)
    moved = 2 * nbytes(env_state) + nbytes(time_step)
    step = count(lambda carry, keys: one(carry, keys, env_params), carry, jax.random.split(jax.random.key(0)))
    work = dataclasses.replace(step, bytes=moved, array_bytes=moved) * ENV_STEPS
    program = loop(body, (jax.random.key(1), carry), env_params, units=float(ENV_STEPS * num_envs), work=work)
    rows = repeat([program], options.repeats, options.seconds)[0]
    return timing("env", program, rows, "env steps")


def random_actions(space: ActionSpace, key: Key, num: int) -> Array:
    """Draw ``num`` actions; from one key where the space allows it."""
    if isinstance(space, Discrete):
        return jax.random.randint(key, (num,), 0, space.n)
    return jax.vmap(space.sample)(jax.random.split(key, num))


def policy(setup: Setup, options: Options) -> Record:
    """Run the network forward and draw actions, on observations that change from step to step."""
    num_envs = setup.config.num_envs
    envs = vectorize(setup.env, num_envs)
    keys = jax.random.split(jax.random.key(0), NUM_OBSERVATIONS)
    obs = jax.jit(jax.vmap(envs.reset, in_axes=(0, None)))(keys, setup.hparams.env)[1]
    acting = setup.algo.policy(initial(setup), greedy=False)

    def act(index: Array, key: Key, memory: Any, constants: Any) -> Any:
        acting, obs = constants
        shown = jax.tree.map(lambda leaf: leaf[index % NUM_OBSERVATIONS], obs)
        # What the policy returns beside the action is not needed to act, so it may be left out.
        return acting(key, shown, memory)[:2]

    def body(index: Array, state: Any, constants: Any) -> Any:
        key, (_, memory) = state
        key, action_key = jax.random.split(key)
        return key, act(index, action_key, memory, constants)

    memory = acting.init_memory((num_envs,))
    action = zeros(jax.eval_shape(act, jnp.int32(0), jax.random.key(0), memory, (acting, obs))[0])
    program = loop(body, (jax.random.key(1), (action, memory)), (acting, obs), units=float(num_envs))
    rows = repeat([program], options.repeats, options.seconds)[0]
    return timing("policy", program, rows, "env steps")


def train(setup: Setup, options: Options) -> Record:
    """Run whole calls of ``algo.step``."""
    program = stepping(setup.algo, setup)
    rows = repeat([program], options.repeats, options.seconds)[0]
    return timing("train", program, rows, "env steps")


def sweep(setup: Setup, options: Options, members: int) -> Record:
    """Run whole calls of ``algo.step`` for several seeds side by side."""
    program = stepping(side_by_side(setup.algo, members), setup)
    rows = repeat([program], options.repeats, options.seconds)[0]
    return timing("sweep", program, rows, "env steps", members=members)


def update(setup: Setup, options: Options) -> Record:
    """Time the gradient steps alone, as what more of them add to ``algo.step``.

    A step with five times the epochs (updates) takes the same rollout and five times the gradient steps; the
    difference to the plain one, by four, is the time of one step's gradient steps. Both are timed in turn,
    and each pair gives one repeat.
    """
    field = UPDATES_FIELD[setup.algorithm]
    times = 1 + EXTRA_UPDATES
    more_config = dataclasses.replace(setup.config, **{field: times * getattr(setup.config, field)})
    more = stepping(configuration.load(setup.algorithm).make(setup.env, more_config), setup)
    plain_step = stepping(setup.algo, setup)
    pairs = repeat([plain_step, more], options.repeats, options.seconds)
    seconds = [
        (many["seconds"] / many["count"] - few["seconds"] / few["count"]) / EXTRA_UPDATES
        for few, many in zip(*pairs, strict=True)
    ]
    if statistics.median(seconds) <= 0:
        raise RunError(
            f"update: a step with {times} times the {field} was not slower than one with {field}="
            f"{getattr(setup.config, field)}, so their difference is noise; raise --seconds {options.seconds}."
        )
    work = (more.work - plain_step.work) * (1 / EXTRA_UPDATES)
    program = plain_step._replace(work=work)
    raw = [{"plain": few, "more": many} for few, many in zip(*pairs, strict=True)]
    return timing("update", program, raw, "env steps", seconds, times=times)


def stepping(algo: Algorithm, setup: Setup) -> Program:
    """Return the loop of ``algo.step`` from a fresh state; metrics are summed, so that none is unused."""
    state = jax.jit(algo.init)(jax.random.key(0), setup.hparams)
    metrics = zeros(jax.eval_shape(algo.step, state, setup.hparams)[1])
    return loop(one_step(algo), (state, metrics), setup.hparams, units=float(algo.env_steps_per_step))


def one_step(algo: Algorithm) -> Callable[..., Any]:
    """Return the body of the training loop, on ``(state, sum of the metrics)``."""

    def body(index: Array, carry: Any, hparams: Any) -> Any:
        state, total = carry
        state, metrics = algo.step(state, hparams)
        return state, jax.tree.map(jnp.add, total, metrics)

    return body


def side_by_side(algo: Algorithm, members: int) -> Algorithm:
    """Return the algorithm of ``members`` seeds at once, which share their hyperparameters."""

    def init(key: Key, hparams: Any) -> Any:
        return jax.vmap(algo.init, in_axes=(0, None))(jax.random.split(key, members), hparams)

    step = jax.vmap(algo.step, in_axes=(0, None))
    return algo._replace(init=init, step=step, env_steps_per_step=members * algo.env_steps_per_step)


def initial(setup: Setup) -> Any:
    """Return the state that ``algo.init`` makes."""
    return jax.jit(setup.algo.init)(jax.random.key(0), setup.hparams)


def zeros(shapes: Any) -> Any:
    """Return zeros of these shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# ------------------------------------------------------------------------------------------------- replay


def replays(setup: Setup, options: Options) -> Iterator[Record]:
    """Time adding to and sampling from a full replay, uniform and prioritised, at each capacity."""
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    flag: Any = jax.ShapeDtypeStruct((), jnp.bool_)
    spec = Transition(  # of shapes in place of arrays
        obs=setup.env.observation,
        action=action_struct(setup.env.action),  # type: ignore[arg-type]
        reward=number,
        terminated=flag,
        truncated=flag,
        next_obs=setup.env.observation,
        extras=(),
    )
    for capacity in options.capacities:
        for prioritized in (False, True):
            yield from _replay(setup, options, spec, capacity, prioritized)


def _replay(
    setup: Setup, options: Options, spec: Transition, capacity: int, prioritized: bool
) -> Iterator[Record]:
    buffer: Any = replay.prioritized if prioritized else replay.uniform
    num_envs = setup.config.num_envs
    batch_size, n_step = getattr(setup.config, "batch_size", 128), getattr(setup.config, "n_step", 1)
    length = min(setup.config.unroll_length, BLOCK_STEPS)
    rows = replay.num_rows(capacity, num_envs, length)
    block = jax.tree.map(lambda leaf: jnp.zeros((length, num_envs, *leaf.shape), leaf.dtype), spec)

    @jax.jit
    def filled(block: Transition) -> Any:
        empty = buffer.init(spec, rows, num_envs)
        return jax.lax.fori_loop(0, rows // length, lambda _, state: buffer.add(state, block), empty)

    def draw(key: Key, state: Any) -> Any:
        exponent = {"beta": jnp.float32(0.5)} if prioritized else {}
        return buffer.sample(key, state, batch_size, num_envs, n_step, **exponent)

    def sample(index: Array, carry: Any, state: Any) -> Any:
        key, draw_key = jax.random.split(carry[0])
        return key, draw(draw_key, state)

    def add(index: Array, state: Any, block: Transition) -> Any:
        return buffer.add(state, block)

    # What was asked for, and what the ring's whole blocks hold: several times as much where there are many
    # environments.
    fields: Record = {
        "capacity": capacity,
        "held": rows * num_envs,
        "prioritized": prioritized,
        "batch_size": batch_size,
    }
    state = filled(block)
    carry = (jax.random.key(0), zeros(jax.eval_shape(draw, jax.random.key(0), state)))
    # A transition drawn (or written) is read once and written once.
    for operation, body, start, constants, one in (
        ("sample", sample, carry, state, carry[1]),
        ("add", add, state, block, block),
    ):
        moved = Work(bytes=2 * nbytes(one), array_bytes=nbytes(one))
        units = float(batch_size if operation == "sample" else length * num_envs)
        work = dataclasses.replace(moved, random_bits=32.0 * batch_size * (operation == "sample"))
        program = loop(body, start, constants, units=units, work=work)
        timed = repeat([program], options.repeats, options.seconds)[0]
        yield timing("replay", program, timed, "transitions", operation=operation, **fields)


# --------------------------------------------------------------------------------------- fresh processes


def compile_time(setup: Setup, options: Options) -> Record:
    """Time lowering and compiling ``algo.init`` and the training loop, cold and from the cache."""
    summary, rows = recording.compile_cold_and_cached(_child("compile", setup, 1), options.repeats)
    return {"benchmark": "compile", **summary, "repeats": rows}


def memory(setup: Setup, options: Options, members: int) -> Record:
    """Ask XLA what the training program needs, and a fresh process what it took at its peak."""
    found = recording.in_fresh_process(_child("memory", setup, members), os.environ)
    return {"benchmark": "memory", "members": members, **found}


def _child(what: str, setup: Setup, members: int) -> list[str]:
    job = {
        "what": what,
        "algo": setup.algorithm,
        "env": setup.env_id,
        "config": plain(dataclasses.asdict(setup.config)),
        "members": members,
    }
    return [sys.executable, "-m", "jrl.bench.child", json.dumps(job)]


# ---------------------------------------------------------------------------------------------- the whole

KINDS = ("env", "policy", "train", "sweep", "update", "replay", "memory", "compile")


def records(kind: str, setups: Sequence[Setup], options: Options) -> Iterator[Record]:
    """Measure one kind and yield its records, complete.

    Args:
        kind: one of :data:`KINDS`.
        setups: one for each number of environments.
        options: the flags.
    """
    load = recording.load()
    for setup, record in _each(kind, setups, options):
        config = plain(dataclasses.asdict(setup.config))
        head = {
            "benchmark": record["benchmark"],
            "time": recording.now(),
            "commit": recording.commit(Path(__file__).parent),
            "algo": setup.algorithm,
            "env": setup.env_id,
            "num_envs": setup.config.num_envs,
            "members": 1,
            "config": config,
        }
        where = {"machine": recording.machine(), "load": load, "load_after": recording.load()}
        yield {**head, **where, **record}
        load = recording.load()


def _each(kind: str, setups: Sequence[Setup], options: Options) -> Iterator[tuple[Setup, Record]]:
    first, most = setups[0], max(options.members)
    if kind == "replay":
        for record in replays(first, options):
            yield first, record
    elif kind == "compile":
        yield first, compile_time(first, options)
    elif kind == "sweep":
        for members in options.members:
            yield first, sweep(first, options, members)
    elif kind == "memory":
        for setup, members in [*((setup, 1) for setup in setups), *([(first, most)] if most > 1 else [])]:
            yield setup, memory(setup, options, members)
    else:
        measure = {"env": env, "policy": policy, "train": train, "update": update}[kind]
        for setup in setups:
            yield setup, measure(setup, options)
