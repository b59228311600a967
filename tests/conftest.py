"""Settings of the whole suite: safe XLA settings before jax is imported, a compilation cache, strictness."""

import gc
import os
import re
from pathlib import Path

from jrl import xla

# Before jax is imported: what XLA's CPU pool needs to not hang on machines of few cores (see jrl/xla.py).
# Eight fake devices, so that every test may use a mesh; what names none runs on the first.
xla.configure(os.environ, num_devices=8)

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE = Path(os.environ.get("JRL_TEST_CACHE", Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Modules whose tests share nothing (most are processes of their own): each test goes to the worker that is free.
SPREAD = ("test_readme", "test_resume", "test_processes", "test_notebooks", "test_cli", "test_hang")


# Every compiled program maps memory, and Linux aborts a process of more than vm.max_map_count maps, 65,530 by default.
MAX_MAPS = 20_000


def scope(nodeid):
    """Return what tests share compiled programs within: a case of the contract, a module, else themselves."""
    path, _, test = nodeid.partition("::")
    if Path(path).stem in SPREAD:
        return nodeid
    if Path(path).stem == "test_contract":
        return path + re.sub(r".*\[(.*?)(-True|-False)?\]$", r"\1", test)
    return path


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is nothing to schedule
def pytest_xdist_make_scheduler(config, log):
    """Keep tests that share compiled programs in one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between scopes: forget compiled programs once there are many, hide what remains from the collector."""
    if nextitem is not None and scope(item.nodeid) == scope(nextitem.nodeid):
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    # Every collection, and every look for leaked tracers, goes through all that a worker holds, but for these.
    gc.freeze()
