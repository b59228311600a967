"""Wrappers of observations. Apply them to the single environment, then ``vectorize``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.envs.build import check_whole
from jrl.types import (
    Array,
    Discrete,
    Environment,
    FiniteObservation,
    Key,
    MaskedObservation,
    PyTree,
    TimeStep,
)


def transform_observation(env: Environment, fn: Callable[[PyTree], PyTree]) -> Environment:
    """Apply ``fn`` to every observation, ``obs`` and ``next_obs`` alike.

    Of a :class:`~jrl.types.MaskedObservation` only the observation is changed.

    Raises:
        ValueError: when traced, for an observation that is not of the shape ``env.observation`` states (the
            environment was vectorised first).
    """

    def apply(obs: PyTree) -> PyTree:
        obs, with_mask = split_mask(obs)
        return with_mask(fn(obs))

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        env_state, obs = env.reset(key, params)
        check_single(env, obs)
        return env_state, apply(obs)

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        env_state, out = env.step(key, env_state, action, params)
        return env_state, out._replace(obs=apply(out.obs), next_obs=apply(out.next_obs))

    return env._replace(reset=reset, step=step, observation=output_struct(apply, env.observation))


def flatten_observation(env: Environment) -> Environment:
    """Make one vector ``[D]`` of an observation of any shape or pytree: bool where all of it is, else float32.

    The leaves follow each other in the order of :func:`jax.tree.leaves`, each in row-major order. What is bool stays
    so because it is recorded and gathered at a quarter of the bytes; networks take it as 0.0 and 1.0.
    """
    inner, _ = split_mask(env.observation)
    is_bool = all(leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(inner))
    dtype = jnp.bool_ if is_bool else jnp.float32

    def flatten(obs: PyTree) -> Array:
        return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(obs)])

    return transform_observation(env, flatten)


def one_hot_observation(env: Environment, n: int) -> Environment:
    """Encode an integer scalar observation ``0 … n-1`` as a float32 vector ``[n]``.

    Raises:
        ValueError: the observation is not an integer scalar.
    """
    inner, _ = split_mask(env.observation)
    scalar = isinstance(inner, jax.ShapeDtypeStruct) and inner.shape == ()
    if not scalar or not jnp.issubdtype(inner.dtype, jnp.integer):
        raise ValueError(
            f"one_hot_observation({env.name}): needs an integer scalar observation, got {inner}."
        )
    encoded = transform_observation(env, lambda obs: jax.nn.one_hot(obs, n, dtype=jnp.float32))
    if isinstance(env.observation, MaskedObservation):
        return encoded
    return encoded._replace(observation=FiniteObservation(n, one_hot=True))


class FrameStackState(NamedTuple):
    """State of :func:`frame_stack`: the inner state and the last ``n`` frames, leaves ``[n, ...]``."""

    env_state: PyTree
    frames: PyTree


def frame_stack(env: Environment, n: int) -> Environment:
    """Show the last ``n`` observations at once, oldest first.

    Images ``[H, W, C]`` are stacked along the channels, ``[H, W, C * n]``; matrices ``[H, W]`` get the frames
    as channels, ``[H, W, n]``; vectors ``[D]`` become ``[n * D]`` and scalars ``[n]``. An episode starts with
    its first observation repeated ``n`` times. In the step that ends an episode ``next_obs`` is the stack
    that ends with the true successor, ``obs`` the first stack of the next episode.

    Raises:
        ValueError: ``n`` is no whole number or below 1.
    """
    check_whole("frame_stack", n=n)
    if n < 1:
        raise ValueError(f"frame_stack(n={n}): needs at least one frame.")

    def repeat(obs: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), obs)

    def push(frames: PyTree, obs: PyTree) -> PyTree:
        return jax.tree.map(lambda f, x: jnp.concatenate([f[1:], x[None]]), frames, obs)

    def merge(frames: PyTree) -> PyTree:
        return jax.tree.map(_merge_frames, frames)

    def reset(key: Key, params: PyTree) -> tuple[FrameStackState, PyTree]:
        env_state, obs = env.reset(key, params)
        check_single(env, obs)
        obs, with_mask = split_mask(obs)
        frames = repeat(obs)
        return FrameStackState(env_state, frames), with_mask(merge(frames))

    def step(key: Key, env_state: FrameStackState, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        inner_state, out = env.step(key, env_state.env_state, action, params)
        obs, with_mask = split_mask(out.obs)
        next_obs, with_next_mask = split_mask(out.next_obs)
        pushed = push(env_state.frames, next_obs)
        ended = out.terminated | out.truncated
        frames = jax.tree.map(lambda new, old: jnp.where(ended, new, old), repeat(obs), pushed)
        out = out._replace(obs=with_mask(merge(frames)), next_obs=with_next_mask(merge(pushed)))
        return FrameStackState(inner_state, frames), out

    def stacked(obs: PyTree) -> PyTree:
        obs, with_mask = split_mask(obs)
        return with_mask(merge(repeat(obs)))

    return env._replace(reset=reset, step=step, observation=output_struct(stacked, env.observation))


def action_mask(env: Environment, mask_fn: Callable[[PyTree, PyTree], Array]) -> Environment:
    """Say with each observation which actions are allowed in it.

    Observations become :class:`~jrl.types.MaskedObservation`. The mask is a function of the observation and
    the parameters only, so that the masks of ``obs`` and of the true successor ``next_obs`` are both exact,
    also in the step that ends an episode, when the environment's state is already the next episode's.

    Args:
        env: an environment with a :class:`~jrl.types.Discrete` action space of ``A`` actions.
        mask_fn: ``(obs, params) -> bool [A]``, True = allowed; at least one must be.

    Raises:
        ValueError: the action space is not Discrete, the observation already has a mask, or ``mask_fn``
            returns another shape or dtype.
    """
    if not isinstance(env.action, Discrete):
        raise ValueError(f"action_mask({env.name}): needs a Discrete action space, got {env.action}.")
    if isinstance(env.observation, MaskedObservation):
        raise ValueError(f"action_mask({env.name}): the observation already has a mask; combine the masks.")

    def masked(obs: PyTree, params: PyTree) -> MaskedObservation:
        return MaskedObservation(obs, mask_fn(obs, params))

    observation = output_struct(masked, env.observation, jax.tree.map(jnp.asarray, env.params))
    mask = observation.action_mask
    if mask.shape != (env.action.n,) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"action_mask({env.name}): mask_fn returns {mask.dtype}{list(mask.shape)}, expected "
            f"bool[{env.action.n}], one entry for each action."
        )

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        env_state, obs = env.reset(key, params)
        check_single(env, obs)
        return env_state, masked(obs, params)

    def step(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        env_state, out = env.step(key, env_state, action, params)
        return env_state, out._replace(obs=masked(out.obs, params), next_obs=masked(out.next_obs, params))

    return env._replace(reset=reset, step=step, observation=observation)


def _merge_frames(frames: Array) -> Array:
    """``[n, ...]`` to what :func:`frame_stack` shows."""
    if frames.ndim <= 2:  # scalars and vectors
        return frames.reshape(-1)
    moved = jnp.moveaxis(frames, 0, -1 if frames.ndim == 3 else -2)
    return moved if frames.ndim == 3 else moved.reshape(*moved.shape[:-2], -1)


def split_mask(obs: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Return an observation without its mask, and the function that puts the mask back (if there is one)."""
    if isinstance(obs, MaskedObservation):
        return obs.obs, lambda changed: obs._replace(obs=changed)
    return obs, lambda changed: changed


def output_struct(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Return shapes and dtypes of what a function returns, without running it."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(fn, *args))


def check_single(env: Environment, obs: PyTree) -> None:
    """Raise ValueError unless ``obs``, of ``env.reset``, is of one environment; runs while tracing."""
    for leaf, spec in zip(jax.tree.leaves(obs), jax.tree.leaves(env.observation), strict=True):
        if leaf.shape != spec.shape:
            raise ValueError(
                f"{env.name}: an observation of shape {leaf.shape} where {spec.shape} is expected. Apply "
                "this wrapper to the single environment, then jrl.envs.vectorize."
            )
