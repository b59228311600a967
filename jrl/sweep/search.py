"""Search inside a sweep: successive halving, and population-based training, without compiling anew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.sweep import members
from jrl.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943).

    After ``env_steps / eta**(num_rungs - r)`` environment steps of rung ``r = 1 … num_rungs - 1`` the best
    ``1 / eta`` of the settings go on; a setting's score is the interquartile mean over its seeds of the training
    return since the last rung's middle, and the worst of all where one of them was frozen. The best ones train for
    all of ``env_steps``. Which of equal ones go on is drawn, not decided by their place in the grid.

    A rung compares what it sees: the returns of episodes that have *ended*. Before every environment of a member has
    ended an episode or two these are the short ones, and of the policy at the start; see ``min_env_steps``. A seed
    that ended none since then, but was not frozen, has the newest return before; where there is none, or where its
    episodes under way have gone further from 0 already, what these have gathered on average so far.

    Attributes:
        eta: the factor between rungs, above 1.
        num_rungs: rungs, the last of which is the end of the run; None for as many as leave one setting.
        min_env_steps: environment steps of a member before which nothing is stopped: earlier rungs wait, and of
            those that fall together the first one counts. Where episodes run into a time limit of ``L`` steps until
            something is learned, take at least ``2 * L * num_envs``.
    """

    eta: float = 3.0
    num_rungs: int | None = None
    min_env_steps: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eta) and self.eta > 1):
            raise ValueError(
                f"halving(eta={self.eta}): must be above 1, the factor by which settings get fewer."
            )
        if self.num_rungs is not None and not (members.is_whole(self.num_rungs) and self.num_rungs >= 2):
            raise ValueError(
                f"halving(num_rungs={self.num_rungs}): needs at least 2, a whole number, or it stops nothing."
            )
        if not members.is_whole(self.min_env_steps) or self.min_env_steps < 0:
            raise ValueError(
                f"halving(min_env_steps={self.min_env_steps}): must be 0 or more environment steps, a whole number."
            )

    def rungs(self, num_settings: int, num_steps: int, env_steps_per_step: int = 1) -> list[tuple[int, int]]:
        """Return ``(algorithm steps, settings that go on)`` for each rung but the last, steps ascending."""
        earliest = max(1, -(-self.min_env_steps // env_steps_per_step))
        levels = self.num_rungs or 1 + math.floor(math.log(max(num_settings, 1), self.eta) + 1e-9)
        found: list[tuple[int, int]] = []
        for rung in range(1, levels):
            step = max(earliest, round(num_steps / self.eta ** (levels - rung)))
            kept = max(1, math.floor(num_settings / self.eta**rung + 1e-9))
            if step < num_steps and kept < num_settings and (not found or step > found[-1][0]):
                found.append((step, kept))
        return found


@dataclasses.dataclass(frozen=True)
class PBT:
    """Population-based training inside a sweep, a round of :func:`exploit_and_explore` at regular intervals.

    All members are one population, whatever their seeds. A member's score is its mean training return since the
    middle between the last round and this one; where no episode ended since then, what :class:`Halving` takes of such
    a seed. One that was frozen is among the worst, and may be replaced as any other.

    Attributes:
        explore: name -> (low, high), the hyperparameters that change and their bounds.
        interval: environment steps of a member between two rounds, rounded up to whole chunks of training.
        share: of the members, replaced in a round.
        factor: by which a hyperparameter is multiplied or divided.
        seed: of the rounds' draws.
    """

    explore: Mapping[str, tuple[float, float]]
    interval: int
    share: float = 0.25
    factor: float = 1.25
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {name: (float(low), float(high)) for name, (low, high) in self.explore.items()}
        object.__setattr__(self, "explore", bounds)  # as plain numbers, which a file holds
        if not self.explore:
            raise ValueError("pbt(explore={}): names no hyperparameter; give name -> (low, high).")
        for name, (low, high) in bounds.items():
            if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
                raise ValueError(
                    f"pbt(explore {name}: low={low:g}, high={high:g}): low must be below high, and both finite."
                )
        if not members.is_whole(self.interval) or self.interval < 1:
            raise ValueError(
                f"pbt(interval={self.interval}): must be at least one environment step, a whole number."
            )
        _check_round("pbt", self.share, self.factor)

    def rounds(self, chunk: int, num_steps: int, env_steps_per_step: int) -> range:
        """Return the algorithm steps after which there is a round: multiples of ``chunk`` below ``num_steps``."""
        interval = -(-self.interval // (chunk * env_steps_per_step)) * chunk
        return range(interval, num_steps, interval)


def best(scores: np.ndarray, num: int) -> np.ndarray:
    """Return the indices of the ``num`` highest scores, best first; NaN is the lowest, equal ones keep their order."""
    return np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:num]


def exploit_and_explore(
    key: Key,
    states: PyTree,
    hparams: Any,
    score: Array,
    *,
    explore: Mapping[str, tuple[float, float]],
    share: float = 0.25,
    factor: float = 1.25,
) -> tuple[PyTree, Any, Array]:
    """One round of population-based training (Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846).

    Each of the worst ``share`` of the members is replaced by a copy of one of the best ``share`` (of those with a
    score; where none has one, nothing happens), drawn uniformly, whose hyperparameters are multiplied or divided by
    ``factor``, each with probability ½, within their bounds; whole numbers are rounded, and move by at least 1. The
    states are gathered, the hyperparameters are numbers: nothing compiles anew. The copy keeps a random stream of its
    own.

    Args:
        key: consumed.
        states: of all members, ``[M, ...]``, with a field ``key``.
        hparams: ``[M, ...]``.
        score: ``[M]``, higher is better; NaN is the worst.
        explore: name -> (low, high), the hyperparameters that change and their bounds.
        share: of the members, at most ½.
        factor: above 1.

    Returns:
        The states, the hyperparameters, and for each member the one it was copied from (itself where it stays),
        int32 ``[M]``.

    Raises:
        ValueError: ``share`` or ``factor`` is out of range, an unknown hyperparameter, or no whole number is within
            the bounds of one that is whole.
    """
    _check_round("exploit_and_explore", share, factor)
    leaves = members.names(hparams)
    for name in explore:
        members.check_name(name, {name: leaf[0] for name, leaf in leaves.items()}, hparams)
        check_bounds(name, leaves[name], *explore[name])
    num = score.shape[0]
    count = max(1, int(num * share)) if num > 1 else 0
    donor_key, direction_key, stream_key = jax.random.split(key, 3)
    score = jnp.where(jnp.isfinite(score), score, -jnp.inf)
    order = jnp.argsort(-score, stable=True)
    num_donors = jnp.clip(jnp.isfinite(score).sum(), 1, max(count, 1))
    donors = order[jax.random.randint(donor_key, (num,), 0, num_donors)]
    rank = jnp.zeros((num,), jnp.int32).at[order].set(jnp.arange(num, dtype=jnp.int32))
    replaced = (rank >= num - count) & jnp.isfinite(score[donors])
    source = jnp.where(replaced, donors, jnp.arange(num)).astype(jnp.int32)

    states = jax.tree.map(lambda leaf: leaf[source], states)
    streams = jax.vmap(jax.random.fold_in)(states.key, jax.random.bits(stream_key, (num,)))
    states = dataclasses.replace(states, key=jnp.where(replaced, streams, states.key))
    up = jax.random.bernoulli(direction_key, 0.5, (len(leaves), num))
    changed = []
    for index, (name, leaf) in enumerate(leaves.items()):
        leaf = leaf[source]
        if name in explore:
            low, high = explore[name]
            moved = jnp.where(up[index], leaf * factor, leaf / factor)
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                least = jnp.where(up[index] == (leaf >= 0), 1, -1)  # or a small number would stay as it is
                moved = jnp.where(jnp.round(moved) == leaf, leaf + least, jnp.round(moved))
                low, high = float(math.ceil(low)), float(math.floor(high))
            leaf = jnp.where(replaced, jnp.clip(moved, low, high).astype(leaf.dtype), leaf)
        changed.append(leaf)
    return states, jax.tree.unflatten(jax.tree.structure(hparams), changed), source


def check_bounds(name: str, leaf: Array | np.ndarray, low: float, high: float) -> None:
    """Refuse bounds without a whole number between them for a hyperparameter that is one.

    Raises:
        ValueError: there is none.
    """
    if jnp.issubdtype(leaf.dtype, jnp.integer) and math.ceil(low) > math.floor(high):
        raise ValueError(
            f"pbt(explore {name}: low={low:g}, high={high:g}): {name} is a whole number, and none is between; give "
            "wider bounds."
        )


def _check_round(what: str, share: float, factor: float) -> None:
    if not 0 < share <= 0.5:
        raise ValueError(f"{what}(share={share}): must be above 0 and at most 0.5.")
    if not (math.isfinite(factor) and factor > 1):
        raise ValueError(f"{what}(factor={factor}): must be above 1.")
