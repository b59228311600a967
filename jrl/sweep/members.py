"""The members of a sweep: hyperparameters with a leading axis, and the keys of their seeds.

A member is one run: a seed and a value for every hyperparameter. Its hyperparameters are an ``HParams`` whose
every leaf has a leading axis ``[M]``, swept or not: so one compiled program serves any sweep.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jrl.sweep.spaces import Space
from jrl.types import Array, Key, PyTree

H = TypeVar("H")

INIT, EVALUATION, SEARCH = 0, 1, 2
"""What a key drawn from a seed is for; :func:`jrl.run` uses the same first two numbers."""


def seeds(n: int, start: int = 0) -> Key:
    """Return the keys that ``jrl.run(seed=...)`` initialises with for seeds ``start … start + n - 1``, ``[n]``.

    Raises:
        ValueError: ``n`` is no whole number of at least 1, or a seed is not from 0 to 2**32 - 1.
    """
    if not (is_whole(n) and is_whole(start)):
        raise ValueError(f"seeds({n!r}, start={start!r}): both must be whole numbers.")
    if n < 1:
        raise ValueError(f"seeds({n}): a sweep needs at least one seed.")
    if start < 0 or start + n > 2**32:
        raise ValueError(f"seeds({n}, start={start}): seeds are from 0 to 2**32 - 1.")
    return jax.vmap(lambda seed: key_of(seed, INIT))(jnp.arange(n, dtype=jnp.uint32) + jnp.uint32(start))


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def key_of(seed: Array, purpose: int) -> Key:
    """Return the key of a seed (uint32 ``[]``), for initialisation or for evaluation."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def grid(hparams: H, **values: Any) -> H:
    """Return every combination of the values given, in the order of a nested loop, the last name innermost.

    ::

        grid(ppo.HParams(), learning_rate=[1e-4, 3e-4, 1e-3], gamma=[0.95, 0.99])  # every leaf is [6]
        grid(hparams, **{"env.length": [0.5, 1.0]})                               # a parameter of the environment

    Args:
        hparams: what all members share; unbatched, ``hparams.env`` filled in where it is swept.
        **values: name of a leaf -> one or more numbers.

    Raises:
        ValueError: an unknown name (the message has the nearest), a static field, no values, the same one twice,
            or one that is not a finite number of the leaf's kind.
    """
    leaves = _leaves(hparams)
    arrays = {name: _values(name, value, leaves, hparams) for name, value in values.items()}
    combinations = list(itertools.product(*(range(len(array)) for array in arrays.values())))
    index = np.asarray(combinations, np.int64).reshape(len(combinations), len(arrays))
    columns = {name: array[index[:, i]] for i, (name, array) in enumerate(arrays.items())}
    return _with_columns(hparams, columns, len(combinations))


def random(key: Key, hparams: H, n: int, **spaces: Space) -> H:
    """Return ``n`` draws, every leaf ``[n]``.

    ::

        random(key, dqn.HParams(), 32, learning_rate=loguniform(1e-5, 1e-2), gamma=uniform(0.9, 0.999))

    Args:
        key: consumed. A name's draws do not depend on which others are swept.
        hparams: what all members share.
        n: members.
        **spaces: name of a leaf -> :func:`~jrl.sweep.uniform`, :func:`~jrl.sweep.loguniform`,
            :func:`~jrl.sweep.normal`, :func:`~jrl.sweep.choice`.

    Raises:
        ValueError: ``n`` is no whole number of at least 1, a name as in :func:`grid`, or a draw that the leaf
            cannot hold.
        TypeError: something that is no distribution.
    """
    if not is_whole(n) or n < 1:
        raise ValueError(f"random(n={n!r}): a sweep needs at least one member.")
    leaves, columns = _leaves(hparams), {}
    for name, space in spaces.items():
        check_name(name, leaves, hparams)
        if not hasattr(space, "sample"):
            raise TypeError(
                f"random({name}={space!r}): expected a distribution, for example loguniform(1e-5, 1e-2)."
            )
        # by the name, not by its place
        drawn = space.sample(jax.random.fold_in(key, zlib.crc32(name.encode())), n)
        if jnp.issubdtype(leaves[name].dtype, jnp.integer):
            drawn = jnp.round(drawn)
        columns[name] = _held(name, space, np.asarray(drawn), leaves[name].dtype)
    return _with_columns(hparams, columns, n)


def broadcast(hparams: H, n: int) -> H:
    """Return ``n`` members that are all the same, every leaf ``[n, ...]``."""
    return _with_columns(hparams, {}, n)


def product(keys: Key, hparams: H) -> tuple[Key, H]:
    """Return every seed with every setting, ``[H·S]``; the seeds of one setting lie side by side.

    Args:
        keys: ``[S]``, from :func:`seeds`.
        hparams: every leaf ``[H, ...]``, from :func:`grid` or :func:`random`.
    """
    num_seeds, num_settings = len(keys), size(hparams)
    setting = jnp.repeat(jnp.arange(num_settings), num_seeds)
    seed = jnp.tile(jnp.arange(num_seeds), num_settings)
    return keys[seed], jax.tree.map(lambda leaf: leaf[setting], hparams)


def concatenate(*batches: H) -> H:
    """Return the members of all batches, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def size(tree: PyTree) -> int:
    """Return the common leading length of a tree's leaves.

    Raises:
        ValueError: there is none.
    """
    lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in jax.tree.leaves(tree)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"the leaves have leading lengths {sorted(map(str, lengths))}: members are one leading axis of every "
            "leaf; make them with jrl.sweep.grid, random or broadcast."
        )
    return lengths.pop()  # type: ignore[return-value]


def names(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by name, as in ``learning_rate`` or ``env.length``."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def varying(hparams: PyTree) -> dict[str, np.ndarray]:
    """Return the leaves that differ between members, by name, each ``[M]``."""
    arrays = {name: np.asarray(leaf) for name, leaf in names(hparams).items()}
    return {
        name: array
        for name, array in arrays.items()
        if array.ndim == 1 and len(array) and (array != array[0]).any()
    }


# ------------------------------------------------------------------------------------------------- inside


def _leaves(hparams: Any) -> dict[str, np.ndarray]:
    # numpy first: a Python float becomes float32 as it does everywhere, a Python int of HParams too
    leaves = {}
    for name, leaf in names(hparams).items():
        array = np.asarray(leaf)
        if array.dtype.kind in "iu" and isinstance(leaf, int) and not name.startswith("env."):
            array = array.astype(np.float32)
        leaves[name] = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    return leaves


def _with_columns(hparams: H, columns: Mapping[str, np.ndarray], n: int) -> H:
    leaves = [
        jnp.asarray(columns[name])
        if name in columns
        else jnp.broadcast_to(jnp.asarray(leaf), (n, *leaf.shape))
        for name, leaf in _leaves(hparams).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(hparams), leaves)


def _values(name: str, value: Any, leaves: Mapping[str, np.ndarray], hparams: Any) -> np.ndarray:
    check_name(name, leaves, hparams)
    leaf = leaves[name]
    try:
        array = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}={value!r}: expected one or more numbers to sweep over ({error})."
        ) from error
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name}={value!r}: a grid needs one or more values for each name; give at least one."
        )
    if np.isnan(array).any():
        raise ValueError(f"{name}={value!r}: nan is no value to sweep over.")
    if leaf.dtype.kind in "iub" and (array != np.floor(array)).any():
        raise ValueError(f"{name}={value!r}: must be whole numbers, as the default {leaf.item()!r} is.")
    held = _held(name, value, array, leaf.dtype)
    known: dict[Any, float] = {}
    for number, given in zip(held.tolist(), array.tolist(), strict=True):
        if number in known:
            raise ValueError(
                f"{name}={value!r}: {given!r} and {known[number]!r} are the same {held.dtype.name}, and would count as "
                "two settings. Leave one out; for more runs of a setting give more seeds."
            )
        known[number] = given
    return held


def _held(name: str, value: Any, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return an array as a leaf holds it; refuse what does not fit."""
    with np.errstate(over="ignore", invalid="ignore"):
        held = array.astype(dtype)
    if dtype.kind in "iub":
        wrong, rule = held != array, "whole numbers that it can hold"
    else:
        wrong, rule = ~np.isfinite(held), "finite"
    if wrong.any():
        raise ValueError(
            f"{name}={value!r}: {array[wrong][0]:g} is no {dtype.name}; the values must be {rule}."
        )
    return held


def check_name(name: str, leaves: Mapping[str, np.ndarray], hparams: Any) -> None:
    """Refuse a name that is not one of the ``leaves`` of one member, or not a single number.

    Raises:
        ValueError: there is no such leaf, it is a static choice, or it is an array.
    """
    if name in leaves:
        if leaves[name].ndim:
            raise ValueError(
                f"{name} has shape {leaves[name].shape}: only single numbers can be swept by name; give an HParams "
                "with a leading axis on every leaf instead."
            )
        return
    if name in static_fields(hparams):
        raise ValueError(
            f"{name} is a static choice (a field of Config), not a number of HParams: each value compiles anew. "
            f"Sweep over it in groups, one compilation each: static_grid={{{name!r}: [...]}} "
            f"(--static-grid {name}=...)."
        )
    if name.startswith("env.") and getattr(hparams, "env", ()) is None:
        raise ValueError(
            f"{name}: hparams.env is None, so the environment's parameters are not known here. Fill them in: "
            "dataclasses.replace(hparams, env=env.params)."
        )
    near = ", ".join(difflib.get_close_matches(name, list(leaves), n=3, cutoff=0.5))
    raise ValueError(
        f"there is no hyperparameter {name!r}. {f'Nearest: {near}. ' if near else ''}"
        f"Known: {', '.join(sorted(leaves))}."
    )


def static_fields(hparams: Any) -> list[str]:
    """Return the fields of the ``Config`` that stands beside this ``HParams`` in its module, if one does."""
    config = getattr(inspect.getmodule(type(hparams)), "Config", None)
    return [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
