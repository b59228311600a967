"""Settings of the whole suite: safe XLA settings before jax is imported, a compilation cache, strictness."""

import os
from pathlib import Path

from jrl import xla

# Before jax is imported: what XLA's CPU pool needs to not hang on machines of few cores (see jrl/xla.py).
# Eight fake devices, so that every test may use a mesh; what names none runs on the first.
xla.configure(os.environ, num_devices=8)

import jax  # noqa: E402

CACHE = Path(os.environ.get("JRL_TEST_CACHE", Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
