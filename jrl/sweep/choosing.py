"""Who takes part in a sweep: seeds, settings and hyperparameters, from what :func:`jrl.sweep.execute` is given."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jrl import configuration, records, tables
from jrl.configuration import Setup
from jrl.records import RunError
from jrl.sweep import members, planning
from jrl.sweep.search import PBT, Halving, check_bounds
from jrl.sweep.spaces import Space

MOST_MEMBERS = 1 << 24
"""Of a sweep: a table of more would not fit into memory, whatever its members take."""


class Members(NamedTuple):
    """Who takes part: leaves ``[M, ...]`` on the host.

    Attributes:
        seeds: int64 ``[M]``.
        settings: int ``[M]``: members of the same number differ in their seed alone.
        hparams: every leaf ``[M, ...]``.
        swept: names of the leaves that the table has as columns.
    """

    seeds: np.ndarray
    settings: np.ndarray
    hparams: Any
    swept: tuple[str, ...]


def choose_members(
    algorithm: Any,
    hparams: Any,
    env: Any,
    config: Any,
    env_kwargs: Mapping[str, Any] | None,
    seeds: int | Sequence[int],
    grid: Mapping[str, Any] | None,
    random: Mapping[str, Space] | None,
    num_random: int,
    search_seed: int,
    prng: str = "threefry",
) -> tuple[Setup, Members]:
    """Return what is trained and who takes part; see :func:`execute` for the arguments."""
    if env is None:
        env = getattr(algorithm, "env", None)
        if env is None:
            raise RunError("env=None: a sweep needs the environment, for its evaluation too; give env=.")
    num_settings = _leading_length(hparams)
    single = hparams if num_settings is None else jax.tree.map(lambda leaf: leaf[0], hparams)
    setup = configuration.build(
        algorithm, env, config=config, hparams=single, env_kwargs=env_kwargs, prng=prng
    )
    if num_settings is None:
        settings, swept = _settings(setup.hparams, grid or {}, random or {}, num_random, search_seed)
    else:
        if grid or random:
            raise RunError(
                "hparams has a leading axis already: leave out grid and random, or give one member's."
            )
        settings = jax.tree.map(
            lambda leaf, like: np.asarray(leaf).astype(like.dtype), _fill_env(hparams, setup, num_settings),
            setup.hparams,
        )  # fmt: skip
        swept = tuple(members.varying(settings))
    numbers = _seeds(seeds)
    if (num_members := len(numbers) * members.size(settings)) > MOST_MEMBERS:
        raise RunError(
            f"{num_members:,} members: a sweep has at most {MOST_MEMBERS:,}; take fewer seeds or settings."
        )
    taken = {*tables.FIRST, *tables.RESULTS, *tables.CURVE, tables.LINEAGE}
    if clash := sorted({*swept, *members.varying(settings)} & taken):
        raise RunError(
            f"{clash[0]} is swept, and is a column of the table of results: give the hyperparameter another name."
        )
    setting = np.repeat(np.arange(members.size(settings)), len(numbers))
    hparams = jax.tree.map(lambda leaf: np.asarray(leaf)[setting], settings)
    return setup, Members(np.tile(numbers, members.size(settings)), setting, hparams, swept)


def _seeds(seeds: Any) -> np.ndarray:
    """Return the seeds, int64 ``[S]``."""
    if isinstance(seeds, str) or not (members.is_whole(seeds) or np.ndim(seeds) == 1):
        raise RunError(
            f"seeds={seeds!r}: expected how many, or which ones: a whole number or a list of them."
        )
    if np.ndim(seeds) == 0:
        if seeds < 1:
            raise RunError(f"seeds={seeds}: a sweep needs at least one seed.")
        if seeds > MOST_MEMBERS:
            raise RunError(f"seeds={seeds}: a sweep has at most {MOST_MEMBERS:,} members; take fewer.")
        return np.arange(seeds, dtype=np.int64)
    numbers = seeds.tolist() if hasattr(seeds, "tolist") else list(seeds)
    if not numbers:
        raise RunError(f"seeds={seeds!r}: a sweep needs at least one seed.")
    if not all(members.is_whole(seed) and 0 <= seed < 2**32 for seed in numbers) or len(set(numbers)) < len(
        numbers
    ):
        raise RunError(f"seeds={seeds!r}: must be different whole numbers from 0 to 2**32 - 1.")
    return np.asarray(numbers, np.int64)


def _leading_length(hparams: Any) -> int | None:
    """Return the number of settings of an HParams with a leading axis, None where it is that of one member."""
    if hparams is None or isinstance(hparams, Mapping):
        return None
    batched = {name: np.ndim(leaf) > 0 for name, leaf in members.names(hparams).items() if name[:4] != "env."}
    if any(batched.values()) and not all(batched.values()):
        names = ", ".join(name for name, is_batched in batched.items() if is_batched)
        raise RunError(
            f"hparams: {names} has a leading axis and the others have none. Every leaf needs one: use "
            "jrl.sweep.grid(hparams, name=[...]), or grid={...}."
        )
    return members.size(hparams) if batched and all(batched.values()) else None


def _settings(
    single: Any, grid: Mapping[str, Any], random: Mapping[str, Space], num_random: int, search_seed: int
) -> tuple[Any, tuple[str, ...]]:
    """Return all settings, leaves ``[S, ...]``: each different draw with each combination of the grid."""
    if bool(random) != bool(num_random):
        raise RunError(
            f"num_random={num_random} and random={dict(random)!r}: a random search needs both, the number of draws "
            "and a distribution for each name."
        )
    if both := sorted(set(grid) & set(random)):
        raise RunError(f"{', '.join(both)} is in the grid and in the random search; leave it out of one.")
    combinations = members.grid(single, **grid)
    draws = (
        members.random(jax.random.key(search_seed), single, num_random, **random)
        if random
        else members.broadcast(single, 1)
    )
    drawn = np.stack([members.names(draws)[name] for name in random], axis=1) if random else np.zeros((1, 0))
    # With the same seeds a draw repeated would be the same runs again, and count as further ones.
    first = np.sort(np.unique(drawn, axis=0, return_index=True)[1])
    num_combinations = members.size(combinations)
    of_draw = np.repeat(first, num_combinations)
    of_combination = np.tile(np.arange(num_combinations), len(first))
    leaves = [
        np.asarray(draw)[of_draw] if name in random else np.asarray(combination)[of_combination]
        for (name, draw), combination in zip(
            members.names(draws).items(), jax.tree.leaves(combinations), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(draws), leaves), (*random, *grid)


def _fill_env(hparams: Any, setup: Setup, n: int) -> Any:
    if getattr(hparams, "env", ()) is None:
        return dataclasses.replace(hparams, env=members.broadcast(setup.hparams.env, n))
    return hparams


def columns(who: Members) -> dict[str, np.ndarray]:
    """Return every leaf that differs between members, and the swept ones."""
    leaves = {name: np.asarray(leaf) for name, leaf in members.names(who.hparams).items()}
    differ = [name for name, leaf in leaves.items() if (leaf != leaf[:1]).any()]
    return {name: leaves[name] for name in dict.fromkeys((*who.swept, *differ))}


def population(who: Members, setup: Setup, pbt: PBT, halving: Halving | None) -> Members:
    """Return the members of a population: each a setting of its own, the hyperparameters that change swept."""
    if halving is not None:
        raise RunError("halving and pbt: a sweep has one search; leave out one of them.")
    if not hasattr(jax.eval_shape(setup.algo.init, jax.random.key(0), setup.hparams), "key"):
        raise RunError(
            "pbt: the algorithm's State has no field key, of which the copy of a member needs one of its own: call the "
            "key that its steps split so."
        )
    if len(who.seeds) < 2:
        raise RunError("pbt: a population has at least two members; give more seeds or settings.")
    for name in pbt.explore:
        members.check_name(name, members.names(setup.hparams), setup.hparams)
        check_bounds(name, members.names(setup.hparams)[name], *pbt.explore[name])
    swept = tuple(dict.fromkeys((*columns(who), *pbt.explore)))
    return who._replace(settings=np.arange(len(who.seeds)), swept=swept)


def moving(who: Members, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the hyperparameters that a population changes or hands on, ``[M]`` at the start."""
    return columns(who) if record.get("pbt") else {}


def moved(who: Members, population: Mapping[str, Any]) -> Members:
    """Return the members with the hyperparameters that a population has now."""
    rows = population.get("hparams", {})
    leaves = [
        np.array(rows[name][-1]) if name in rows else leaf
        for name, leaf in members.names(who.hparams).items()
    ]
    return who._replace(hparams=jax.tree.unflatten(jax.tree.structure(who.hparams), leaves))


def members_of(record: Mapping[str, Any], setup: Setup) -> Members:
    """Build again what :func:`execute` has written into ``sweep.json``."""
    n = len(record["seeds"])
    hparams = jax.tree.map(np.asarray, members.broadcast(setup.hparams, n))
    leaves = members.names(hparams)
    unknown = sorted(set(record["swept"]) - set(leaves))
    if unknown:
        raise RunError(
            f"the sweep varies {', '.join(unknown)}, which this version's hyperparameters do not have. Continue it "
            "with the version it was started with (versions in sweep.json)."
        )
    values = [
        np.asarray(record["swept"][name], leaf.dtype) if name in record["swept"] else leaf
        for name, leaf in leaves.items()
    ]
    return Members(
        np.asarray(record["seeds"], np.int64),
        np.asarray(record["settings"]),
        jax.tree.unflatten(jax.tree.structure(hparams), values),
        tuple(record["swept"]),
    )


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], devices: Sequence[jax.Device]) -> None:
    """Refuse to continue one sweep with the settings of another; a width may be said in another way on ``devices``."""
    old, new = ({"prng": "threefry", **record} for record in (old, new))  # left out where it is that
    for name in (
        "algorithm",
        "prng",
        "environment",
        "config",
        "hparams",
        "seeds",
        "swept",
        "env_steps",
        "eval_episodes",
        "halving",
        "pbt",
        "width",
    ):
        was, is_now = records.plain(old.get(name)), records.plain(new[name])
        if was == is_now:
            continue
        if name == "width" and planning.choose_width(was, devices) == planning.choose_width(is_now, devices):
            continue
        if isinstance(was, dict) and isinstance(is_now, dict):
            name = next(key for key in sorted({*was, *is_now}) if was.get(key) != is_now.get(key))
            was, is_now = was.get(name), is_now.get(name)
        raise RunError(
            f"the sweep in this folder is another one: its {name} is {_short(was)}, this command's {_short(is_now)}. "
            "A sweep is continued as it was started: use `jrl resume FOLDER`, or another --out for the new one."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_numbers(**values: int) -> None:
    """Refuse what is no whole number of at least 1 (of ``eval_episodes``: 0)."""
    for name, value in values.items():
        lowest = 0 if name == "eval_episodes" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise RunError(f"{name}={value!r}: must be a whole number of at least {lowest}.")


def how_to_resume(out: str | os.PathLike | None) -> str:
    """Say how to go on with the sweep in the folder ``out``."""
    return (
        "the sweep wrote no files"
        if out is None
        else f"continue the sweep with: jrl resume {shlex.quote(str(out))}"
    )
