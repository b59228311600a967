"""For debugging: an algorithm that checks itself, slowly."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import checkify

from jrl.types import Algorithm, Metrics


def checked(algo: Algorithm) -> Algorithm:
    """Return ``algo`` with a ``step`` that raises at the first nan, division by zero or index out of bounds.

    For finding where a nan comes from; several times slower, and not to be called inside ``jit``.

    Args:
        algo: any algorithm.

    Raises:
        checkify.JaxRuntimeError: from ``step``, naming the operation and the line it stands on.
    """
    errors = checkify.float_checks | checkify.index_checks
    step = jax.jit(checkify.checkify(algo.step, errors=errors))

    def checked_step(state: Any, hparams: Any) -> tuple[Any, Metrics]:
        error, result = step(state, hparams)
        error.throw()
        return result

    return algo._replace(step=checked_step)
