"""What every algorithm asks of its arguments, while there is still a name to put into the message."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jrl.types import Environment, Network, Shards


def environment(env: Any) -> None:
    """Raise unless ``env`` is a single Environment whose observations are what it says.

    Raises:
        TypeError: no Environment.
        ValueError: ``reset`` returns other shapes than ``env.observation``, as one that is vectorised does.
    """
    if not isinstance(env, Environment):
        raise TypeError(f"env={env!r} is no jrl Environment: build it with jrl.make({env!r}) first.")
    obs = jax.eval_shape(env.reset, jax.random.key(0), env.params)[1]
    found, said = (
        (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
        for tree in (obs, env.observation)
    )
    if found != said:
        raise ValueError(
            f"{env.name}: reset returns observations of shapes {found[1]}, env.observation says {said[1]}. "
            "An algorithm takes a single environment and vectorises it itself: leave out jrl.envs.vectorize."
        )


def config(given: Any, expected: type) -> Any:
    """Return ``given``, or the defaults where it is None.

    Raises:
        TypeError: it is of another class.
    """
    if given is None:
        return expected()
    if not isinstance(given, expected):
        raise TypeError(
            f"config is a {type(given).__module__}.{type(given).__qualname__}: make takes a "
            f"{expected.__module__}.{expected.__qualname__}; numbers go to init and step as HParams."
        )
    return given


def sizes(config: Any, *names: str) -> None:
    """Raise unless each named field of a Config is an integer of at least 1; for ``__post_init__``.

    Raises:
        TypeError: a field is no integer.
        ValueError: a field is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: must be an integer.")
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1.")


def shard(config: Any, shards: Shards) -> int:
    """Return the environments of each shard.

    Raises:
        ValueError: they, or the minibatches of their transitions, would differ in size.
    """
    num_envs, rest = divmod(config.num_envs, shards.count)
    if rest:
        raise ValueError(
            f"num_envs={config.num_envs} cannot be split into {shards.count} equal shards; use a multiple of "
            f"{shards.count}, or a number of shards that divides it."
        )
    if num_envs * config.unroll_length % config.num_minibatches:
        raise ValueError(
            f"num_minibatches={config.num_minibatches} does not divide the transitions of one of {shards.count} "
            f"shards, {num_envs} × {config.unroll_length} = {num_envs * config.unroll_length}: each minibatch takes an "
            "equal part of every shard; use fewer minibatches or shards."
        )
    return num_envs


def hparams(given: Any, expected: type) -> None:
    """Raise unless ``given`` holds the numbers of one run. Runs while tracing, costs nothing afterwards.

    Raises:
        TypeError: it is of another class.
        ValueError: a field has an axis: it would broadcast against environments or minibatches in silence.
    """
    if not isinstance(given, expected):
        raise TypeError(
            f"hparams is a {type(given).__module__}.{type(given).__qualname__}: init and step take a "
            f"{expected.__module__}.{expected.__qualname__}."
        )
    for name, value in vars(given).items():
        if name != "env" and jnp.ndim(value) != 0:
            raise ValueError(
                f"hparams.{name} has shape {jnp.shape(value)}: one run takes scalars. To sweep it give every key "
                "and every swept field a leading axis and use jax.vmap over init and step."
            )


def feed_forward(network: Network, algorithm: str) -> None:
    """Raise ValueError if ``network`` has a memory, which shuffled single steps cannot carry."""
    if jax.tree.leaves(network.init_memory(())):
        raise ValueError(
            f"{algorithm}.make(network=…) has a memory: {algorithm} learns from single steps in random order, "
            "not from sequences; use a network without init_memory."
        )
