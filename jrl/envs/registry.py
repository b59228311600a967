"""One door to every environment: :func:`make`, and the registry of jrl's own ids."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from jrl.types import Environment

DOWNLOADS = ("MNISTBandit-bsuite",)
"""Ids whose environment downloads data when it is built; :func:`ids` leaves them out."""

NEED_DATA = {"MovieBooking-jrl": "data"}
"""Ids that need an argument of :func:`make`, the folder of their data; :func:`ids` leaves them out too."""

_FACTORIES: dict[str, Callable[..., Environment]] = {}


def register(env_id: str, factory: Callable[..., Environment]) -> None:
    """Add an id to those :func:`make` knows.

    Args:
        env_id: the id; one that gymnax also has hides gymnax's.
        factory: ``(**kwargs) -> Environment``, given the keyword arguments of :func:`make`.

    Raises:
        ValueError: the id is empty or taken.
        TypeError: the factory is not callable.
    """
    if not isinstance(env_id, str) or not env_id:
        raise ValueError(f"env_id={env_id!r}: expected a non-empty string.")
    if env_id in _FACTORIES:
        raise ValueError(f"env_id={env_id!r} is already registered; choose another id.")
    if not callable(factory):
        raise TypeError(f"factory={factory!r}: expected a function that returns a jrl Environment.")
    _FACTORIES[env_id] = factory


def ids() -> list[str]:
    """Return every id :func:`make` can build offline: jrl's own, then gymnax's (which is imported here).

    Those that download data first are in :data:`DOWNLOADS` instead, those of data that you bring in :data:`NEED_DATA`.
    """
    from jrl.envs import gymnax

    own = sorted(set(_FACTORIES) - set(NEED_DATA))
    return own + [i for i in gymnax.registered() if i not in _FACTORIES and i not in DOWNLOADS]


def register_with_gymnax() -> list[str]:
    """Make every id of jrl's own known to gymnax, so that ``gymnax.make`` builds it; return those ids.

    gymnax is imported here. Called again it adds what was registered since. Environments that gymnax has no
    space for (MultiDiscrete actions, observations of several arrays) raise when built there.
    """
    from jrl.envs import gymnax

    for env_id, factory in _FACTORIES.items():
        gymnax.register(env_id, factory)
    return sorted(_FACTORIES)


def make(id_or_env: str | Environment | Any, **kwargs: Any) -> Environment:
    """Return an environment as a record of pure functions.

    ::

        env = jrl.make("CartPole-v1", params={"max_steps_in_episode": 200})
        env = jrl.make("FourRooms-misc", use_visual_obs=True)     # kwargs go to gymnax's factory
        env = jrl.make(MyGymnaxEnvironment())

    Args:
        id_or_env: an id (:func:`ids` lists them), a gymnax ``Environment`` instance, or a jrl
            :class:`~jrl.types.Environment`, which is returned as it is.
        **kwargs: for gymnax environments ``params`` (their parameters, or a mapping of the fields to change)
            and ``raw=True`` (leave a Discrete observation, FrozenLake's, an int32 scalar; by default it
            becomes a one-hot float32 vector); the rest goes to the environment's factory. Classic control,
            Breakout and Space Invaders are jrl's own versions: gymnax's parameters and transitions, several
            times as fast, with other random numbers and bool boards. ``fast=False``, arguments for gymnax's
            factory, or gymnax's instance give gymnax's code.

    Raises:
        ValueError: an unknown id, or an action space that has no counterpart here.
        TypeError: one of gymnax's wrappers, which would be bypassed; the message names jrl's.
        RuntimeError: data that has to be downloaded cannot be had.
    """
    if isinstance(id_or_env, Environment):
        if kwargs:
            raise TypeError(
                f"make({id_or_env.name}): a jrl Environment takes no keyword arguments, got {kwargs}."
            )
        return id_or_env
    if isinstance(id_or_env, str) and id_or_env in _FACTORIES:
        return _FACTORIES[id_or_env](**kwargs)

    from jrl.envs import gymnax

    if not isinstance(id_or_env, str):
        return gymnax.adapt(id_or_env, **kwargs)
    known = gymnax.registered()
    if id_or_env not in known:
        raise ValueError(_unknown(id_or_env, [*_FACTORIES, *known]))
    if id_or_env not in DOWNLOADS:
        return gymnax.make_registered(id_or_env, **kwargs)
    try:
        return gymnax.make_registered(id_or_env, **kwargs)
    except (OSError, EOFError) as error:
        raise RuntimeError(
            f"{id_or_env} downloads its data when it is built, and that failed ({error}). Build it once with "
            "a network connection, or choose an id that needs none: jrl envs."
        ) from error


def _unknown(env_id: str, known: list[str]) -> str:
    # compared in lower case and without the suffix too: "cartpole" is nearest to "CartPole-v1"
    by_lower = {name.lower(): name for name in known} | {n.lower().partition("-")[0]: n for n in known}
    near = dict.fromkeys(
        by_lower[match] for match in difflib.get_close_matches(env_id.lower(), by_lower, n=5, cutoff=0.5)
    )
    hint = f" Nearest: {', '.join(list(near)[:3])}." if near else ""
    return f"Unknown environment id {env_id!r}.{hint} List all with: jrl envs (in Python: jrl.envs.ids())."
