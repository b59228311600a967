"""What every algorithm asks of its arguments, while there is still a name to put into the message."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.types import Array, Box, Discrete, Environment, FiniteObservation, Network, Shards, TokenObservation


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


def actions(env: Environment, algorithm: str, *kinds: type) -> None:
    """Raise unless the actions of ``env`` are of one of ``kinds``, a Box with finite bounds.

    Raises:
        TypeError: another kind of action.
        ValueError: a Box that is not a bounded vector.
    """
    action = env.action
    if not isinstance(action, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"{algorithm} on {env.name} with actions {action!r}: it needs {names} actions; use jrl.ppo."
        )
    if isinstance(action, Box) and not (
        len(action.shape) == 1 and np.isfinite(action.low).all() and np.isfinite(action.high).all()
    ):
        raise ValueError(
            f"{algorithm} on {env.name} with actions {action!r}: the Box must be a vector with finite bounds; flatten "
            "the action, or give the environment other bounds (jrl.ppo needs none)."
        )


def discrete(env: Environment, algorithm: str) -> Discrete:
    """Return the actions of ``env``; raises TypeError unless they are Discrete."""
    if not isinstance(env.action, Discrete):
        raise TypeError(
            f"{algorithm} on {env.name} with actions {env.action!r}: Q-learning maximises over Discrete actions; use "
            "jrl.ppo, or wrap the environment in jrl.envs.discretize_actions(env, bins)."
        )
    return env.action


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
    if shards.count > 1:
        _microbatches(config, num_envs * config.unroll_length, f" of one of {shards.count} shards")
    return num_envs


def numeric(env: Environment, field: str) -> None:
    """Raise ValueError if the observations are tokens, names that have neither mean nor spread."""
    if any(isinstance(leaf, TokenObservation) for leaf in jax.tree.leaves(env.observation)):
        raise ValueError(
            f"{field}=True on {env.name}: its observations are tokens, and a token less the mean token is none; "
            f"leave {field} out."
        )


def minibatches(config: Any) -> None:
    """Raise ValueError unless a Config's batch splits into equal minibatches; for ``__post_init__``."""
    batch = config.num_envs * config.unroll_length
    if batch % config.num_minibatches:
        raise ValueError(
            f"num_minibatches={config.num_minibatches} does not divide the batch of num_envs × unroll_length = "
            f"{config.num_envs} × {config.unroll_length} = {batch}; use for instance "
            f"{_nearest_divisors(batch, config.num_minibatches)}."
        )
    _microbatches(config, batch)
    # PQN has no advantages.
    if getattr(config, "standardize_advantages", False) and batch == config.num_minibatches:
        raise ValueError(
            f"num_minibatches={config.num_minibatches} leaves one transition a minibatch, whose standardised "
            "advantage is always 0; use fewer, or standardize_advantages=False."
        )


def sequences(config: Any, shards: Shards) -> None:
    """Raise ValueError unless the environments of a shard split into equal minibatches."""
    num_envs = config.num_envs // shards.count
    if num_envs % config.num_minibatches:
        of_shard = f" of one of {shards.count} shards" if shards.count > 1 else ""
        raise ValueError(
            f"num_minibatches={config.num_minibatches} does not divide the num_envs={num_envs} environments{of_shard}: "
            "with a memory a minibatch is the whole unrolls of some of them; use for instance "
            f"{_nearest_divisors(num_envs, config.num_minibatches)}."
        )
    _microbatches(config, num_envs, " of whole unrolls")


def _microbatches(config: Any, batch: int, what: str = "") -> None:
    minibatch, parts = batch // config.num_minibatches, getattr(config, "num_microbatches", 1)
    if minibatch % parts:
        raise ValueError(
            f"num_microbatches={parts} does not divide a minibatch{what}, {batch} / {config.num_minibatches} = "
            f"{minibatch}; use for instance {_nearest_divisors(minibatch, parts)}."
        )


def _nearest_divisors(total: int, wanted: int) -> str:
    divisors = [n for n in range(1, min(total, 256) + 1) if total % n == 0]
    nearest = sorted(divisors, key=lambda n: abs(n - wanted))[:3]
    return ", ".join(map(str, sorted(nearest)))


def choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the named field of a Config is one of ``choices``; for ``__post_init__``."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}.")


def finite(env: Any, algorithm: str) -> tuple[int, int]:
    """Return the numbers of observations and of actions of a finite environment.

    Raises:
        TypeError: no Environment, or its actions or observations are not finite.
        ValueError: it is vectorised.
    """
    environment(env)
    if not isinstance(env.action, Discrete):
        raise TypeError(
            f"{algorithm} on {env.name} with actions {env.action!r}: a table needs Discrete actions; wrap the "
            "environment in jrl.envs.discretize_actions(env, bins)."
        )
    if not isinstance(env.observation, FiniteObservation):
        raise TypeError(
            f"{algorithm} on {env.name} with observations {env.observation}: a table needs finitely many, an index "
            "or one-hot (GridWorld-jrl, FrozenLake-misc). Map yours to an int32 index with "
            "jrl.envs.transform_observation and set observation=jrl.types.FiniteObservation(n, one_hot=False), "
            "or use jrl.linear, jrl.dqn or jrl.ppo."
        )
    return env.observation.n, env.action.n


def state_index(obs: Array) -> Array:
    """Return the indices ``[...]`` of finite observations: themselves, or where the one of one-hot ones is."""
    if jnp.issubdtype(obs.dtype, jnp.integer):
        return obs
    return jnp.argmax(obs, axis=-1).astype(jnp.int32)


def action_mask(mask: Any, num_states: int, num_actions: int) -> Array | None:
    """Return a mask of allowed actions as an array, None where it is None.

    Raises:
        ValueError: it is not bool ``[S, A]``, or forbids everything somewhere.
    """
    if mask is None:
        return None
    given = np.asarray(mask)
    if given.shape != (num_states, num_actions) or given.dtype != bool or not given.any(1).all():
        raise ValueError(
            f"action_mask has shape {given.shape} and dtype {given.dtype}: it must be bool "
            f"[{num_states}, {num_actions}], with an allowed action in every row."
        )
    return jnp.asarray(given)


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
