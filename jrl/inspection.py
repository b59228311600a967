"""What a policy has learned, as arrays: attributions, values along an episode, maps of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import ops
from jrl.rollout import reset_memory
from jrl.types import Array, Environment, Key, Memory, Policy, PyTree


def saliency(function: Callable[[PyTree], Array], obs: PyTree) -> PyTree:
    """How much each entry of an observation moves a number: ``|∂f / ∂obs|``.

    Source: Simonyan et al. 2014, "Deep Inside Convolutional Networks", https://arxiv.org/abs/1312.6034.

    Args:
        function: ``obs -> scalar``, such as ``lambda obs: network.apply(params, obs, ())[0].max()``.
        obs: one observation, leaves float.

    Returns:
        Like ``obs``.
    """
    return jax.tree.map(jnp.abs, jax.grad(function)(obs))


def integrated_gradients(
    function: Callable[[PyTree], Array], obs: PyTree, baseline: PyTree, *, num_points: int = 256
) -> PyTree:
    """Attribute the difference of a number from its baseline to the entries of an observation.

    ``(obs − baseline) ⊙ ∫₀¹ ∇f(baseline + t (obs − baseline)) dt``, by the midpoint rule. The entries sum to
    ``f(obs) − f(baseline)`` but for the rule's error: where ``f`` has kinks (relu) that falls as ``1 / num_points``.

    Source: Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", https://arxiv.org/abs/1703.01365.

    Args:
        function: ``obs -> scalar``.
        obs: one observation, leaves float.
        baseline: like ``obs``; what tells nothing, zeros say.
        num_points: where the gradient is taken, static; a network of relu needs thousands for three digits.

    Returns:
        Like ``obs``.

    Raises:
        TypeError: a leaf is not floating: there is nothing between two integers or two bools.
        ValueError: ``num_points`` is below 1.
    """
    for leaf in jax.tree.leaves((obs, baseline)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"integrated_gradients: observations are {jnp.result_type(leaf)}; cast them to float32, and let the "
                "function take them so."
            )
    if num_points < 1:
        raise ValueError(f"integrated_gradients(num_points={num_points}): must be at least 1.")
    difference = jax.tree.map(jnp.subtract, obs, baseline)

    def gradient(total: PyTree, t: Array) -> tuple[PyTree, None]:
        between = jax.tree.map(lambda start, step: start + t * step, baseline, difference)
        return jax.tree.map(jnp.add, total, jax.grad(function)(between)), None

    points = (jnp.arange(num_points, dtype=jnp.float32) + 0.5) / num_points
    total, _ = jax.lax.scan(gradient, jax.tree.map(jnp.zeros_like, difference), points)
    return jax.tree.map(lambda step, gradients: step * gradients / num_points, difference, total)


class Episode(NamedTuple):
    """One environment followed for ``T`` steps.

    Attributes:
        obs: what the policy acted on, leaves ``[T, ...]``.
        action: ``[T, ...]``.
        reward: float32 ``[T]``.
        value: float32 ``[T]``, the policy's value of ``obs``.
        advantage: float32 ``[T]``, GAE of these values and rewards.
        terminated, truncated: bool ``[T]``.
    """

    obs: PyTree
    action: Array
    reward: Array
    value: Array
    advantage: Array
    terminated: Array
    truncated: Array


def follow(
    key: Key,
    env: Environment,
    policy: Policy,
    *,
    num_steps: int,
    gamma: Array | float,
    gae_lambda: Array | float = 0.95,
    params: PyTree = None,
    in_rewards: Callable[[Array], Array] | None = None,
) -> Episode:
    """Let a policy act and record what it expected: values and advantages step by step.

    Args:
        key: consumed.
        env: a single environment.
        policy: ``algo.policy(state)`` of an algorithm whose policy tells ``value`` or ``q`` (then the value is
            ``max_a q``).
        num_steps: ``T``, static; a new episode begins where one ends.
        gamma: discount factor.
        gae_lambda: λ of the advantages.
        params: of the environment; None means ``env.params``.
        in_rewards: from what the policy tells to the unit of the rewards, where it is another one: of R2D2
            ``lambda q: ops.unscale_value(q, hparams.rescale_eps)``, of PPO with normalised rewards
            ``lambda value: value * normalize.reward_scale(state.reward_scaling)``; None leaves it.

    Raises:
        ValueError: the policy's extras have neither ``value`` nor ``q``.
    """
    params = env.params if params is None else params
    reset_key, steps_key = jax.random.split(key)
    env_state, obs = env.reset(reset_key, params)

    def value_of(extras: PyTree) -> Array:
        known = extras if isinstance(extras, dict) else {}
        if "value" in known or "q" in known:
            told = known["value"] if "value" in known else known["q"].max(-1)
            return told if in_rewards is None else in_rewards(told)
        raise ValueError(
            f"follow(policy): its extras are {sorted(known)}, of which none is a value; take the policy of ppo, a2c, "
            "reinforce or dqn, or one whose third result has 'value' or 'q'."
        )

    def step(carry: tuple[PyTree, PyTree, Memory], keys: Key) -> tuple[tuple, tuple]:
        env_state, obs, memory = carry
        action, memory, extras = policy(keys[0], obs, memory)
        env_state, after = env.step(keys[1], env_state, action, params)
        _, _, next_extras = policy(keys[2], after.next_obs, memory)
        row = (obs, action, after, value_of(extras), value_of(next_extras))
        memory = reset_memory(policy, memory, after.terminated | after.truncated)
        return (env_state, after.obs, memory), row

    start = (env_state, obs, policy.init_memory(()))
    keys = jax.random.split(steps_key, (num_steps, 3))
    _, (obs, action, after, value, next_value) = jax.lax.scan(step, start, keys)
    flags = (after.terminated, after.truncated)
    advantage, _ = ops.gae(after.reward, value, next_value, *flags, gamma=gamma, gae_lambda=gae_lambda)
    return Episode(obs, action, after.reward, value, advantage, *flags)


# Up, right, down, left, as in GridWorld-jrl: columns to the right, rows downwards.
ARROWS = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]], np.float32)


class GridMaps(NamedTuple):
    """Maps of a grid.

    Attributes:
        q: float32 ``[rows, columns, A]``.
        value: float32 ``[rows, columns]``, ``max_a q``.
        arrows: float32 ``[rows, columns, 2]``, the best action's step in columns and rows; the mean of the best
            ones where several tie.
    """

    q: Array
    value: Array
    arrows: Array


def grid_maps(q: Array, rows: int, columns: int) -> GridMaps:
    """Lay out action values of GridWorld-jrl for a heat map and a field of arrows.

    Args:
        q: floating ``[rows · columns, 4]``, of each cell: a table, or a network on ``jnp.eye(rows * columns)``.
        rows: height.
        columns: width.

    Raises:
        ValueError: another shape of ``q``.
    """
    if q.shape != (rows * columns, 4):
        raise ValueError(
            f"grid_maps(q): shape {q.shape}, where {rows} × {columns} cells with 4 actions need "
            f"{(rows * columns, 4)}."
        )
    best = (q == q.max(-1, keepdims=True)).astype(jnp.float32)
    arrows = (best[..., None] * ARROWS).sum(-2) / best.sum(-1, keepdims=True)
    return GridMaps(
        q.reshape(rows, columns, 4), q.max(-1).reshape(rows, columns), arrows.reshape(rows, columns, 2)
    )
