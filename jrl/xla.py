"""XLA's CPU settings that must be in the environment before jax is imported. This module imports no jax.

On a CPU of few cores jaxlib 0.10 can wait for ever: a vmapped training program puts work on XLA's thread pool
that waits for other work of the same pool, and with two threads all of them may end up waiting: 9 of 16 processes
hung. That work is the QR factorisation of orthogonal initialisation, a batch of which divides itself among the
pool's threads. Since jrl's own networks compute it one by one (:func:`jrl.networks.mlp.orthogonal`), 32 of 32 ran. For
other networks a pool of four threads for each device ran every time, 17 processes with one device and 13 with two;
two threads for each of two devices hung once in two (``benchmarks/results/hang.jsonl``, ``benchmarks/hang.py``). The
pool's size is read from ``NPROC`` when jaxlib loads. jaxlib 0.11 has not been seen to hang.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping, MutableMapping

THREADS_PER_DEVICE = 4

_OLDER_EMITTERS = "xla_cpu_disable_new_fusion_emitters"
_NO_TILES = "xla_cpu_disable_tiled_emitter"
# A process whose jaxlib does not know an option ends, so it is for those that do.
_WITH_TILES = frozenset({"0.10.0", "0.10.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2"})


def configure(
    environ: MutableMapping[str, str] = os.environ,
    *,
    num_devices: int | None = None,
    vmapped: bool = True,
    quick_compile: bool = False,
) -> None:
    """Put settings under which nothing hangs into ``environ``; what the user has set stays.

    Call it before anything imports jax: the ``jrl`` command does. One more setting keeps XLA from an emitter that is
    slow for matrices whose rows are no multiple of its tiles of 16; it computes the same.

    Args:
        environ: the environment to change.
        num_devices: CPU devices to present (``--xla_force_host_platform_device_count``); None leaves that be.
        vmapped: whether networks other than jrl's own will be vmapped, which may be initialised by batches of
            factorisations. Nothing else has been seen to hang, and with more threads than cores it takes up to
            half as long again.
        quick_compile: compile programs for a CPU in about half the processor time, for runs of seconds or a few
            minutes: with fewer of LLVM's optimisations and XLA's older emitters of fusions. It suits networks
            with ``kernels="native"``; those that XLA computes run slower so, and results may differ by rounding. A
            run's record has it among the versions, as ``compiler``.
    """
    if num_devices is not None:
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", environ.get("XLA_FLAGS", ""))
        flags = f"{flags} --xla_force_host_platform_device_count={num_devices}"
        environ["XLA_FLAGS"] = flags.strip()
    if importlib.metadata.version("jaxlib") in _WITH_TILES:
        environ["XLA_FLAGS"] = _with_option(environ.get("XLA_FLAGS", ""), _NO_TILES)
    if quick_compile and not compiles_quickly(environ):
        environ["XLA_FLAGS"] = _with_quick_flags(environ.get("XLA_FLAGS", ""))
    if vmapped and _pool_can_hang(environ):
        environ.setdefault("NPROC", str(_threads_needed(environ)))


def compiles_quickly(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether ``environ`` has the settings of :func:`configure` with ``quick_compile``."""
    return _OLDER_EMITTERS in environ.get("XLA_FLAGS", "")


def _with_quick_flags(given: str) -> str:
    """Add the flags that JAX 0.10 and 0.11 both know; those of the user stay."""
    flags = _with_option(given, _OLDER_EMITTERS).split()
    # A program is divided into so many modules of LLVM, each of which takes its time.
    for flag, value in (("backend_optimization_level", 1), ("cpu_parallel_codegen_split_count", cores())):
        if not any(other.startswith(f"--xla_{flag}=") for other in flags):
            flags.append(f"--xla_{flag}={value}")
    return " ".join(flags)


def _with_option(given: str, option: str) -> str:
    """Add an option of XLA's CPU compiler to those that are there."""
    extra = "--xla_backend_extra_options="
    flags = given.split()
    options = [
        name for flag in flags if flag.startswith(extra) for name in flag.removeprefix(extra).split(",")
    ]
    flags = [flag for flag in flags if not flag.startswith(extra)]
    return " ".join([*flags, extra + ",".join(dict.fromkeys([*options, option]))])


def diagnose(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a warning for each setting under which a batch of factorisations could hang; none is the empty list."""
    if not _pool_can_hang(environ):
        return []
    needed = _threads_needed(environ)
    version = importlib.metadata.version("jaxlib")
    return [
        f"XLA's CPU pool has {_pool_size(environ)} threads, and jaxlib {version} can hang with fewer than {needed} "
        "where a program factorises a batch of matrices, as vmapped orthogonal initialisers do (jrl's own do not): "
        f"set NPROC={needed} in the environment before jax is imported, or use jaxlib 0.11 (Python 3.12)."
    ]


def _pool_can_hang(environ: Mapping[str, str]) -> bool:
    # jaxlib 0.11 runs, and so does a pool of one thread under one device: it computes where it is called.
    one_of_each = _pool_size(environ) == 1 and _num_devices(environ) == 1
    return _jaxlib() < (0, 11) and not one_of_each and _pool_size(environ) < _threads_needed(environ)


def _pool_size(environ: Mapping[str, str]) -> int:
    value = environ.get("NPROC", "")
    return int(value) if value.isdigit() and int(value) > 0 else cores()


def _threads_needed(environ: Mapping[str, str]) -> int:
    return THREADS_PER_DEVICE * _num_devices(environ)


def _num_devices(environ: Mapping[str, str]) -> int:
    match = re.search(r"--xla_force_host_platform_device_count=(\d+)", environ.get("XLA_FLAGS", ""))
    return int(match[1]) if match else 1


def _jaxlib() -> tuple[int, int]:
    major, minor, *_ = importlib.metadata.version("jaxlib").split(".")
    return int(major), int(minor)


def cores() -> int:
    """Return how many cores this process may use."""
    # macOS and Windows have no affinity to ask for.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
