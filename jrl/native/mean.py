"""The mean over devices of one CPU in a C++ kernel: XLA's own puts threads to sleep until the others come.

What :func:`jrl.parallel.data_parallel` exchanges with ``kernels="native"``; compiled at first use
(:mod:`jrl.native.build`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jrl.native import build

MEAN = "jrl_mean"
"""Its kernel in :mod:`jrl.native.build`."""


def mean(arrays: Sequence[jax.Array], axis_name: str, site: int) -> list[jax.Array]:
    """Return ``1/n Σ_i x_i`` over the ``n`` devices of an axis of ``jax.shard_map``, the same bits on each of them.

    The sum goes from the first device to the last. Each device takes its part of the work; one that has waited for
    half a millisecond gives its thread back.

    Args:
        arrays: float32, of any shapes.
        axis_name: of the mesh, all of whose devices are CPUs of this process.
        site: a number that no other call in one program has.

    Raises:
        RuntimeError: as :func:`jrl.native.build.load`.
    """
    devices = jax.lax.axis_size(axis_name)
    rank = jax.lax.axis_index(axis_name).astype(jnp.int32)
    aliases = {1 + i: i for i in range(len(arrays))}
    attributes = {"site": np.int64(site), "devices": np.int64(devices)}
    shapes = [array.shape for array in arrays]
    return build.call(MEAN, shapes, rank, *arrays, aliases=aliases, attributes=attributes)
