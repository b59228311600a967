"""The adapters from and to gymnax 1.x. The only file that imports gymnax, and only inside functions: it is slow."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs import classic_control, minatar
from jrl.envs.build import from_functions, strict
from jrl.envs.finite import replace_params
from jrl.envs.observations import one_hot_observation
from jrl.types import ActionSpace, Array, Box, Discrete, Environment, FiniteObservation, Key, PyTree, TimeStep

# What to use here instead of a wrapper of gymnax.
_INSTEAD = {
    "StickyActionWrapper": "jrl.envs.sticky_actions(env, probability)",
    "FlattenObservationWrapper": "jrl.envs.flatten_observation(env)",
    "LogWrapper": "nothing: jrl.rollout and jrl.train report episode returns and lengths",
    "LegacyStepAPIWrapper": "nothing: jrl reports terminated and truncated apart",
    "GymnaxToVectorGymWrapper": "jrl.envs.vectorize(env, num_envs)",
}

# jrl's own versions: the same transitions and parameters, written for a whole batch.
FAST: dict[str, Callable[[Any, ActionSpace, str], Environment]] = {
    "CartPole-v1": classic_control.cart_pole,
    "MountainCar-v0": classic_control.mountain_car,
    "MountainCarContinuous-v0": classic_control.continuous_mountain_car,
    "Pendulum-v1": classic_control.pendulum,
    "Acrobot-v1": classic_control.acrobot,
    "Breakout-MinAtar": minatar.breakout,
    "SpaceInvaders-MinAtar": minatar.space_invaders,
}

# What gymnax imports for its render methods alone: four fifths of the time that importing it takes.
_DRAWING = ("seaborn", "matplotlib.pyplot")


class _Later(types.ModuleType):
    """Stands for a module that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        self._leave()
        return getattr(importlib.import_module(self.__name__), name)

    def _leave(self) -> None:
        """Let an import find the real module."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


@functools.cache
def _gymnax() -> types.ModuleType:
    """Import gymnax; the libraries that it draws with follow if it draws."""
    later = {name: _Later(name) for name in _DRAWING if name not in sys.modules}
    sys.modules.update(later)
    try:
        return importlib.import_module("gymnax")
    finally:
        for module in later.values():  # gymnax's modules hold them; all others get the real ones
            module._leave()


def registered() -> list[str]:
    """Return the ids gymnax has registered, in its order."""
    return list(_gymnax().registered_envs)


def make_registered(
    env_id: str, *, params: Any = None, raw: bool = False, fast: bool = True, **kwargs: Any
) -> Environment:
    """Build the environment gymnax registers as ``env_id``; ``kwargs`` go to gymnax's factory.

    Where jrl has its own version (:data:`FAST`) that is taken, unless ``fast`` is False or gymnax's factory is
    given arguments, which only gymnax's version knows.
    """
    env, default = _gymnax().make(env_id, **kwargs)
    params = replace_params(default, params, env_id)
    if fast and not kwargs and env_id in FAST:
        return FAST[env_id](params, _action_space(env.action_space(params), env_id), env_id)
    return adapt(env, params=params, raw=raw, name=env_id)


def adapt(env: Any, *, params: Any = None, raw: bool = False, name: str | None = None) -> Environment:
    """Turn a gymnax ``Environment`` into a :class:`jrl.types.Environment`, with gymnax's own semantics.

    The transition is ``step_env``, the time limit ``is_truncated`` of the state it leads to, the next episode
    ``reset_env`` with a key of its own; one split of the step's key gives both keys, in gymnax's order, so
    that for equal keys jrl and gymnax agree step by step. A class that overrides ``step`` itself (DeepSea
    keeps counters across episodes there) is stepped through it. Types are made strict
    (:func:`jrl.envs.strict`), and a Discrete observation becomes a one-hot vector unless ``raw``.

    Args:
        env: an instance of ``gymnax.environments.environment.Environment``.
        params: its parameters, or a mapping of fields to change in the default ones.
        raw: leave a Discrete observation an int32 scalar.
        name: for messages and records; gymnax's name where None.

    Raises:
        TypeError: ``env`` is one of gymnax's wrappers, or no gymnax environment; ``params`` are another's.
        ValueError: the action space has no counterpart, or ``params`` names a field that does not exist, gives one an
            array of another shape, or what is no number.
    """
    _gymnax()
    from gymnax.environments import environment, spaces

    if not isinstance(env, environment.Environment):
        raise TypeError(_refusal(env))
    name = name or env.name
    params = replace_params(env.default_params, params, name)
    action = _action_space(env.action_space(params), name)

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        obs, env_state = env.reset_env(key, params)
        return env_state, obs

    if type(env).step is environment.Environment.step and type(env).reset is environment.Environment.reset:

        def transition(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[Any, ...]:
            obs, env_state, reward, terminated, _ = env.step_env(key, env_state, action, params)
            return env_state, obs, reward, terminated, env.is_truncated(env_state, params)

        adapted = from_functions(reset, transition, params, action, name)
    else:

        def reset_itself(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
            obs, env_state = env.reset(key, params)
            return env_state, obs

        def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
            obs, env_state, reward, terminated, truncated, info = env.step(key, env_state, action, params)
            return env_state, TimeStep(obs, reward, terminated, truncated, info["final_observation"])

        adapted = strict(Environment(reset_itself, step, params, None, action, name))

    space = env.observation_space(params)
    if not isinstance(space, spaces.Discrete):
        return adapted
    if raw and adapted.observation == FiniteObservation(int(space.n), one_hot=False):
        return adapted._replace(observation=FiniteObservation(int(space.n), one_hot=False))
    return adapted if raw else one_hot_observation(adapted, int(space.n))


def register(env_id: str, factory: Callable[..., Environment]) -> None:
    """Register a factory of jrl's with gymnax, once; an id that gymnax already has is left as it is."""
    gymnax = _gymnax()
    if env_id not in gymnax.registered_envs:
        gymnax.register(env_id, lambda **kwargs: to_gymnax(factory(**kwargs)))


def to_gymnax(env: Environment) -> Any:
    """Turn a :class:`jrl.types.Environment` into a gymnax 1.x ``Environment``, for tools written for those.

    Its ``reset`` and ``step`` are jrl's: for equal keys they give the same. The state is a record of jrl's
    state (``env_state``), ``time`` and the last ``truncated``; the parameters one of jrl's (``env``) and
    ``max_steps_in_episode``, which where jrl's have that field, or ``max_steps``, takes its place (of wrappers the
    outermost that has one; where none has, no episode is cut). ``step_env`` is
    there for tools that reset by themselves; as jrl's environments reset within the step, the state it
    returns after an episode's end is already that of the next.

    Raises:
        TypeError: ``env`` is no jrl Environment.
        ValueError: an action space or an observation that gymnax has no space for.
    """
    if not isinstance(env, Environment):
        raise TypeError(f"to_gymnax(env={env!r}): no jrl Environment; build it with jrl.make.")
    if not isinstance(env.observation, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{env.name}: the observation is a pytree of several arrays; wrap the environment in "
            "jrl.envs.flatten_observation(env) first."
        )
    if not isinstance(env.action, Discrete | Box):
        raise ValueError(f"{env.name}: gymnax has no space for actions {env.action!r}.")
    return _reverse_adapter()(env)


@functools.cache
def _reverse_adapter() -> type:
    """The class of :func:`to_gymnax`; made on demand, since its base class is gymnax's."""
    _gymnax()
    from gymnax.environments import environment, spaces

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class State(environment.EnvState):
        env_state: Any
        truncated: Array

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Params(environment.EnvParams):
        env: Any = ()

    def limit_of(params: Any) -> Any:
        name = limit_name(params)
        if name is not None:
            return getattr(params, name)
        # A wrapper's record has the inner one.
        return limit_of(params.env) if hasattr(params, "env") else None

    def limit_name(params: Any) -> str | None:
        return next((name for name in ("max_steps_in_episode", "max_steps") if hasattr(params, name)), None)

    def limited(params: Any, limit: Any) -> PyTree:
        if limit_of(params) is None:
            return params
        name = limit_name(params)
        change = {"env": limited(params.env, limit)} if name is None else {name: limit}
        named_tuple = hasattr(params, "_replace")
        return params._replace(**change) if named_tuple else dataclasses.replace(params, **change)

    def env_params(params: Any) -> PyTree:
        return limited(params.env, params.max_steps_in_episode)

    class FromJrl(environment.Environment):
        """A jrl Environment as gymnax has them."""

        def __init__(self, env: Environment) -> None:
            self.env = env

        @property
        def name(self) -> str:
            return self.env.name

        @property
        def default_params(self) -> Any:
            limit = limit_of(self.env.params)
            no_limit = np.iinfo(np.int32).max
            return Params(max_steps_in_episode=no_limit if limit is None else limit, env=self.env.params)

        @property
        def num_actions(self) -> int:
            if not isinstance(self.env.action, Discrete):
                raise ValueError(f"{self.name}: actions {self.env.action!r} have no number.")
            return self.env.action.n

        def reset_env(self, key: Key, params: Any) -> tuple[Any, Any]:
            env_state, obs = self.env.reset(key, env_params(params))
            return obs, State(time=jnp.int32(0), env_state=env_state, truncated=jnp.bool_(False))

        @functools.partial(jax.jit, static_argnames=("self",))
        def step(self, key: Key, state: Any, action: Array, params: Any = None) -> tuple[Any, ...]:
            params = self.default_params if params is None else params
            env_state, out = self.env.step(key, state.env_state, action, env_params(params))
            ended = out.terminated | out.truncated
            time = jnp.where(ended, 0, jnp.asarray(state.time, jnp.int32) + 1)
            info = {
                "discount": 1.0 - out.terminated,
                "terminated": out.terminated,
                "truncated": out.truncated,
                "final_observation": out.next_obs,
            }
            state = State(time=time, env_state=env_state, truncated=out.truncated)
            return out.obs, state, out.reward, out.terminated, out.truncated, info

        def step_env(self, key: Key, state: Any, action: Array, params: Any) -> tuple[Any, ...]:
            _, state, reward, terminated, _, info = self.step(key, state, action, params)
            return info["final_observation"], state, reward, terminated, info

        def is_truncated(self, state: Any, params: Any) -> Array:
            return state.truncated

        def action_space(self, params: Any = None) -> Any:
            ours = self.env.action
            if isinstance(ours, Discrete):
                return spaces.Discrete(ours.n)
            assert isinstance(ours, Box)
            # Of one component numbers, as gymnax's own: its conversion to gymnasium's spaces takes float() of them.
            low, high = (x.item() if x.size == 1 else jnp.asarray(x) for x in (ours.low, ours.high))
            return spaces.Box(low, high, ours.shape, jnp.float32)

        def observation_space(self, params: Any = None) -> Any:
            seen = self.env.observation
            if isinstance(seen, FiniteObservation):
                return spaces.Box(0.0, 1.0, seen.shape, seen.dtype) if seen.shape else spaces.Discrete(seen.n)
            low, high = -jnp.inf, jnp.inf
            if seen.dtype == jnp.bool_:
                low, high = 0, 1
            elif jnp.issubdtype(seen.dtype, jnp.integer):  # of which none is infinite
                low, high = int(jnp.iinfo(seen.dtype).min), int(jnp.iinfo(seen.dtype).max)
            return spaces.Box(low, high, seen.shape, seen.dtype)

    return FromJrl


def _refusal(env: Any) -> str:
    kind = type(env).__name__
    names = [c.__name__ for c in type(env).__mro__]
    if any(c.__module__.startswith("gymnax.wrappers") for c in type(env).__mro__):
        instead = next((_INSTEAD[n] for n in names if n in _INSTEAD), "the wrappers of jrl.envs")
        return (
            f"{kind} is a gymnax wrapper: it changes step and reset, of which jrl uses the parts (step_env, "
            f"reset_env). Pass the unwrapped environment to jrl.make; instead of {kind} use {instead}."
        )
    return f"{kind} is not a gymnax Environment, a jrl Environment or an id."


def _action_space(space: Any, name: str) -> ActionSpace:
    from gymnax.environments import spaces

    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if isinstance(space, spaces.Box) and jnp.issubdtype(space.dtype, jnp.floating):
        return Box(tuple(space.shape), space.low, space.high)
    raise ValueError(
        f"{name}: the action space {space} has no counterpart here: a Discrete or a floating-point Box is "
        "expected. Build the environment with jrl.envs.from_functions."
    )
