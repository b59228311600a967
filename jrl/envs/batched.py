"""Environments written for a whole batch at once, and their view as one environment.

What ``vmap`` costs is not arithmetic but keys: one for each environment and step, split again for the reset.
Here one key a step gives the random words of the whole batch, ``uint32 [words, B]``, and reset and transition
are plain functions of those words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrl.envs.build import action_struct, cast, cast_params, strict
from jrl.types import ActionSpace, Array, Environment, Key, PyTree, TimeStep


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """``reset`` or ``step`` of one environment that remembers the batched function it was cut from.

    :func:`jrl.envs.vectorize` takes ``batched`` where it finds it. A wrapper puts functions of its own in
    their place, and is then vectorised like any other environment: none can be bypassed.
    """

    single: Callable[..., Any]
    batched: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Reset or step one environment."""
        return self.single(*args)


def from_batched_functions(
    reset: Callable[[Array, PyTree], PyTree],
    transition: Callable[[Array, PyTree, Array, PyTree], tuple[PyTree, Array, Array, Array]],
    observe: Callable[[PyTree], PyTree],
    params: PyTree,
    action: ActionSpace,
    name: str,
    *,
    reset_words: int = 0,
    step_words: int = 0,
) -> Environment:
    """Make an environment of functions over a batch; the resetting at episode ends is added here.

    Every environment has its own words in every step, so that each episode starts from its own draw. The
    observation is a function of the state: after a reset the new state is observed.

    Args:
        reset: ``(words [reset_words, B], params) -> env_state``, leaves ``[B, ...]``.
        transition: ``(words [step_words, B], env_state, action [B, ...], params) -> (env_state, reward,
            terminated, truncated)``, the last three ``[B]``; it never resets.
        observe: ``env_state -> obs``, leaves ``[B, ...]``.
        params: default parameters, shared by the batch.
        action: the action space.
        name: for messages and records.
        reset_words: random words that one reset needs.
        step_words: random words that one transition needs.
    """

    def reset_batch(key: Key, params: PyTree, num_envs: int) -> tuple[PyTree, PyTree]:
        env_state = reset(random_words(key, reset_words, num_envs), params)
        return env_state, observe(env_state)

    def step_batch(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        words = random_words(key, step_words + reset_words, len(action))
        stepped, reward, terminated, truncated = transition(words[:step_words], env_state, action, params)
        stepped = settle(stepped)  # else the transition would run again for every output
        fresh = reset(words[step_words:], params)
        env_state = jax.tree.map(
            lambda a, b: jnp.where(_expand(terminated | truncated, a), a, b), fresh, stepped
        )
        time_step = TimeStep(observe(env_state), reward, terminated, truncated, observe(stepped))
        return env_state, time_step

    def reset_one(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        return _first(reset_batch(key, params, 1))

    def step_one(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        env_state, action = jax.tree.map(lambda leaf: leaf[None], (env_state, action))
        return _first(step_batch(key, env_state, action, params))

    single = strict(Environment(reset_one, step_one, params, None, action, name))

    # As strict does it for one environment: the same dtypes whatever numbers come in, and errors with names.
    key = jax.eval_shape(lambda: jax.random.key(0))
    spec = jax.eval_shape(single.reset, key, single.params)
    dtypes = jax.tree.map(lambda p: jnp.asarray(p).dtype, params)
    struct = action_struct(action)

    def reset_many(key: Key, params: PyTree, num_envs: int) -> tuple[PyTree, PyTree]:
        return cast(reset_batch(key, cast_params(params, dtypes, name), num_envs), spec)

    def step_many(key: Key, env_state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        num_envs = len(jax.tree.leaves(env_state)[0])
        action = jnp.asarray(action, struct.dtype)
        if action.shape != (num_envs, *struct.shape):
            raise ValueError(
                f"{name}: actions of shape {action.shape} for {num_envs} environments, expected "
                f"{(num_envs, *struct.shape)}."
            )
        env_state, out = step_batch(key, env_state, action, cast_params(params, dtypes, name))
        env_state, obs = cast((env_state, out.obs), spec)
        reward = jnp.asarray(out.reward, jnp.float32)
        return env_state, out._replace(obs=obs, reward=reward, next_obs=cast(out.next_obs, spec[1]))

    return single._replace(reset=OneOf(single.reset, reset_many), step=OneOf(single.step, step_many))


def random_words(key: Key, num_words: int, num_envs: int) -> Array:
    """Draw uniform random bits, uint32 ``[num_words, num_envs]``.

    They are the words of new keys: a counter-based generator gives two words a key, of which
    :func:`jax.random.bits` would return one.
    """
    if num_words == 0:
        return jnp.zeros((0, num_envs), jnp.uint32)
    # In a row, though it is a table: XLA unrolls the random bits of a short axis, which takes long to compile.
    keys = jax.random.split(key, -(-num_words // 2) * num_envs)
    words = jax.random.key_data(keys)[:, :2]  # some implementations have keys of four words
    return words.T.reshape(-1, num_envs)[:num_words]


def uniform(words: Array, low: Any, high: Any) -> Array:
    """Map random words to float32 in ``[low, high)``, evenly, from their upper 23 bits."""
    mantissa = (words >> 9) | jnp.uint32(0x3F800000)  # a float in [1, 2)
    return (lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0) * (high - low) + low


def settle(tree: PyTree) -> PyTree:
    """Return ``tree``, computed once: what follows reads it from memory.

    XLA fuses cheap code into everything that uses it, and into a broadcast for every element: on a CPU the
    transition of a game would run again for each of the hundreds of cells that are drawn from its state. A
    reduction ends a fusion, and this one, over two halves of which one is zero, changes nothing.
    """

    def settle_leaf(leaf: Array) -> Array:
        half = lax.broadcasted_iota(jnp.int32, (2, *leaf.shape), 0)
        zero = jnp.zeros((), leaf.dtype)
        combine = lax.add if jnp.issubdtype(leaf.dtype, jnp.floating) else lax.bitwise_or
        return lax.reduce(jnp.where(half == 0, leaf, zero), zero, combine, (0,))

    return jax.tree.map(settle_leaf, tree)


def _expand(flags: Array, like: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], tree)
