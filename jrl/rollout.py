"""One rollout for every algorithm: a policy with a memory acts in vectorised environments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.replay import packing
from jrl.types import Array, Environment, Key, Memory, Metrics, Network, Policy, PyTree, Transition

PACK_ON = "gpu"  # the backend on which an unroll stores its small outputs as one
UNROLL = 8  # steps there
PACK_UP_TO = 16  # numbers of an environment and leaf


class RolloutState(NamedTuple):
    """What a rollout carries from one unroll to the next, over ``B`` environments.

    ``memory`` is the policy's, ``episode_return`` and ``episode_length`` are those of the episodes under way
    (float32 and int32 ``[B]``).
    """

    env_state: PyTree
    obs: PyTree
    memory: Memory
    episode_return: Array
    episode_length: Array


def start(key: Key, env: Environment, env_params: PyTree, num_envs: int, memory: Memory = ()) -> RolloutState:
    """Reset ``env`` (vectorised over ``num_envs``) and return the state of a rollout not yet begun.

    Args:
        key: consumed by the reset.
        env: an environment from :func:`jrl.envs.vectorize`.
        env_params: its parameters.
        num_envs: ``B``.
        memory: the policy's memory at the start of an episode, leaves ``[B, ...]``.
    """
    env_state, obs = env.reset(key, env_params)
    obs = jax.tree.map(jnp.copy, obs)  # may be part of env_state: one buffer could not be donated twice
    return RolloutState(
        env_state, obs, memory, jnp.zeros((num_envs,), jnp.float32), jnp.zeros((num_envs,), jnp.int32)
    )


def unroll(
    key: Key, env: Environment, env_params: PyTree, policy: Policy, state: RolloutState, length: int
) -> tuple[RolloutState, Transition, Metrics]:
    """Act for ``length`` steps in every environment.

    The memory goes back to its initial value where an episode ended, so that the policy starts the next one
    as it started the first.

    Args:
        key: consumed; all keys of the unroll are drawn from it at once, which is cheaper than a split a step. Or
            these keys, ``[T, 2]``, where a caller has drawn them with others (:func:`jrl.ops.split_keys`).
        env: vectorised over ``B`` environments.
        env_params: its parameters.
        policy: what acts; its ``extras`` are recorded.
        state: where the rollout stands.
        length: ``T``, static.

    Returns:
        The new state, the transitions ``[T, B, ...]``, and the :func:`episode_metrics` of these steps.
    """
    step_keys = key if key.shape else jax.random.split(key, (length, 2))

    def body(state: RolloutState, keys: Key) -> tuple[RolloutState, tuple[Transition, Array, Array]]:
        action, memory, extras = policy(keys[0], state.obs, state.memory)
        env_state, time_step = env.step(keys[1], state.env_state, action, env_params)
        ended = time_step.terminated | time_step.truncated
        episode_return = state.episode_return + time_step.reward
        episode_length = state.episode_length + 1
        transition = Transition(
            state.obs,
            action,
            time_step.reward,
            time_step.terminated,
            time_step.truncated,
            time_step.next_obs,
            extras,
        )
        state = RolloutState(
            env_state,
            time_step.obs,
            reset_memory(policy, memory, ended),
            jnp.where(ended, 0.0, episode_return),
            jnp.where(ended, 0, episode_length),
        )
        return state, (transition, episode_return, episode_length)

    if jax.default_backend() == PACK_ON:
        state, outputs = _scan_packed(body, state, step_keys)
    else:
        state, outputs = jax.lax.scan(body, state, step_keys)
    transitions, episode_return, episode_length = outputs
    ended = transitions.terminated | transitions.truncated
    return state, transitions, episode_metrics(ended, episode_return, episode_length)


def _scan_packed(body: Callable[..., Any], state: RolloutState, keys: Key) -> tuple[RolloutState, Any]:
    """Return what ``lax.scan(body, state, keys)`` does; it stores the small leaves of each step as one.

    A scan stores each leaf of its output by a kernel of its own, which on a GPU takes as long to launch as the step of
    a small environment takes.
    """
    _, spec = jax.eval_shape(body, state, jax.tree.map(lambda leaf: leaf[0], keys))
    leaves: list[Any] = jax.tree.leaves(spec)
    small = [_is_small(leaf) for leaf in leaves]
    layout = packing.layout(
        [
            jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            for leaf, packs in zip(leaves, small, strict=True)
            if packs
        ]
    )

    def packed(state: RolloutState, key: Key) -> tuple[RolloutState, tuple[Array, list[Array]]]:
        state, outputs = body(state, key)
        these = jax.tree.leaves(outputs)
        row = layout.pack([leaf for leaf, packs in zip(these, small, strict=True) if packs])
        return state, (row, [leaf for leaf, packs in zip(these, small, strict=True) if not packs])

    # Several steps an iteration: what a loop carries is copied once in each.
    state, (rows, others) = jax.lax.scan(packed, state, keys, unroll=math.gcd(len(keys), UNROLL))
    unpacked = iter(
        leaf.reshape(*rows.shape[:2], *leaf.shape[1:])
        for leaf in layout.unpack(rows.reshape(-1, rows.shape[-1]))
    )
    rest = iter(others)
    return state, jax.tree.unflatten(
        jax.tree.structure(spec), [next(unpacked) if packs else next(rest) for packs in small]
    )


def _is_small(leaf: jax.ShapeDtypeStruct) -> bool:
    """Return whether an output ``[B, ...]`` of a step is packed: numbers, of which each environment has few."""
    number = leaf.dtype == jnp.bool_ or jnp.issubdtype(leaf.dtype, jnp.number)
    return bool(number) and leaf.dtype.itemsize in (1, 4) and math.prod(leaf.shape[1:]) <= PACK_UP_TO


def episode_metrics(ended: Array, episode_return: Array, episode_length: Array) -> Metrics:
    """Reduce the episodes that ended to scalars, all of them finite.

    Args:
        ended: bool ``[T, B]``.
        episode_return: float32 ``[T, B]``, sum of rewards of the episode so far, this step included.
        episode_length: int32 ``[T, B]``, likewise.

    Returns:
        ``num_episodes``; ``episode_return``, ``episode_length`` (means over the episodes that ended),
        ``episode_return_min`` and ``episode_return_max``, all 0 where none ended: weigh them by
        ``num_episodes``, as :func:`jrl.training.summarize` does.
    """
    count = ended.sum().astype(jnp.float32)
    any_ended = count > 0

    def mean(x: Array) -> Array:
        return jnp.where(ended, x, 0).astype(jnp.float32).sum() / jnp.maximum(count, 1.0)

    return {
        "num_episodes": count,
        "episode_return": mean(episode_return),
        "episode_length": mean(episode_length),
        "episode_return_min": jnp.where(any_ended, jnp.where(ended, episode_return, jnp.inf).min(), 0.0),
        "episode_return_max": jnp.where(any_ended, jnp.where(ended, episode_return, -jnp.inf).max(), 0.0),
    }


def successor_values(
    evaluate: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    value: Array,
    transitions: Transition,
    successors: PyTree,
) -> Array:
    """Return the values of what the steps of an unroll led to, most of which are known already.

    Where an episode goes on, its step led to what the policy saw next, whose value is in the next row of ``value``.
    Where it terminated the value is 0. Only the last row, and what a truncated step led to, is evaluated: ``B``
    states at a time and as often as there are more, in place of a second pass of the network over the batch. The
    derivative is that of the second pass.

    Args:
        evaluate: maps ``params`` and ``B`` of the ``successors`` to their values ``[B]``.
        params: all that its values are to be differentiated by, beside the successors.
        value: of ``transitions.obs``, ``[T, B]``.
        transitions: leaves ``[T, B, ...]``.
        successors: what ``evaluate`` needs of the true successors: ``transitions.next_obs``, and where the policy
            has a memory that too; leaves ``[T, B, ...]``.

    Returns:
        float32 ``[T, B]``: ``V(next_obs)``, 0 where terminated.
    """
    length, num_envs = value.shape
    size = length * num_envs
    unknown = (transitions.truncated.at[-1].set(True) & ~transitions.terminated).reshape(-1)
    known = jnp.where(transitions.terminated[:-1], 0.0, value[1:])
    known = jnp.concatenate([known, jnp.zeros_like(value[:1])]).reshape(-1)
    successors = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), successors)
    ranks = jnp.cumsum(unknown)
    # The unknown ones in a row; as jnp.nonzero does, with one cumulative sum where that needs two.
    # One place more, for all that are known.
    index = jnp.full(size + 1, size).at[jnp.where(unknown, ranks - 1, size)].set(jnp.arange(size))[:size]
    values = _filled(evaluate, num_envs, known, params, successors, (unknown, index, ranks[-1]))
    return values.reshape(length, num_envs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _filled(
    evaluate: Callable[[PyTree, PyTree], Array],
    block: int,
    known: Array,
    params: PyTree,
    successors: PyTree,
    which: tuple[Array, Array, Array],
) -> Array:
    """Return ``known`` with the values of the ``which`` that are not, a block after the other."""
    _, index, count = which

    def some(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        done, values = carry
        these = jax.lax.dynamic_slice_in_dim(index, done, block)
        found = evaluate(params, jax.tree.map(lambda leaf: leaf.at[these].get(mode="clip"), successors))
        return done + block, values.at[these].set(found, mode="drop")

    # Under vmap the rounds are those of the member with the most; what the others carry is one number a step.
    return jax.lax.while_loop(lambda carry: carry[0] < count, some, (jnp.int32(0), known))[1]


@_filled.defjvp
def _filled_jvp(
    evaluate: Callable[[PyTree, PyTree], Array], block: int, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    """By all of them: no gradient goes back through a loop whose length is known only when it runs."""

    def all_of(known: Array, params: PyTree, successors: PyTree, which: tuple[Array, Array, Array]) -> Array:
        blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, block, *leaf.shape[1:]), successors)
        values = jax.lax.map(functools.partial(evaluate, params), blocks)
        return jnp.where(which[0], values.reshape(-1), known)

    return _filled(evaluate, block, *primals), jax.jvp(all_of, primals, tangents)[1]


def keep_memory(batch_shape: tuple[int, ...]) -> None:
    """As a policy's ``init_memory``: leave its memory as it is at episode ends.

    For one that reads only what belongs to the episode, such as a key/value cache that is looked at up to the
    position of the token: resetting it would copy it at every step.
    """


def reset_memory(policy: Policy | Network, memory: Memory, ended: Array) -> Memory:
    """Return ``memory`` (leaves ``[B, ...]``) with its initial value where ``ended`` (bool ``[B]``)."""
    if not jax.tree.leaves(memory) or policy.init_memory is keep_memory:
        return memory

    def select(initial: Array, current: Array) -> Array:
        return jnp.where(ended.reshape(ended.shape + (1,) * (current.ndim - ended.ndim)), initial, current)

    return jax.tree.map(select, policy.init_memory(ended.shape), memory)
