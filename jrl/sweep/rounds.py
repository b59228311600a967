"""The rounds of a search within a sweep: which members go on, and where their states are from then on."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import statistics
from jrl.sweep import members, planning, processes
from jrl.sweep.search import PBT, Halving, exploit_and_explore
from jrl.sweep.search import best as search_best

if TYPE_CHECKING:
    from jrl.sweep.session import Session  # imports this module


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Streams:
    """The keys of all members."""

    key: jax.Array


def rungs(sweep: Session, search: Halving | PBT | None) -> dict[int, int]:
    """Return after which algorithm steps a search decides, ends of chunks of training; of halving who goes on."""
    length = sweep.record["chunk_length"]
    if isinstance(search, PBT):
        return dict.fromkeys(search.rounds(length, sweep.total, sweep.setup.algo.env_steps_per_step), 0)
    rungs = (
        []
        if search is None
        else search.rungs(len(set(sweep.who.settings)), sweep.total, sweep.setup.algo.env_steps_per_step)
    )
    rounded = {-(-at // length) * length: kept for at, kept in rungs}
    return {at: kept for at, kept in rounded.items() if at < sweep.total}


def stop_the_worst(
    sweep: Session, order: np.ndarray, states: Any, step: int, kept: int
) -> tuple[np.ndarray, Any]:
    """Keep the best ``kept`` settings; return the new order, survivors first, and the states in it."""
    rows = step // sweep.record["chunk_length"]
    recent = sweep.results.history[rows // 2 : rows].copy()
    recent[:, sweep.results.failed_at >= 0] = np.nan  # a frozen member's returns are no score
    score = np.full(sweep.num, np.nan)
    alive = [
        s
        for s in dict.fromkeys(sweep.who.settings[order])
        if sweep.results.stopped_at[sweep.who.settings == s].max() < 0
    ]
    of_setting = [sweep.who.settings == setting for setting in alive]
    for members_of_it in of_setting:
        score[members_of_it] = mean_of_rows(recent[:, members_of_it])
    score = fill_unended(sweep, score, rows, order, states)
    scores = np.array([_iqm(score[members_of_it]) for members_of_it in of_setting])
    drawn = np.random.default_rng(step).permutation(
        len(alive)
    )  # so that equal ones are not kept by their place
    survivors = np.asarray(alive)[drawn[search_best(scores[drawn], kept)]]
    stays = np.isin(sweep.who.settings[order], survivors)
    stopped = order[~stays & (sweep.results.stopped_at[order] < 0)]
    sweep.results.stopped_at[stopped] = step
    permutation = np.argsort(~stays, kind="stable")
    home = sweep.layout.homes(len(order))
    index = home[permutation][sweep.layout.sources(len(order))]
    states = gather(sweep, states, index)
    sweep.show.message(
        f"rung at {step * sweep.setup.algo.env_steps_per_step:,} env steps: {len(survivors)} of {len(alive)} "
        "settings go on"
    )
    return order[permutation], states


def replace_the_worst(sweep: Session, pbt: PBT, states: Any, step: int) -> Any:
    """Go on with changed copies of the best members in the place of the worst; return the states."""
    row, per_step = step // sweep.record["chunk_length"], sweep.setup.algo.env_steps_per_step
    rows = min(rungs(sweep, pbt)) // sweep.record["chunk_length"]
    score = mean_of_rows(sweep.results.history[row - (rows - rows // 2) : row])
    score[sweep.results.failed_at >= 0] = np.nan
    score = fill_unended(sweep, score, row, np.arange(sweep.num), states)
    home, impl = sweep.layout.homes(sweep.num), jax.random.key_impl(states.key)
    streams = processes.fetch(jax.random.key_data(states.key))[home]
    if sweep.draw is None:  # traced once, for all rounds
        fixed: dict[str, Any] = {"explore": pbt.explore, "share": pbt.share, "factor": pbt.factor}
        sweep.draw = jax.jit(functools.partial(exploit_and_explore, **fixed))
    with sweep.watch.outside():  # it compiles at its first round, and holds nothing of size
        # The states themselves are too large to pass through it: their streams stand for them.
        new, hparams, origin = sweep.draw(
            jax.random.fold_in(members.key_of(jnp.uint32(pbt.seed), members.SEARCH), step),
            _Streams(jax.random.wrap_key_data(streams, impl=impl)),
            sweep.who.hparams,
            score.astype(np.float32),
        )
    source = np.asarray(origin)
    sweep.who = sweep.who._replace(hparams=jax.tree.map(np.asarray, hparams))
    sweep.results.inherit(row, source, members.names(sweep.who.hparams))
    sweep.latest = {name: values[source] for name, values in sweep.latest.items()}
    states = gather(sweep, states, home[source][sweep.layout.sources(sweep.num)])
    replaced = int((source != np.arange(sweep.num)).sum())
    sweep.show.message(f"round at {step * per_step:,} env steps: {replaced} of {sweep.num} members replaced")
    return dataclasses.replace(states, key=sweep.layout.spread(new.key))


def gather(sweep: Session, states: Any, index: np.ndarray) -> Any:
    """Return the members ``index`` of ``states``, which are used up.

    Leaf by leaf, so that memory holds one of them twice and not all.
    """
    leaves, structure = jax.tree.flatten(states)
    del states
    kinds = {(leaf.shape, leaf.dtype) for leaf in leaves} - set(sweep.movers)
    if kinds:
        with sweep.watch.outside():
            sweep.movers |= {kind: planning.compile_move(sweep.layout, *kind) for kind in kinds}
    index = index.astype(np.int32)
    for i, leaf in enumerate(leaves):
        leaves[i] = jax.block_until_ready(sweep.movers[leaf.shape, leaf.dtype](leaf, index))
        leaf.delete()
    return jax.tree.unflatten(structure, leaves)


def mean_of_rows(rows: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of what is finite; NaN where nothing is."""
    count = np.isfinite(rows).sum(0)
    return np.where(count > 0, np.nansum(rows, 0, dtype=float) / np.maximum(count, 1), np.nan)


def fill_unended(sweep: Session, score: np.ndarray, row: int, order: np.ndarray, states: Any) -> np.ndarray:
    """Return the scores ``[M]`` with one for each member that trains and ended no episode since scores count.

    Long episodes may be what the best policy is good for, so that none is no reason to be the worst. Such a member is
    scored by the newest return before, or by what its episodes under way have gathered on average where it has none
    or they have gone further from 0 already: only then does what has no end yet say more, be it reward or cost.

    Args:
        sweep: frozen members stay without a score.
        score: NaN where no episode ended.
        row: of the history, the first that is still to come.
        order: the members that ``states`` holds. Where these have no ``rollout``, nothing is known under way.
        states: in their slots.
    """
    unended = np.isnan(score) & (sweep.results.failed_at < 0) & (sweep.results.stopped_at < 0)
    if not unended.any():
        return score
    newest, gathered = sweep.results.newest_returns(row), np.full(sweep.num, np.nan)
    under_way = getattr(getattr(states, "rollout", None), "episode_return", None)
    if under_way is not None:
        of_each = processes.fetch(under_way)[sweep.layout.homes(len(order))].astype(float)
        gathered[order] = of_each.reshape(len(order), -1).mean(1)
    further = np.isfinite(gathered) & ~(np.abs(gathered) <= np.abs(newest))  # also where there is no newest
    return np.where(unended, np.where(further, gathered, newest), score)


def _iqm(values: np.ndarray) -> float:
    """Return the interquartile mean; NaN if any value is."""
    return math.nan if np.isnan(values).any() else float(statistics.fractional_interquartile_mean(values))
