"""Distributions of a random search: each draws ``n`` values from one key."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jrl.types import Array, Key


class Space(Protocol):
    """What a random search draws one hyperparameter from."""

    def sample(self, key: Key, n: int) -> Array:
        """Draw ``n`` independent values, ``[n]``."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform on ``[low, high)``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, "uniform")

    def sample(self, key: Key, n: int) -> Array:
        """Draw ``n`` values, float32 ``[n]``."""
        return jax.random.uniform(key, (n,), minval=self.low, maxval=self.high)


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Uniform in the logarithm, on ``[low, high)``: each factor of ten is as likely as the next."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, "loguniform")
        if self.low <= 0:
            raise ValueError(f"loguniform(low={self.low:g}): must be above 0, its logarithm is taken.")

    def sample(self, key: Key, n: int) -> Array:
        """Draw ``n`` values, float32 ``[n]``."""
        return jnp.exp(jax.random.uniform(key, (n,), minval=math.log(self.low), maxval=math.log(self.high)))


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with ``mean`` and standard deviation ``std``."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std)) or self.std <= 0:
            raise ValueError(
                f"normal(mean={self.mean:g}, std={self.std:g}): both must be finite and std above 0."
            )

    def sample(self, key: Key, n: int) -> Array:
        """Draw ``n`` values, float32 ``[n]``."""
        return self.mean + self.std * jax.random.normal(key, (n,))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the values given, each as likely as the others."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise ValueError("choice(): no values to choose from; give at least one.")
        for value in self.values:
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise ValueError(f"choice({value!r}): a value to choose must be a finite number.")

    def sample(self, key: Key, n: int) -> Array:
        """Draw ``n`` values, ``[n]``."""
        return jnp.asarray(np.asarray(self.values))[jax.random.randint(key, (n,), 0, len(self.values))]


def uniform(low: float, high: float) -> Uniform:
    """Return the uniform distribution on ``[low, high)``.

    Raises:
        ValueError: ``low`` is not below ``high``, or one of them is not finite.
    """
    return Uniform(low, high)


def loguniform(low: float, high: float) -> LogUniform:
    """Return the distribution that is uniform in the logarithm, on ``[low, high)``.

    Raises:
        ValueError: as :func:`uniform`, or ``low`` is not above 0.
    """
    return LogUniform(low, high)


def normal(mean: float, std: float) -> Normal:
    """Return the normal distribution.

    Raises:
        ValueError: ``std`` is not above 0.
    """
    return Normal(mean, std)


def choice(*values: float) -> Choice:
    """Return the uniform distribution over some values.

    Raises:
        ValueError: there are none, or one is no finite number.
    """
    return Choice(values)


_KINDS = {
    "uniform": (Uniform, 2),
    "loguniform": (LogUniform, 2),
    "normal": (Normal, 2),
    "choice": (Choice, None),
}


def parse(text: str) -> Space:
    """Read ``kind:number:number``, such as ``loguniform:1e-5:1e-2`` or ``choice:32:64:128``.

    Raises:
        ValueError: an unknown kind, too few or too many numbers, or what the distribution refuses.
    """
    kind, *rest = text.split(":")
    if kind not in _KINDS:
        raise ValueError(
            f"{text!r} is no distribution: expected KIND:NUMBER:NUMBER with a KIND of {', '.join(_KINDS)}, for "
            "example loguniform:1e-5:1e-2."
        )
    make, count = _KINDS[kind]
    try:
        numbers = [float(part) for part in rest]
    except ValueError as error:
        raise ValueError(
            f"{text!r}: expected numbers after {kind}, separated by colons ({error})."
        ) from error
    if count is not None and len(numbers) != count:
        raise ValueError(
            f"{text!r}: {kind} takes {count} numbers, for example {kind}:0.1:0.9; it got {len(numbers)}."
        )
    return make(tuple(numbers)) if make is Choice else make(*numbers)


def _check_range(space: Uniform | LogUniform, name: str) -> None:
    if not (math.isfinite(space.low) and math.isfinite(space.high)) or space.low >= space.high:
        raise ValueError(
            f"{name}(low={space.low:g}, high={space.high:g}): low must be below high, and both finite."
        )
