"""Compiles ``native.cc`` for this processor, by the machine's own C++ compiler, and tells XLA of it.

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
from pathlib import Path

import jax

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SOURCE = Path(__file__).with_name("native.cc")


@functools.cache
def load() -> ctypes.CDLL:
    """Compile the kernel if this machine has not yet, load it, and tell XLA of it.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails; with what it said.
    """
    library = ctypes.CDLL(str(_compiled()))
    for name in ("forward", "backward"):
        handler = jax.ffi.pycapsule(getattr(library, f"jrl_mlp_{name}"))
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
        SOURCE.read_text(),
        *FLAGS,
        compiler,
        version,
        platform.machine(),
        processor,
        importlib.metadata.version("jaxlib"),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def target(name: str) -> str:
    """Return what XLA knows the kernel as, ``"forward"`` or ``"backward"``."""
    return f"jrl_mlp_{name}_{_digest()}"


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
    library = cache / f"native-{_digest()}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may do this at once: each writes a file of its own, and the last one's stays.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [_compiler(), *FLAGS, "-fPIC", "-shared", f"-I{jax.ffi.include_dir()}", str(SOURCE)]
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(
                    f"kernels='native' did not compile ({' '.join(command)}):\n{done.stderr[-2000:]}\nName another "
                    "compiler in CXX, or use kernels='xla'."
                )
            built.replace(library)
    except OSError as error:
        raise RuntimeError(
            f"kernels='native' keeps what it compiles in {cache}: {error}. Set XDG_CACHE_HOME to a folder that can be "
            "written to, or use kernels='xla'."
        ) from error
    return library
