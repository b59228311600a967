"""Several processes computing one sweep: who writes, how they agree, and how they see each other's results.

Every process runs the same program on its own members (``jax.distributed``); nothing passes between members. After
each chunk of training the members' metrics are gathered, a few numbers a member, so that every process knows the whole
table and takes the same decisions; the first process writes it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes; what is None is found from SLURM, Open MPI or Kubernetes, as jax finds it.

    Call it before anything else uses jax.

    Raises:
        RuntimeError: the others do not answer, or nothing says who they are.
    """
    jax.distributed.initialize(coordinator, num_processes, process_id)


def alone() -> bool:
    """Return whether this is the only process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Return whether this process writes files and speaks."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Return all leaves ``[slots, ...]`` on the host, those that other processes hold too."""
    if alone():
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether any process has it set."""
    if alone():
        return flags
    seen = multihost_utils.process_allgather(np.array([flags]), tiled=True)
    return tuple(bool(column.any()) for column in np.asarray(seen).T)


def from_first(flag: bool) -> bool:
    """Return the first process's flag."""
    return flag if alone() else bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def smallest(num_bytes: int) -> int:
    """Return the smallest number of bytes that a process gives, to a MiB."""
    if alone():
        return num_bytes
    seen = multihost_utils.process_allgather(np.array([num_bytes >> 20], np.int32), tiled=True)
    return int(np.asarray(seen).min()) << 20


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if not alone():
        multihost_utils.sync_global_devices(name)
