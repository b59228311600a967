"""What every benchmark's record has: timings with their spread, and where and when it was taken.

Imports no jax: a benchmark sets what jax reads from the environment first.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jrl import __version__

Seconds = dict[str, dict[str, float]]  # of one process: {"lower_seconds": ..., ...}, by "cold" and "cached"


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return ``function()`` once it is ready, with its wall-clock and processor seconds.

    Processor time does not count what other processes took of the core, so that it tells a disturbed repeat.
    """
    import jax

    began, cpu_began = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - began, time.process_time() - cpu_began


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return median, interquartile range relative to it, minimum and maximum."""
    median = statistics.median(values)
    # One value is its own quartiles.
    low, _, high = statistics.quantiles([*values, *values[: len(values) == 1]], n=4, method="inclusive")
    return {
        "median": round(median, digits),
        "iqr": round((high - low) / median, 4),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def pin(cores: Sequence[int]) -> None:
    """Keep this process and its children on ``cores``. Call it before jax is imported."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
        # One core, one thread; with more, the pool size at which nothing hangs (see jrl.xla).
        os.environ["NPROC"] = str(1 if len(cores) == 1 else max(4, len(cores)))


def machine() -> dict[str, Any]:
    """Return what a record says about where it was taken; in the process that measures."""
    import jax

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "python": platform.python_version(),
        "jrl": __version__,
        **versions("jax", "jaxlib", "flax", "optax", "gymnax", "jrl-kernels"),
        "device": str(jax.devices()[0]),
        "device_kind": jax.devices()[0].device_kind,
        "cpu": cpu,
        "precision": "float32",
        "matmul_precision": str(
            jax.config.jax_default_matmul_precision or "default"  # type: ignore[attr-defined]
        ),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "NPROC": os.environ.get("NPROC"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
    }


def versions(*distributions: str) -> dict[str, str]:
    """Return the installed version of each distribution that is installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """Return the short commit of a checkout, with ``+`` where files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # Installed into a virtual environment inside another project, the commit would be that project's.
    if not shutil.which("git") or not git("ls-files", "."):
        return None
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "") or None


def load() -> list[float] | None:
    """Return the load averages: a record taken on a busy machine should say so."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def now() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------ fresh processes


def in_fresh_process(command: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """Run ``command`` and return the JSON object on the last line it prints.

    Raises:
        RuntimeError: it failed; the message ends with the last line of its errors.
    """
    # A process on a GPU takes most of its memory at once, and this one may have done so.
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environ}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"a fresh process ended with exit status {done.returncode}: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_cold_and_cached(command: Sequence[str], repeats: int) -> tuple[dict[str, Any], list[Seconds]]:
    """Compile in fresh processes: cold, and again with the persistent cache that the cold one has filled.

    Args:
        command: prints, as JSON, ``import_seconds``, ``lower_seconds``, ``compile_seconds`` and ``machine``.
        repeats: pairs of processes.

    Returns:
        The spread of each number, ``cold_…`` and ``cached_…``, with ``machine``; and the raw pairs.
    """
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            environ = {
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_ENABLE_COMPILATION_CACHE": "true",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            }
            rows.append({which: in_fresh_process(command, environ) for which in ("cold", "cached")})
    summary: dict[str, Any] = {
        f"{which}_{field}": spread([row[which][field] for row in rows])
        for which in ("cold", "cached")
        for field in ("lower_seconds", "compile_seconds", "import_seconds")
    }
    summary["machine"] = rows[-1]["cold"]["machine"]
    for row in rows:
        for one in row.values():
            del one["machine"]
    return summary, rows
