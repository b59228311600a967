"""For debugging: an algorithm that checks itself, slowly."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import checkify

from jrl.types import Algorithm, Metrics


def checked(algo: Algorithm, *, indices: bool = False) -> Algorithm:
    """Return ``algo`` with a ``step`` that raises at the first nan or division by zero.

    For finding where a nan comes from; several times slower, and not to be called inside ``jit``.

    Args:
        algo: any algorithm but one of :func:`jrl.sweep.batch`, whose loops checkify cannot look into.
        indices: raise at an index out of bounds, too; at one that is meant to be clipped or dropped as well, as jrl's
            own kernels have them (the replay, values of successors): for parts of your own.

    Raises:
        checkify.JaxRuntimeError: from ``step``, naming the operation and the line it stands on.
    """
    errors = checkify.float_checks | checkify.index_checks if indices else checkify.float_checks
    step = jax.jit(checkify.checkify(algo.step, errors=errors))

    def checked_step(state: Any, hparams: Any) -> tuple[Any, Metrics]:
        error, result = step(state, hparams)
        error.throw()
        return result

    return algo._replace(step=checked_step)
