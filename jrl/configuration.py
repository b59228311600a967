"""From names and plain values to an algorithm ready to run, and back to JSON: what ``run.json`` holds.

Strings become objects here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import _ALGORITHMS, ops
from jrl.records import RunError, plain
from jrl.types import Algorithm, Environment, PyTree

ALGORITHMS = _ALGORITHMS
"""Name on the command line and in ``run.json`` -> module with ``make``, ``Config`` and ``HParams``."""

PRNGS = ("threefry", "hashed")
"""Generators: JAX's own, and the cheap one of :func:`jrl.ops.hashed`."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """An algorithm on an environment, and where both came from.

    Attributes:
        algo: ready to ``init`` and ``step``.
        env: the environment it was made for.
        config: its static choices; None where an :class:`~jrl.types.Algorithm` was given ready-made.
        hparams: its traced numbers, every leaf a strongly typed array; ``hparams.env`` is filled in.
        algorithm: name of the algorithm.
        module: module it comes from, None where it was given as an object.
        env_id: id it was made from, None where an environment was given as an object.
        env_kwargs: keyword arguments of :func:`jrl.make`.
        prng: the generator that ``algo`` draws from, one of :data:`PRNGS`.
    """

    algo: Algorithm
    env: Environment
    config: Any
    hparams: Any
    algorithm: str
    module: str | None
    env_id: str | None
    env_kwargs: dict[str, Any]
    prng: str = "threefry"


def build(
    algorithm: Any,
    env: Any,
    *,
    config: Any = None,
    hparams: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    prng: str = "threefry",
) -> Setup:
    """Make the algorithm for the environment; nothing is computed.

    Args:
        algorithm: ``"ppo"`` or ``"dqn"``; a module (or other object) with ``make``, ``Config`` and
            ``HParams``; or an :class:`~jrl.types.Algorithm`, which needs ``hparams``.
        env: an id, or what else :func:`jrl.make` takes.
        config: a ``Config``, a mapping of the fields to change, or None for the defaults.
        hparams: an ``HParams``, a mapping of the fields to change, or None; ``hparams.env=None`` means the
            environment's own parameters.
        env_kwargs: keyword arguments of :func:`jrl.make`.
        prng: ``"threefry"``, JAX's own generator, or ``"hashed"``, the cheap one of :func:`jrl.ops.hashed`.

    Raises:
        ValueError: an unknown algorithm, environment, field or generator, or a value that the algorithm refuses.
        TypeError: something of another type.
    """
    from jrl.envs import make

    if prng not in PRNGS:
        raise RunError(f"prng={prng!r}: expected {' or '.join(PRNGS)}.")
    env_kwargs = dict(env_kwargs or {})
    environment = make(env, **env_kwargs)
    env_id = env if isinstance(env, str) else None
    if isinstance(algorithm, Algorithm):
        if hparams is None or config is not None:
            raise TypeError(
                "A ready-made Algorithm is run with its own hparams=... and without config= (that was given "
                "to its make)."
            )
        numbers = _fill_env(hparams, environment)
        algo = _drawing_from(prng, algorithm)
        return Setup(algo, environment, None, numbers, "algorithm", None, env_id, env_kwargs, prng)
    module = load(algorithm)
    config = _instance(module.Config, config, "config")
    check_sizes(config)
    hparams = _fill_env(_instance(module.HParams, hparams, "hparams"), environment)
    # HParams first: a bad number should be named before a network is built.
    algo = _drawing_from(prng, module.make(environment, config))
    name = next((n for n, m in ALGORITHMS.items() if m == getattr(module, "__name__", None)), None)
    return Setup(
        algo=algo,
        env=environment,
        config=config,
        hparams=hparams,
        algorithm=name or str(getattr(module, "__name__", "algorithm")),
        module=ALGORITHMS[name] if name else None,
        env_id=env_id,
        env_kwargs=env_kwargs,
        prng=prng,
    )


def _drawing_from(prng: str, algo: Algorithm) -> Algorithm:
    """Return the algorithm with the generator of the key it begins with, from which all others are split."""
    if prng == "threefry":
        return algo
    return algo._replace(init=lambda key, hparams: algo.init(ops.hashed(key), hparams))


def load(algorithm: Any) -> Any:
    """Return the module of an algorithm by its name; an object that has what it takes is returned as it is.

    Raises:
        ValueError: the name is not one of :data:`ALGORITHMS`.
        TypeError: an object without ``make``, ``Config`` and ``HParams``.
    """
    if isinstance(algorithm, str):
        if algorithm not in ALGORITHMS:
            raise RunError(
                f"unknown algorithm {algorithm!r}. {nearest(algorithm, ALGORITHMS)}List: jrl algos."
            )
        return importlib.import_module(ALGORITHMS[algorithm])
    missing = [name for name in ("make", "Config", "HParams") if not hasattr(algorithm, name)]
    if missing:
        raise TypeError(
            f"algorithm={algorithm!r} has no {', '.join(missing)}. Pass one of the names "
            f"{sorted(ALGORITHMS)}, a module with make, Config and HParams, or a jrl Algorithm."
        )
    return algorithm


def nearest(name: str, known: Any) -> str:
    """Return ``"Nearest: a, b. "`` for a message, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, [str(item) for item in known], n=3, cutoff=0.5)
    return f"Nearest: {', '.join(near)}. " if near else ""


def _instance(cls: type, value: Any, what: str) -> Any:
    if value is None:
        return cls()
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}={value!r}: expected a {cls.__name__}, a mapping of its fields, or None.")
    fields = [field.name for field in dataclasses.fields(cls)]
    for name in value:
        if name not in fields:
            raise RunError(f"{what} has no field {name!r}. {nearest(name, fields)}Its fields are: {fields}.")
    return cls(**value)


def check_sizes(config: Any) -> None:
    """Refuse what no program could hold, by name; JAX would say that an integer overflowed, and not which."""
    for name, value in _fields(config).items():
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, int) and abs(number) >= 2**31:
                raise RunError(f"{name}={value!r}: must be below 2**31, as counts are 32 bits wide.")


def _fill_env(hparams: Any, env: Environment) -> Any:
    """Put in the environment's parameters, and make arrays of all leaves once, so that nothing retraces."""
    if getattr(hparams, "env", ()) is None:
        hparams = dataclasses.replace(hparams, env=env.params)
    path_and_leaves, structure = jax.tree_util.tree_flatten_with_path(hparams)
    leaves = []
    for path, leaf in path_and_leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, int) and not isinstance(leaf, bool) and not name.startswith("env/"):
            leaf = float(leaf)  # gamma=1 means 1.0; an environment's integers stay integers
        try:
            array = np.asarray(leaf)
            # numpy first: jnp.asarray of a Python number would be weakly typed
            leaves.append(jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"hparams: {name}={leaf!r} is not a number or an array.") from error
    hparams = jax.tree.unflatten(structure, leaves)
    if hasattr(hparams, "env"):
        # Now, where the numbers are known: traced, a fraction in place of an integer would be cut off in silence.
        jax.eval_shape(lambda key: env.reset(key, hparams.env), jax.random.key(0))
    return hparams


# ------------------------------------------------------------------------------- environment parameters


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by name, as in ``gravity`` or ``robot/mass``."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def override_params(params: PyTree, overrides: Mapping[str, str | float]) -> PyTree:
    """Return an environment's parameters with some of them changed.

    Args:
        params: a pytree of numbers, ``env.params``.
        overrides: name -> number, or its text.

    Raises:
        RunError: an unknown name (the message has the nearest ones), a value that is not of the parameter's
            type, or a parameter that is not a single number.
    """
    known = named_leaves(params)
    changed = dict(known)
    for name, value in overrides.items():
        if name not in known:
            raise RunError(
                f"the environment has no parameter {name!r}. {nearest(name, known)}It has: "
                f"{', '.join(sorted(known)) or 'none'}."
            )
        default = np.asarray(known[name])
        if default.ndim:
            raise RunError(
                f"parameter {name} has shape {default.shape}; only single numbers can be set here."
            )
        changed[name] = _number(name, value, default)
    return jax.tree.unflatten(jax.tree.structure(params), list(changed.values()))


def _number(name: str, value: str | float, default: np.ndarray) -> Any:
    kinds = {"b": ("true or false", bool), "i": ("an integer", int), "u": ("an integer", int)}
    what, kind = kinds.get(default.dtype.kind, ("a number", float))
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        number = int(str(value)) if kind is int else float(value)
    except (ValueError, KeyError) as error:
        raise RunError(
            f"parameter {name}={value!r} is not {what}, as the default {default.item()!r} is."
        ) from error
    held = jax.dtypes.canonicalize_dtype(default.dtype)
    limits = np.iinfo(held) if kind is int else np.finfo(held)
    if math.isfinite(number) and not float(limits.min) <= number <= float(limits.max):
        raise RunError(
            f"parameter {name}={value!r} is no {held.name}, which holds {float(limits.min):g} to {float(limits.max):g}."
        )
    return number


# -------------------------------------------------------------------------------------------------- JSON


def to_json(setup: Setup) -> dict[str, Any]:
    """Return everything :func:`from_json` needs, as JSON values."""
    config = None if setup.config is None else plain(_fields(setup.config))
    # Left out where it is what runs of before had.
    prng = {} if setup.prng == "threefry" else {"prng": setup.prng}
    sources = sources_of(setup.env)
    return (
        prng
        | ({"sources": sources} if sources else {})
        | {
            "algorithm": {"name": setup.algorithm, "module": setup.module},
            "environment": {"id": setup.env_id, "name": setup.env.name, "kwargs": plain(setup.env_kwargs)},
            "config": config,
            "hparams": {
                name: _shortest(np.asarray(leaf)) for name, leaf in named_leaves(setup.hparams).items()
            },
        }
    )


def from_json(
    record: Mapping[str, Any], *, algorithm: Any = None, env: Any = None, hparams: Any = None
) -> Setup:
    """Build again what :func:`to_json` described.

    Args:
        record: the contents of ``run.json``.
        algorithm: needed where the run was given an algorithm as an object; otherwise left out.
        env: needed where the run was given an environment as an object; otherwise left out.
        hparams: for a ready-made :class:`~jrl.types.Algorithm`, any of its hyperparameters: their structure
            is used, the numbers come from the record.

    Raises:
        RunError: an object is needed and was not given, or the record does not fit it.
    """
    name, env_name = record["algorithm"]["name"], record["environment"]["name"]
    if "corpus" in record:
        raise RunError(
            f"this is a run of a language model ({name} on {env_name}), which acts in no environment: use "
            "jrl.language.runs.load and jrl.language.runs.resume, or the commands jrl generate, eval and resume."
        )
    if algorithm is None and name not in ALGORITHMS:
        raise RunError(
            f"the run was given its algorithm ({name}) as an object, which a file cannot hold. Continue "
            "it in Python: jrl.resume(path, algorithm=...)."
        )
    if env is None and record["environment"]["id"] is None:
        raise RunError(
            f"the run was given its environment ({env_name}) as an object, which a file cannot hold. "
            "Continue it in Python: jrl.resume(path, env=...)."
        )
    given = algorithm if algorithm is not None else name
    config = record["config"]
    if config is not None:
        config = {field: _tuples(value) for field, value in config.items()}
    setup = build(
        given,
        env if env is not None else record["environment"]["id"],
        config=config,
        hparams=hparams,
        env_kwargs=record["environment"]["kwargs"] if env is None else None,
        prng=record.get("prng", "threefry"),
    )
    return dataclasses.replace(setup, hparams=_restore_numbers(setup.hparams, record["hparams"]))


def sources_of(env: Environment) -> dict[str, Any]:
    """Return what the environment was made of beside its arguments: files and weights, with their SHA-256."""
    sources = getattr(env.step, "sources", None)
    return {} if sources is None else sources()


def changed_sources(record: Mapping[str, Any], env: Environment) -> str:
    """Return which of the sources in ``run.json`` or ``sweep.json`` are others now, in words; "" for none.

    What was recorded without them counts as unchanged.
    """
    before = record.get("sources", {})
    now = sources_of(env) if before else {}
    changed = []
    for what in sorted({*before} & {*now}):
        old, new = before[what], now[what]
        if old["sha256"] != new["sha256"]:
            steps = old.get("step"), new.get("step")
            told = "" if None in steps else f" (step {steps[0]}, now {steps[1]})"
            changed.append(f"{what} {new['name']}{told}")
    return ", ".join(changed)


def check_sources(record: Mapping[str, Any], env: Environment, folder: Any) -> None:
    """Refuse to go on with an environment that is made of other files than the run or sweep in ``folder`` was.

    Raises:
        RunError: a model that was trained further, a corpus or prompts that were edited.
    """
    if changed := changed_sources(record, env):
        raise RunError(
            f"changed since the training in {folder} was started: {changed}. With other rewards, or another "
            "reference, it cannot go on as it would have. Put the old content back, or start anew with another --out."
        )


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _shortest(array: np.ndarray) -> Any:
    """Write a float32 with the fewest digits that read back as the same one: 0.001, not 0.0010000000475."""
    if array.dtype != np.float32:
        return plain(array)
    digits = np.array([float(str(value)) for value in array.ravel()]).reshape(array.shape)
    return plain(digits)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _restore_numbers(hparams: Any, values: Mapping[str, Any]) -> Any:
    current = named_leaves(hparams)
    if set(current) != set(values):
        differ = sorted(set(current) ^ set(values))
        raise RunError(
            f"the hyperparameters in run.json are not those of this version: {', '.join(differ)}. A run is "
            "continued with the version it was started with (versions in run.json), or started anew."
        )
    leaves = [jnp.asarray(_finite(values[name]), leaf.dtype) for name, leaf in current.items()]
    return jax.tree.unflatten(jax.tree.structure(hparams), leaves)


def _finite(value: Any) -> Any:
    """Undo what JSON cannot hold: ``"inf"``, ``"-inf"`` and null for NaN."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return float("nan") if value is None else float(value) if isinstance(value, str) else value
