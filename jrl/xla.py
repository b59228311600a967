"""XLA settings that must be in the environment before jax is imported. This module imports no jax."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def configure(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is safe on a CPU of few cores; what the user has set stays."""
    environ.setdefault("NPROC", str(max(4, 2 * (os.cpu_count() or 1))))
