"""A trial of what can hang: a program in a process of its own, which is watched (:mod:`jrl.xla` says why)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

IDLE_SECONDS = 5.0

# What hangs where XLA's pool is too small: a batch of QR factorisations inside one program.
BATCHED_QR = """
import jax, jax.numpy as jnp
run = jax.jit(jax.vmap(lambda key: jnp.linalg.qr(jax.random.normal(key, (128, 128)))[0].sum()))
for seed in range(3):
    jax.block_until_ready(run(jax.random.split(jax.random.key(seed), 8)))
"""


def hangs(program: str, environ: Mapping[str, str], limit: float) -> bool:
    """Run Python source in a fresh process; return whether it stopped computing before its end.

    Args:
        program: source text.
        environ: all environment variables of the process.
        limit: seconds after which it is looked at: one that still computes is given as many again. Linux only: the
            process's CPU time is read from ``/proc``.

    Raises:
        RuntimeError: the program failed.
    """
    process = subprocess.Popen([sys.executable, "-c", program], env=dict(environ))
    try:
        while True:
            try:
                if process.wait(limit):
                    raise RuntimeError(f"the program failed with exit code {process.returncode}")
                return False
            except subprocess.TimeoutExpired:
                before = _cpu_seconds(process.pid)
                time.sleep(IDLE_SECONDS)
                if _cpu_seconds(process.pid) - before < 0.1:
                    return process.poll() is None
    finally:
        process.kill()
        process.wait()


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
