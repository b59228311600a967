"""Running statistics of observations and returns, and what is normalised with them.

Statistics are float32. Counts of samples stop growing exactly at 2²⁴ and then in ever larger steps; by then
one batch changes the statistics by less than their own rounding, so nothing is lost that could be seen.
Of a :class:`~jrl.types.MaskedObservation` only the observation has statistics; the mask stays as it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.types import Array, MaskedObservation, PyTree, Shards

EPSILON = 1e-8
WHOLE = Shards()


class RunningStatistics(NamedTuple):
    """Mean and spread of all samples so far, elementwise.

    Attributes:
        count: float32 ``[]``, samples seen.
        mean: pytree of float32 ``[*shape]``.
        m2: like ``mean``; the sum of squared deviations from the mean.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count
    mean: PyTree
    m2: PyTree


def init_statistics(spec: PyTree) -> RunningStatistics:
    """Return the statistics of nothing, with which :func:`normalize` only clips.

    Args:
        spec: pytree of :class:`jax.ShapeDtypeStruct` (or arrays) of one sample, ``env.observation`` say.
    """

    if isinstance(spec, MaskedObservation):
        spec = spec.obs

    def zeros() -> PyTree:  # made anew for each field: donated buffers must not be shared
        return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), spec)

    return RunningStatistics(jnp.zeros((), jnp.float32), zeros(), zeros())


def update_statistics(
    statistics: RunningStatistics, batch: PyTree, shards: Shards = WHOLE
) -> RunningStatistics:
    """Add a batch of samples.

    With δ the difference of the batch's mean from the running one, n samples so far and m in the batch:
    ``mean + δ m/(n+m)`` and ``M2 + M2_batch + δ² n m/(n+m)`` (Chan, Golub, LeVeque 1979, "Updating formulae
    and a pairwise algorithm for computing sample variances"). The batch's own sums are taken around its
    rounded mean and corrected for the rounding, so that a mean far larger than the spread does no harm.

    Args:
        statistics: of samples ``[*shape]``.
        batch: the same pytree with leaves ``[*lead, *shape]``, any number of leading axes, the same for all.
        shards: of which ``batch`` is one; all of them are added.

    Raises:
        ValueError: a leaf does not end with the shape of the statistics, or leading axes differ.
    """
    if isinstance(batch, MaskedObservation):
        batch = batch.obs
    size = math.prod(_lead(statistics, batch)) * shards.count
    if size == 0:
        return statistics
    total = statistics.count + size

    def moments(mean: Array, x: Array) -> tuple[Array, Array]:
        """Batch mean relative to the running one, and sum of squares around the batch mean."""
        rows = jnp.asarray(x, jnp.float32).reshape(-1, *mean.shape)
        deviation = rows - mean[None]
        rough = shards.mean(deviation.mean(axis=0))
        residual = deviation - rough[None]
        correction, square = shards.mean((residual.mean(axis=0), (residual**2).sum(axis=0)))
        return rough + correction, square * shards.count - size * correction**2

    pairs = jax.tree.map(moments, statistics.mean, batch)
    delta, m2_batch = jax.tree.transpose(
        jax.tree.structure(statistics.mean), jax.tree.structure((0, 0)), pairs
    )
    share = size / total
    mean = jax.tree.map(lambda m, d: m + d * share, statistics.mean, delta)
    m2 = jax.tree.map(
        lambda a, b, d: a + jnp.maximum(b, 0.0) + d**2 * statistics.count * share,
        statistics.m2,
        m2_batch,
        delta,
    )
    return RunningStatistics(total, mean, m2)


def variance(statistics: RunningStatistics) -> PyTree:
    """Return ``M2 / count`` (divided by the count, not by one less), and 1 before the first sample."""
    count = statistics.count
    return jax.tree.map(lambda m2: jnp.where(count > 0, m2 / jnp.maximum(count, 1.0), 1.0), statistics.m2)


def normalize(statistics: RunningStatistics, x: PyTree, clip: float | None = 10.0) -> PyTree:
    """Return ``(x - mean) / sqrt(variance + ε)``, clipped to ``±clip`` (None: not clipped), ε = 1e-8.

    Args:
        statistics: of samples ``[*shape]``; nothing is updated.
        x: pytree with leaves ``[*lead, *shape]`` of any number dtype.
        clip: largest absolute value returned.

    Returns:
        float32, shaped like ``x``. Before the first update: ``x`` itself, clipped.

    Raises:
        ValueError: a leaf does not end with the shape of the statistics.
    """
    if isinstance(x, MaskedObservation):
        return x._replace(obs=normalize(statistics, x.obs, clip))
    lead = len(_lead(statistics, x))

    def one(mean: Array, var: Array, x: Array) -> Array:
        mean, var = (jnp.expand_dims(s, tuple(range(lead))) for s in (mean, var))
        scaled = (jnp.asarray(x, jnp.float32) - mean) * jax.lax.rsqrt(var + EPSILON)
        return scaled if clip is None else jnp.clip(scaled, -clip, clip)

    return jax.tree.map(one, statistics.mean, variance(statistics), x)


def denormalize(statistics: RunningStatistics, x: PyTree) -> PyTree:
    """Return ``x sqrt(variance + ε) + mean``: the inverse of :func:`normalize` where nothing was clipped."""
    if isinstance(x, MaskedObservation):
        return x._replace(obs=denormalize(statistics, x.obs))
    lead = len(_lead(statistics, x))

    def one(mean: Array, var: Array, x: Array) -> Array:
        mean, var = (jnp.expand_dims(s, tuple(range(lead))) for s in (mean, var))
        return jnp.asarray(x, jnp.float32) * jnp.sqrt(var + EPSILON) + mean

    return jax.tree.map(one, statistics.mean, variance(statistics), x)


class RewardScaling(NamedTuple):
    """What :func:`scale_reward` carries.

    Attributes:
        statistics: of the running discounted returns, scalars.
        running_return: float32 ``[B]``, the discounted return of each environment's episode so far.
    """

    statistics: RunningStatistics
    running_return: Array


def init_reward_scaling(num_envs: int) -> RewardScaling:
    """Return the state of :func:`scale_reward` for ``num_envs`` environments at the start of episodes."""
    statistics = init_statistics(jax.ShapeDtypeStruct((), jnp.float32))
    return RewardScaling(statistics, jnp.zeros((num_envs,), jnp.float32))


def scale_reward(
    state: RewardScaling,
    reward: Array,
    terminated: Array,
    truncated: Array,
    *,
    gamma: Array | float,
    clip: float | None = 10.0,
    shards: Shards = WHOLE,
) -> tuple[RewardScaling, Array]:
    """Divide rewards by the standard deviation of the discounted returns seen so far.

    ``G_t = γ G_{t-1} + r_t`` in each environment, with ``G`` set to zero *after* an episode's last reward has
    entered it; the statistics take in the whole block ``G_{0…T-1}`` first, then every reward of the block
    becomes ``clip(r_t / sqrt(Var[G] + ε))``. Rewards are not centred: that would change the task.
    (Engstrom et al. 2020, "Implementation Matters in Deep Policy Gradients", https://arxiv.org/abs/2005.12729)

    Args:
        state: from :func:`init_reward_scaling` or the last call.
        reward: float ``[T, B]``.
        terminated: bool ``[T, B]``.
        truncated: bool ``[T, B]``.
        gamma: discount factor.
        clip: largest absolute value returned; None: not clipped.
        shards: of which these environments are one; the statistics are those of all.

    Returns:
        The new state, and the scaled rewards, float32 ``[T, B]``.

    Raises:
        ValueError: ``reward`` is not ``[T, B]`` with the state's ``B``, or a flag has another shape.
    """
    if reward.ndim != 2 or reward.shape[1:] != state.running_return.shape:
        raise ValueError(
            f"scale_reward: reward has shape {reward.shape}, expected [T, B] with B = "
            f"{state.running_return.shape[0]} as in the state."
        )
    if not reward.shape == terminated.shape == truncated.shape:
        raise ValueError(
            f"scale_reward: reward, terminated and truncated must share a shape, got {reward.shape}, "
            f"{terminated.shape} and {truncated.shape}."
        )
    reward = jnp.asarray(reward, jnp.float32)

    def accumulate(running: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = xs
        running = (running * gamma + reward).astype(jnp.float32)
        return jnp.where(ended, 0.0, running), running

    ended = jnp.logical_or(terminated, truncated)
    running_return, returns = jax.lax.scan(accumulate, state.running_return, (reward, ended))
    statistics = update_statistics(state.statistics, returns, shards)
    scaled = reward * jax.lax.rsqrt(variance(statistics) + EPSILON)
    if clip is not None:
        scaled = jnp.clip(scaled, -clip, clip)
    return RewardScaling(statistics, running_return), scaled


def reward_scale(scaling: RewardScaling) -> Array:
    """Return what :func:`scale_reward` divides rewards by, ``sqrt(Var[running return] + ε)``, float32 ``[]``.

    A value learned from such rewards, times this, is in the unit of the rewards.
    """
    return jnp.sqrt(variance(scaling.statistics) + EPSILON)


def _lead(statistics: RunningStatistics, batch: PyTree) -> tuple[int, ...]:
    """Return the leading axes of a batch, the same for every leaf."""
    leads = set()
    for (path, x), mean in zip(
        jax.tree_util.tree_leaves_with_path(batch), jax.tree.leaves(statistics.mean), strict=True
    ):
        shape, lead = jnp.shape(x), jnp.ndim(x) - mean.ndim
        if lead < 0 or shape[lead:] != mean.shape:
            raise ValueError(
                f"statistics of samples of shape {mean.shape} got a leaf{jax.tree_util.keystr(path)} of "
                f"shape {shape}: it must end with the shape of one sample."
            )
        leads.add(shape[:lead])
    if len(leads) != 1:
        raise ValueError(f"the leaves of a batch must share their leading axes, got {sorted(leads)}.")
    return leads.pop()
