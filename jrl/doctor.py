"""What ``jrl doctor``, ``jrl envs`` and ``jrl algos`` print."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jrl import __version__, configuration, progress, trial, xla


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    found = {"jrl": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "chex", "gymnax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["compiler"] = "quick" if xla.compiles_quickly() else "full"
    return found


def device() -> str:
    """Return the devices in words: ``cpu`` or ``gpu (NVIDIA H200)``, with their number if several."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind
    name = devices[0].platform if kind.lower() == devices[0].platform else f"{devices[0].platform} ({kind})"
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def precision() -> str:
    """Return the default matmul precision; "default" means TF32 on recent NVIDIA GPUs, float32 on a CPU."""
    import jax

    return str(jax.config.jax_default_matmul_precision or "default")  # type: ignore[attr-defined]


def report(environ: Mapping[str, str] = os.environ) -> tuple[dict[str, str], list[str]]:
    """Return the facts by name, and a warning for each thing that is wrong.

    Args:
        environ: the environment variables to look at.
    """
    import jax

    devices = jax.devices()
    facts = dict(versions())
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    facts["devices"] = device()
    facts["matmul precision"] = _precision(precision(), devices[0].platform)
    facts["64-bit numbers"] = "on" if _x64() else "off (jax_enable_x64)"
    facts["compilation cache"] = _cache(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    facts["memory"] = _memory()
    for one in devices:
        stats = one.memory_stats() or {}
        if "bytes_limit" in stats:
            used = stats.get("bytes_in_use", 0)
            facts[f"memory of {one}"] = f"{readable_size(stats['bytes_limit'])}, {readable_size(used)} in use"
    facts["CPU cores"] = _cores()
    for name in ("NPROC", "XLA_FLAGS", "JAX_PLATFORMS"):
        facts[name] = environ.get(name) or "not set"

    diagnose = getattr(xla, "diagnose", None)
    warnings = list(diagnose(environ)) if diagnose else []
    if warning := cpu_fallback(devices[0].platform, environ):
        warnings.append(warning)
    return facts, warnings


def try_vmapped(environ: Mapping[str, str] = os.environ, limit: float = 20.0) -> tuple[str, str | None]:
    """Run a batch of QR factorisations in a fresh process, which is what hangs where XLA's pool is too small.

    Args:
        environ: the environment variables that it runs in.
        limit: seconds after which it is looked at, see :func:`jrl.trial.hangs`.

    Returns:
        What came of it, and a warning if it hung.
    """
    if not sys.platform.startswith("linux"):
        return "not tried: it is watched through /proc, which is Linux's", None
    if not trial.hangs(trial.BATCHED_QR, {**environ, "JAX_PLATFORMS": "cpu"}, limit):
        return "a batch of QR factorisations ran", None
    return "hung", (
        "a batch of QR factorisations hung, as vmapped networks other than jrl's can: set NPROC=4 (8 for two CPU "
        "devices) in the environment before jax is imported, or call jrl.xla.configure() there."
    )


def cpu_fallback(backend: str, environ: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """Return a warning if jax computes on the CPU of a machine that has an NVIDIA GPU.

    Args:
        backend: platform of the first jax device.
        environ: the environment variables; a ``JAX_PLATFORMS`` set to the CPU is a wish, not a mistake.
        root: of the file system, for tests.
    """
    if backend != "cpu" or environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    has_gpu = (root / "proc/driver/nvidia").exists() or any((root / "dev").glob("nvidia[0-9]*"))
    if not has_gpu and not (root == Path("/") and shutil.which("nvidia-smi")):
        return None
    return (
        "This machine has an NVIDIA GPU, but jax computes on the CPU: the CUDA build of jax is missing or "
        'does not fit the driver. Install it: pip install "jrl-kernels[cuda]"; then compare nvidia-smi with '
        "the CUDA version it needs. To compute on the CPU on purpose, set JAX_PLATFORMS=cpu."
    )


def print_report() -> None:
    """Print :func:`report`."""
    from rich.table import Table

    console = progress.console()
    facts, warnings = report()
    facts["vmapped on a CPU"], warning = try_vmapped()
    warnings += [warning] if warning else []
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, highlight=False)
    for warning in warnings:
        console.print(f"\nwarning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if not warnings:
        console.print("\nnothing is wrong", style="green")


def print_algos() -> None:
    """Print the algorithms with the first line of their documentation."""
    from rich.table import Table

    table = Table("name", "what it is", "settings", box=None, padding=(0, 2, 0, 0))
    for name in configuration.ALGORITHMS:
        module = configuration.load(name)
        table.add_row(name, (module.__doc__ or "").strip().splitlines()[0], f"jrl train {name} --help")
    progress.console().print(table, highlight=False)


def print_envs() -> None:
    """Print every environment that needs no download: observation, actions, time limit."""
    from rich.table import Table

    from jrl import envs
    from jrl.envs import registry

    table = Table("id", "observation", "actions", "time limit", box=None, padding=(0, 2, 0, 0))
    for env_id in envs.ids():
        env = envs.make(env_id)
        limit = getattr(env.params, "max_steps_in_episode", getattr(env.params, "max_steps", None))
        text = "-" if limit is None else f"{int(limit):,}"
        table.add_row(env_id, _shapes(env.observation), _action(env.action), text)
    progress.console().print(table, highlight=False)
    for env_id, argument in registry.NEED_DATA.items():
        print(f"{env_id} needs --env-kwarg {argument}=FOLDER")


def _shapes(observation: Any) -> str:
    import jax

    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(observation))


def _action(space: Any) -> str:
    name = type(space).__name__
    inner = {"Discrete": "n", "MultiDiscrete": "ns", "Box": "shape"}.get(name)
    return f"{name}({getattr(space, inner)})" if inner else name


def _precision(name: str, backend: str) -> str:
    if name != "default":
        return name
    return (
        "default (float32)" if backend == "cpu" else "default (TF32 on recent NVIDIA GPUs, bfloat16 on TPUs)"
    )


def _x64() -> bool:
    import jax

    return jax.dtypes.canonicalize_dtype("int64") == "int64"


def _cache(folder: str | None) -> str:
    if not folder:
        return "off: every process compiles anew"
    files = [file for file in Path(folder).glob("**/*") if file.is_file()]
    return f"{folder} ({len(files)} files, {readable_size(sum(file.stat().st_size for file in files))})"


def _memory() -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, AttributeError):  # not on every system
        return "unknown"
    return f"{readable_size(total)}, {readable_size(free)} free"


def available_memory() -> int | None:
    """Return the bytes of main memory that a new process could use, or None where the system does not say.

    What the system itself counts as available: free pages and those it can drop, such as cached files.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, AttributeError):
        return None


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {usable} usable by this process"


def readable_size(count: float) -> str:
    """Write a number of bytes as in ``24 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
