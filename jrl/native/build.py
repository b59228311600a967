"""Compiles the C++ kernels for this processor, by the machine's own compiler, and tells XLA of them.

The library is kept in ``$XDG_CACHE_HOME/jrl``, by default ``~/.cache/jrl``, under a name that changes with the source,
the compiler, the processor and jaxlib.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernels.cc"
NAMES = (
    "jrl_adam_norm",
    "jrl_adam_update",
    "jrl_categorical_loss",
    "jrl_categorical_mean",
    "jrl_categorical_target",
    "jrl_mean",
    "jrl_mlp_backward",
    "jrl_mlp_forward",
    "jrl_noise_factors",
    "jrl_threefry_bits",
    "jrl_threefry_split",
)
"""Of the kernels; XLA knows them by :func:`target`."""


def check(kernels: str) -> None:
    """Raise ValueError where ``kernels`` is neither ``"xla"`` nor ``"native"``."""
    if kernels not in ("xla", "native"):
        raise ValueError(f"kernels={kernels!r}: must be 'xla' or 'native'.")


def require() -> None:
    """Compile and load the kernels, or say why they cannot be used here.

    Raises:
        ValueError: JAX computes on no CPU.
        RuntimeError: as :func:`load`.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"kernels='native' on {jax.default_backend()}: it is for CPUs; use kernels='xla', which has one for GPUs."
        )
    load()


@functools.cache
def load() -> ctypes.CDLL:
    """Compile the kernels if this machine has not yet, load them, and tell XLA of them.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails; with what it said.
    """
    library = ctypes.CDLL(str(_compiled()))
    for name in NAMES:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(target(name), handler, platform="cpu")
    return library


@functools.cache
def _digest() -> str:
    """Return what names a build: whatever changes the machine code, or what XLA's own cache must not mix up."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        processor = platform.processor()
    parts = (
        *(source.read_text() for source in sorted(FOLDER.glob("*.cc")) + sorted(FOLDER.glob("*.h"))),
        *FLAGS,
        compiler,
        version,
        platform.machine(),
        processor,
        importlib.metadata.version("jaxlib"),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def target(name: str) -> str:
    """Return what XLA knows a kernel as, another name for another build."""
    return f"{name}_{_digest()}"


def call(
    name: str,
    outputs: Sequence[tuple[int, ...]],
    *args: jax.Array,
    aliases: dict[int, int] | None = None,
    attributes: dict[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> list[jax.Array]:
    """Return the outputs, of these shapes, of a kernel; ``jax.vmap`` adds an axis to all.

    Args:
        name: of the kernel.
        outputs: shapes.
        args: arrays.
        aliases: argument to output that may take its memory, by their positions.
        attributes: what is no array.
        dtype: of the outputs.

    Raises:
        RuntimeError: as :func:`load`.
    """
    load()
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in outputs]
    function: Any = jax.ffi.ffi_call(
        target(name), shapes, vmap_method="broadcast_all", input_output_aliases=aliases
    )
    return function(*args, **(attributes or {}))


def _compiler() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in candidates:
        if found := shutil.which(name):
            return found
    raise RuntimeError(
        f"kernels='native' is compiled on this machine, and there is no C++ compiler ({', '.join(candidates)} on "
        "PATH): install one (Debian: apt install g++), name one in CXX, or use kernels='xla'."
    )


def _compiled() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jrl"
    file = cache / f"native-{_digest()}.so"
    if file.exists():
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may do this at once: each writes a file of its own, and the last one's stays.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / file.name
            command = [_compiler(), *FLAGS, "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}", str(SOURCE)]
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(
                    f"kernels='native' did not compile ({' '.join(command)}):\n{done.stderr[-2000:]}\nName another "
                    "compiler in CXX, or use kernels='xla'."
                )
            built.replace(file)
    except OSError as error:
        raise RuntimeError(
            f"kernels='native' keeps what it compiles in {cache}: {error}. Set XDG_CACHE_HOME to a folder that can be "
            "written to, or use kernels='xla'."
        ) from error
    return file
