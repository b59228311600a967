"""The compiled parts of a sweep: start, a chunk of training, and evaluation, sharded over the devices.

Members share nothing, so each device computes its own with no communication at all: ``shard_map`` leaves the
partitioner no choice in the matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrl import training
from jrl.sweep import batching, members
from jrl.types import Algorithm, Array, Environment, Metrics, PyTree

AXIS = "members"
RUNNING, STOPPED = -1, -2
"""Values of ``failed_at``: while all is well, and for a member that a search has stopped (or a free slot)."""


class Report(NamedTuple):
    """What a chunk says of each member, every leaf ``[M]``.

    Attributes:
        failed_at: the step after which the member failed, or :data:`RUNNING`.
        summary: metrics reduced over the chunk, as :func:`jrl.training.summarize` does.
        at_failure: the metrics of the first step with one that is not finite (of the last step otherwise).
        before_failure: the metrics of the step before it; NaN where that is not in this chunk.
    """

    failed_at: Array
    summary: Metrics
    at_failure: Metrics
    before_failure: Metrics


class Evaluation(NamedTuple):
    """The final evaluation of each member, every leaf ``[M]``; the fields are columns of the table."""

    episode_return_mean: Array
    episode_return_std: Array
    episode_return_min: Array
    episode_return_max: Array
    episode_length_mean: Array
    num_cut_short: Array


def mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Return the one-dimensional mesh over which members are sharded."""
    return Mesh(np.asarray(devices), (AXIS,))


def sharding(of: Mesh) -> NamedSharding:
    """Return the sharding of every leaf with a leading axis of members."""
    return NamedSharding(of, PartitionSpec(AXIS))


def init(algo: Algorithm, on: Mesh, width: int | None) -> Callable[[Array, PyTree], Any]:
    """Return the jitted ``(seeds uint32 [M], hparams [M]) -> states [M]``."""

    def member(seed: Array, hparams: PyTree) -> Any:
        return algo.init(members.key_of(seed, members.INIT), hparams)

    # said, or jax would replicate leaves without elements
    return jax.jit(sharded(batching.over_members(member, width), on), out_shardings=sharding(on))


def chunk(algo: Algorithm, on: Mesh, width: int | None, length: int) -> Callable[..., Any]:
    """Return the jitted training of all members for at most ``length`` steps, the states donated.

    ``(states, failed_at [M], hparams, step, num_steps, num_groups) -> ((states, failed_at), Report)`` where
    ``step`` counts the steps before the chunk, and members of a device's groups from ``num_groups`` on are left
    as they are.

    A member with a metric, or at the chunk's end a parameter, that is not finite gets the number of that step
    in ``failed_at`` and the state (a replay excepted) that it had before the chunk; from then on it is left so.
    What others compute does not depend on it.
    """
    algo = algo._replace(step=jax.jit(algo.step))  # traced once, however often its shapes are asked for

    def advance(states: Any, failed_at: Array, hparams: Any, *numbers: Array) -> Any:
        step, num_steps, num_groups = numbers

        def member(carried: tuple[Any, Array], hparams: Any) -> tuple[tuple[Any, Array], Report]:
            return _advance_member(algo, length, carried, hparams, step, num_steps, skip=width == 1)

        return batching.update_members(member, width)((states, failed_at), hparams, num_groups=num_groups)

    train = sharded(advance, on, num_replicated=3)
    return jax.jit(train, donate_argnums=(0, 1), out_shardings=sharding(on))


def evaluate(
    algo: Algorithm, env: Environment, on: Mesh, width: int | None, num_episodes: int
) -> Callable[[Any, Array, PyTree], Evaluation]:
    """Return the jitted greedy evaluation ``(states, seeds uint32 [M], hparams [M]) -> Evaluation``.

    Each member plays in the environment with its own parameters, ``hparams.env``.
    """

    def member(state: Any, seed: Array, hparams: Any) -> Evaluation:
        stats = training.evaluate(
            members.key_of(seed, members.EVALUATION),
            env,
            algo.policy(state, greedy=True),
            num_episodes=num_episodes,
            params=getattr(hparams, "env", None),
        )
        returns = stats.episode_return
        return Evaluation(
            returns.mean(),
            returns.std(),
            returns.min(),
            returns.max(),
            stats.episode_length.astype(jnp.float32).mean(),
            jnp.sum(~stats.completed),
        )

    return jax.jit(sharded(batching.over_members(member, width), on))


def gather(states: PyTree, index: Array | np.ndarray) -> PyTree:
    """Return the members ``index``, in that order."""
    return jax.tree.map(lambda leaf: leaf[index], states)


def sharded(function: Callable[..., Any], on: Mesh, num_replicated: int = 0) -> Callable[..., Any]:
    """Apply ``function`` to each device's own members; its last ``num_replicated`` arguments are for all."""

    def mapped(*arguments: Any) -> Any:
        num_sharded = len(arguments) - num_replicated
        specs = (PartitionSpec(AXIS),) * num_sharded + (PartitionSpec(),) * num_replicated
        return jax.shard_map(
            function, mesh=on, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
        )(*arguments)

    return mapped


def _advance_member(
    algo: Algorithm,
    length: int,
    carried: tuple[Any, Array],
    hparams: Any,
    step: Array,
    num_steps: Array,
    skip: bool,
) -> tuple[tuple[Any, Array], Report]:
    before, failed_at = carried
    failed_before = failed_at != RUNNING
    if skip:
        # Only where members are computed one by one: a bound of a vmapped loop that differs from member to
        # member would select between whole states, replays among them, in each round.
        num_steps = jnp.where(failed_before, 0, num_steps)
    shapes = jax.eval_shape(algo.step, before, hparams)[1]
    rows = {name: jnp.zeros((length,), metric.dtype) for name, metric in shapes.items()}

    def body(index: Array, carry: Any) -> Any:
        state, rows = carry
        state, metrics = algo.step(state, hparams)
        return state, {name: rows[name].at[index].set(metrics[name]) for name in rows}

    state, rows = batching.loop(0, num_steps, body, (before, rows))

    finite = jnp.stack([jnp.isfinite(row) for row in rows.values()]).all(0)
    at = jnp.argmin(finite)  # 0 where all are
    params_finite = _all_finite(getattr(state, "params", ()))
    failed_in_row, failed = ~finite.all(), ~(finite.all() & params_finite)
    at = jnp.where(failed_in_row, at, num_steps - 1)
    failed_at = jnp.where(failed_before | ~failed, failed_at, step + at.astype(failed_at.dtype) + 1)
    state = _rolled_back(failed_at != RUNNING, before, state)
    report = Report(
        failed_at,
        training.summarize(rows, num_steps),
        {name: row[at] for name, row in rows.items()},
        {name: jnp.where(at > 0, row[at - 1].astype(jnp.float32), jnp.nan) for name, row in rows.items()},
    )
    return (state, failed_at), report


def _all_finite(tree: PyTree) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all() if leaves else jnp.bool_(True)


def _rolled_back(failed: Array, before: PyTree, after: PyTree) -> PyTree:
    """Return ``before`` where ``failed``, but for a replay: selecting would copy it, and nothing reads it now."""

    def select(path: Any, old: Array, new: Array) -> Array:
        in_replay = bool(path) and jax.tree_util.keystr(path[:1], simple=True) == "replay"
        return new if in_replay else jnp.where(failed, old, new)

    return jax.tree_util.tree_map_with_path(select, before, after)
