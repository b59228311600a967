"""From plain functions to an :class:`~jrl.types.Environment` that a ``lax.scan`` can carry."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.types import ActionSpace, Array, Box, Discrete, Environment, Key, MultiDiscrete, PyTree, TimeStep


def from_functions(
    reset: Callable[[Key, PyTree], tuple[PyTree, PyTree]],
    transition: Callable[[Key, PyTree, Array, PyTree], tuple[PyTree, PyTree, Any, Any, Any]],
    params: PyTree,
    action: ActionSpace,
    name: str = "environment",
) -> Environment:
    """Make an environment of its reset and its transition; the resetting at episode ends is added here.

    Each step splits its key in two, one for the transition and one for the reset, so that every episode of
    every environment starts from its own draw. What is returned is :func:`strict`: rewards may be integers,
    flags Python bools, times Python ints.

    ::

        def reset(key, params):
            position = jax.random.uniform(key, minval=-1.0, maxval=1.0)
            return (position, 0), position[None]              # env_state, obs

        def transition(key, state, action, params):
            position, time = state
            position, time = position + params["speed"] * (2.0 * action - 1.0), time + 1
            reward = -jnp.abs(position)
            return (position, time), position[None], reward, jnp.abs(position) > 2.0, time >= params["limit"]

        env = from_functions(reset, transition, {"speed": 0.1, "limit": 20}, Discrete(2), "Walk")

    Args:
        reset: ``(key, params) -> (env_state, obs)``.
        transition: ``(key, env_state, action, params) -> (env_state, obs, reward, terminated, truncated)``,
            where ``obs`` is the true successor; it never resets.
        params: default parameters, a pytree of numbers and arrays; may be ``()``.
        action: the action space.
        name: for messages and records.

    Raises:
        ValueError: what ``reset`` and ``transition`` return differs in structure or shapes, they return no two and no
            five values, or what :func:`strict` refuses.
    """

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        step_key, reset_key = jax.random.split(key)
        happened = transition(step_key, env_state, action, params)
        _check_tuple(happened, f"{name}: transition", "(env_state, obs, reward, terminated, truncated)")
        stepped, next_obs, reward, *flags = happened
        terminated, truncated = (
            _scalar(flag, jnp.bool_, field, name)
            for flag, field in zip(flags, ("terminated", "truncated"), strict=True)
        )
        ended = terminated | truncated
        fresh, first_obs = reset(reset_key, params)
        env_state, obs = select(ended, (fresh, first_obs), (stepped, next_obs), name)
        return env_state, TimeStep(obs, reward, terminated, truncated, next_obs)

    return strict(Environment(reset, step, params, None, action, name))


def strict(env: Environment) -> Environment:
    """Give an environment outputs that a ``lax.scan`` can carry, whatever Python numbers it was written with.

    Environment states and observations leave ``reset`` and ``step`` with the same shapes and dtypes and with
    strong types (the dtypes are the smallest that hold both, found with :func:`jax.eval_shape`); rewards are
    float32 ``[]`` and flags bool ``[]``; parameters are cast to the dtypes of the default ones, so that a
    sweep may pass any numbers (a default that stands for a real number is written 1.0: of one written 1 no fraction
    is a value, and of an array that is traced nobody sees what is cut off); ``env.observation`` is set to what the
    observations really are.

    Raises:
        ValueError: ``reset`` and ``step`` differ in the structure or the shapes of what they return; the
            reward or a flag is not one number, or a flag a fraction; or, when stepped, the action has another shape
            than the space; or a parameter is a number that the default's dtype does not hold (traced: a Python float
            for an integer).
    """
    dtypes = jax.tree.map(lambda p: jnp.asarray(p).dtype, env.params)
    spec = _fixed_point(env)
    action_spec = action_struct(env.action)

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        return cast(env.reset(key, cast_params(params, dtypes, env.name)), spec)

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        action = jnp.asarray(action, action_spec.dtype)
        if action.shape != action_spec.shape:
            raise ValueError(
                f"{env.name}: an action of shape {action.shape} where {env.action} has shape "
                f"{action_spec.shape}. For a batch of environments use jrl.envs.vectorize(env, num_envs)."
            )
        env_state, out = env.step(key, env_state, action, cast_params(params, dtypes, env.name))
        env_state, obs = cast((env_state, out.obs), spec)
        return env_state, TimeStep(
            obs=obs,
            reward=_scalar(out.reward, jnp.float32, "reward", env.name),
            terminated=_scalar(out.terminated, jnp.bool_, "terminated", env.name),
            truncated=_scalar(out.truncated, jnp.bool_, "truncated", env.name),
            next_obs=cast(out.next_obs, spec[1]),
        )

    return env._replace(reset=reset, step=step, observation=spec[1])


def check_whole(name: str, **values: Any) -> None:
    """Raise ValueError for a size that is no whole number: 4.0 sizes no array either."""
    for field, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise ValueError(
                f"{name}: {field}={value!r}: must be a whole number, written without a point."
            ) from None


def action_struct(action: ActionSpace) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of one action of a space."""
    if isinstance(action, Discrete):
        return jax.ShapeDtypeStruct((), jnp.int32)
    if isinstance(action, MultiDiscrete):
        return jax.ShapeDtypeStruct((len(action.ns),), jnp.int32)
    if isinstance(action, Box):
        return jax.ShapeDtypeStruct(action.shape, jnp.float32)
    raise TypeError(f"action={action!r}: expected jrl.types.Discrete, MultiDiscrete or Box.")


def select(condition: Array, on_true: PyTree, on_false: PyTree, name: str = "environment") -> PyTree:
    """Choose one of two pytrees of equal structure and shapes by a scalar condition, promoting dtypes."""
    _check_alike(on_true, on_false, f"{name}: what reset returns against what the step returns")
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def _check_tuple(returned: Any, what: str, expected: str) -> None:
    if not isinstance(returned, tuple) or len(returned) != expected.count(",") + 1:
        kind = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        raise ValueError(f"{what} returns {kind}: expected {expected}.")


def _fixed_point(env: Environment) -> PyTree:
    """Return the specification of ``(env_state, obs)`` that both reset and step map into."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    action = action_struct(env.action)
    params = jax.tree.map(jnp.asarray, env.params)

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> PyTree:
        env_state, out = env.step(key, env_state, action, params)
        return (env_state, out.obs), (env_state, out.next_obs)

    start = jax.eval_shape(env.reset, key, params)
    _check_tuple(start, f"{env.name}: reset", "(env_state, obs)")
    spec = _struct(start)
    while True:  # ends: dtypes only ever grow, and there are finitely many
        joined = spec
        for stepped in jax.eval_shape(step, key, spec[0], action, params):
            _check_alike(joined, stepped, f"{env.name}: what reset returns against what step returns")
            joined = jax.tree.map(_join, joined, stepped)
        if joined == spec:
            return spec
        spec = joined


def _struct(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _join(a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype = a.dtype if a.dtype == b.dtype else jnp.promote_types(a.dtype, b.dtype)
    return jax.ShapeDtypeStruct(a.shape, dtype)


def _check_alike(a: PyTree, b: PyTree, what: str) -> None:
    structures = [str(jax.tree.structure(tree)) for tree in (a, b)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{what} (env_state, obs): the structures differ, {structures[0]} against {structures[1]}. "
            "Return the same pytree from both."
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"{what} (env_state, obs): leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(x)} "
                f"against {jnp.shape(y)}. Shapes must not change within an episode."
            )


def cast(tree: PyTree, spec: PyTree) -> PyTree:
    """Give leaves the dtypes of a specification, as strong types."""
    # asarray with an explicit dtype also strips the weak type of what was a Python number
    return jax.tree.map(
        lambda x, s: x if _is_key(s.dtype) else jnp.asarray(x, s.dtype),
        tree,
        spec,
    )


def cast_params(params: PyTree, dtypes: PyTree, name: str) -> PyTree:
    """Give parameters the dtypes of the default ones, whose structure they must have."""
    given, expected = str(jax.tree.structure(params)), str(jax.tree.structure(dtypes))
    if given != expected:
        raise ValueError(
            f"{name}: params have the structure {given}, the environment's own are {expected}. Start from "
            "env.params and replace values in it."
        )
    jax.tree_util.tree_map_with_path(lambda path, p, d: _check_held(path, p, d, name), params, dtypes)
    return jax.tree.map(lambda p, d: p if _is_key(d) else jnp.asarray(p, d), params, dtypes)


def _check_held(path: Any, param: Any, dtype: Any, name: str) -> None:
    if _is_key(dtype) or jnp.issubdtype(dtype, jnp.inexact):
        return
    if isinstance(param, jax.core.Tracer):
        # A weak type is that of a Python number, which someone wrote there.
        if param.weak_type and jnp.issubdtype(param.dtype, jnp.inexact):
            raise ValueError(
                f"{name}: params{jax.tree_util.keystr(path)} is a Python float, and {dtype} by its default: what is "
                "behind the point would be cut off. Give 2 for 2.0, or write the default as a float, 1.0 for 1."
            )
        return
    given = np.asarray(param)
    with np.errstate(invalid="ignore"):
        wrong = given.astype(dtype) != given
    if wrong.any():
        raise ValueError(
            f"{name}: params{jax.tree_util.keystr(path)} is {given[wrong].flat[0]}, which is no {dtype}, as its "
            "default is: give another number, or write the default as a float, 1.0 for 1."
        )


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _scalar(x: Any, dtype: Any, field: str, name: str) -> Array:
    if x is None:
        raise ValueError(f"{name}: {field} is None, expected a number for each environment.")
    x = jnp.asarray(x)
    if x.size != 1:
        raise ValueError(f"{name}: {field} has shape {x.shape}, expected a scalar for each environment.")
    if dtype == jnp.bool_ and jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"{name}: {field} is {x.dtype}, in which 0.1 would be True: expected a bool; compare first."
        )
    return jnp.asarray(x, dtype).reshape(())
