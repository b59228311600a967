"""Schedules whose every number may be traced, so that a sweep over end points does not recompile.

A schedule is a function of a count (updates, or environment steps: the caller's choice, ``begin`` and
``duration`` are in the same unit). It is constant before ``begin`` and after ``begin + duration``; from there
on it returns ``end`` exactly. ``duration <= 0`` switches it off: constant at ``start``. float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jrl.types import Array

Number = Array | float


def elapsed_fraction(count: Number, *, duration: Number, begin: Number = 0) -> Array:
    """Elapsed part of a schedule.

    ``clip((count − begin) / duration, 0, 1)``; 0 where ``duration <= 0``.

    Source: notation only.

    Args:
        count: the clock, any shape; integers are subtracted as integers.
        duration: length of the schedule, in units of ``count``.
        begin: where it starts.

    Returns:
        float32 in [0, 1], exactly 1 from ``begin + duration`` on.

    Raises:
        Nothing.
    """
    count, begin = jnp.asarray(count), jnp.asarray(begin)
    # Before the beginning an unsigned difference would be enormous.
    elapsed = jnp.where(count > begin, count - begin, 0).astype(jnp.float32)
    duration = jnp.asarray(duration, jnp.float32)
    running = duration > 0.0
    part = jnp.clip(elapsed / jnp.where(running, duration, 1.0), 0.0, 1.0)
    # Accelerators may divide approximately, which would stop short of 1.
    part = jnp.where(elapsed >= duration, 1.0, part)
    return jnp.where(running, part, 0.0)


def linear(start: Number, end: Number, fraction: Number) -> Array:
    """Linear interpolation.

    ``(1 − fraction) start + fraction end``.

    Source: notation only.

    Args:
        start: value at 0.
        end: value at 1.
        fraction: in [0, 1]; not clipped.

    Returns:
        float32; exact at both ends.

    Raises:
        Nothing.
    """
    start, end, fraction = (jnp.asarray(x, jnp.float32) for x in (start, end, fraction))
    # Not start + fraction · (end − start), which rounds at fraction = 1.
    return (1.0 - fraction) * start + fraction * end


def linear_schedule(
    count: Number, *, start: Number, end: Number, duration: Number, begin: Number = 0
) -> Array:
    """Move from ``start`` to ``end`` at a constant rate.

    ``start + f (end − start)``, ``f = clip((count − begin) / duration, 0, 1)``.

    Source: Mnih et al. 2015 (the exploration rate of DQN), https://doi.org/10.1038/nature14236.

    Args:
        count: the clock, any shape.
        start: value until ``begin``.
        end: value from ``begin + duration`` on.
        duration: length in units of ``count``; at most 0 means constant at ``start``.
        begin: where it starts.

    Returns:
        float32, of the shape of ``count``.

    Raises:
        Nothing.
    """
    return linear(start, end, elapsed_fraction(count, duration=duration, begin=begin))


def polynomial_schedule(
    count: Number, *, start: Number, end: Number, duration: Number, power: Number, begin: Number = 0
) -> Array:
    """Move from ``start`` to ``end``, fast first where ``power`` is above 1.

    ``end + (start − end) (1 − f)^power``, ``f = clip((count − begin) / duration, 0, 1)``.

    Source: Liu et al. 2015 ("poly" policy of "ParseNet"), https://arxiv.org/abs/1506.04579.

    Args:
        count: the clock, any shape.
        start: value until ``begin``.
        end: value from ``begin + duration`` on.
        duration: length in units of ``count``; at most 0 means constant at ``start``.
        power: above 0; 1 is linear.
        begin: where it starts.

    Returns:
        float32, of the shape of ``count``.

    Raises:
        Nothing.
    """
    part = elapsed_fraction(count, duration=duration, begin=begin)
    left = jnp.where(part < 1.0, (1.0 - part) ** jnp.asarray(power, jnp.float32), 0.0)
    return linear(end, start, left)


def cosine_schedule(
    count: Number, *, start: Number, end: Number, duration: Number, begin: Number = 0
) -> Array:
    """Move from ``start`` to ``end`` along half a cosine, slowly at both ends.

    ``end + (start − end) ½ (1 + cos π f)``, ``f = clip((count − begin) / duration, 0, 1)``.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5, https://arxiv.org/abs/1608.03983.

    Args:
        count: the clock, any shape.
        start: value until ``begin``.
        end: value from ``begin + duration`` on.
        duration: length in units of ``count``; at most 0 means constant at ``start``.
        begin: where it starts.

    Returns:
        float32, of the shape of ``count``.

    Raises:
        Nothing.
    """
    part = elapsed_fraction(count, duration=duration, begin=begin)
    left = jnp.where(part < 1.0, 0.5 * (1.0 + jnp.cos(jnp.pi * part)), 0.0)
    return linear(end, start, left)


def exponential_schedule(
    count: Number, *, start: Number, end: Number, duration: Number, begin: Number = 0
) -> Array:
    """Move from ``start`` to ``end`` by a constant factor per count.

    ``start (end / start)^f``, ``f = clip((count − begin) / duration, 0, 1)``.

    Source: geometric interpolation.

    Args:
        count: the clock, any shape.
        start: value until ``begin``, above 0.
        end: value from ``begin + duration`` on, above 0.
        duration: length in units of ``count``; at most 0 means constant at ``start``.
        begin: where it starts.

    Returns:
        float32, of the shape of ``count``.

    Raises:
        Nothing; an end point at or below 0 gives nan or a constant in between.
    """
    start, end = jnp.asarray(start, jnp.float32), jnp.asarray(end, jnp.float32)
    part = elapsed_fraction(count, duration=duration, begin=begin)
    return jnp.where(part < 1.0, start * (end / start) ** part, end)


def warmup_cosine_schedule(
    count: Number, *, start: Number, peak: Number, end: Number, warmup: Number, duration: Number
) -> Array:
    """Rise linearly to ``peak``, then fall along half a cosine.

    ``linear(start, peak, count / warmup)`` while ``count < warmup``, then the cosine of
    :func:`cosine_schedule` from ``peak`` to ``end`` over the remaining ``duration − warmup``.

    Source: Goyal et al. 2017 (warm-up), https://arxiv.org/abs/1706.02677; Loshchilov and Hutter 2017
    (cosine), https://arxiv.org/abs/1608.03983.

    Args:
        count: the clock, any shape.
        start: value at count 0.
        peak: value at ``warmup``.
        end: value from ``duration`` on.
        warmup: length of the rise; at most 0 means none.
        duration: length of the whole, the rise included; at most ``warmup`` means constant at ``peak`` after
            the rise.

    Returns:
        float32, of the shape of ``count``.

    Raises:
        Nothing.
    """
    rise = linear_schedule(count, start=start, end=peak, duration=warmup)
    warmup = jnp.maximum(warmup, 0)
    fall = cosine_schedule(count, start=peak, end=end, duration=duration - warmup, begin=warmup)
    return jnp.where(jnp.asarray(count) < warmup, rise, fall)


def piecewise_schedule(count: Number, *, boundaries: Sequence[Number] | Array, values: Array) -> Array:
    """Step from one constant to the next.

    ``values[i]`` where ``i`` is the number of boundaries at or below ``count``.

    Source: notation only.

    Args:
        count: the clock, a scalar.
        boundaries: ``[K]``, ascending, in units of ``count``.
        values: ``[K + 1]``.

    Returns:
        float32 ``[]``.

    Raises:
        ValueError: there is not one value more than there are boundaries.
    """
    boundaries, values = jnp.asarray(boundaries), jnp.asarray(values, jnp.float32)
    if values.shape[0] != boundaries.shape[0] + 1:
        raise ValueError(
            f"piecewise_schedule: {values.shape[0]} values for {boundaries.shape[0]} boundaries; "
            "give one value more than boundaries."
        )
    return values[jnp.sum(boundaries <= count)]
