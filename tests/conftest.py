"""Settings of the whole suite: safe XLA settings before jax is imported, a compilation cache, strictness."""

import collections
import gc
import os
import re
import shutil
from pathlib import Path

from jrl import xla

# Before jax is imported: what XLA's CPU pool needs to not hang on machines of few cores (see jrl/xla.py).
# Eight fake devices, so that every test may use a mesh; what names none runs on the first.
xla.configure(os.environ, num_devices=8)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

CACHE = Path(os.environ.get("JRL_TEST_CACHE", Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Compiling is most of what the suite does, so programs of tests are compiled with few optimisations, as are those of
# most processes that tests start (quickly_compiled). Tests marked "optimized" (same bits, time, memory; training in the
# contract) have all of XLA's, as a user has; so has every test and process with JRL_TEST_OPTIMIZED=1.
ALL_OPTIMIZED = os.environ.get("JRL_TEST_OPTIMIZED", "0") == "1"
FEW_OPTIMIZATIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,  # each worker has one core
}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    FEW_OPTIMIZATIONS["xla_cpu_use_fusion_emitters"] = False
optimized = ALL_OPTIMIZED
options_of_jax = compiler.get_compile_options


def options_of_tests(*args, **kwargs):
    """JAX's own compile options and, unless a test wants all optimisations, those that compile fast."""
    options = options_of_jax(*args, **kwargs)
    if not optimized and jax.default_backend() == "cpu":
        chosen = dict(options.env_option_overrides)
        options.env_option_overrides = list((FEW_OPTIMIZATIONS | chosen).items())
    return options


# JAX has a switch for some of this, jax_disable_most_optimizations, but most of the time is the emitters'.
compiler.get_compile_options = options_of_tests


def quickly_compiled(environ, level=FEW_OPTIMIZATIONS["xla_backend_optimization_level"]):
    """The environment of a process that compiles as tests do and shares their compiled programs.

    One that also computes for a while takes least with a ``level`` of 1.
    """
    environ = {
        **environ,
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if not ALL_OPTIMIZED and jax.default_backend() == "cpu":
        options = FEW_OPTIMIZATIONS | {"xla_backend_optimization_level": level}
        flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
        environ["XLA_FLAGS"] = " ".join([environ.get("XLA_FLAGS", ""), *flags]).strip()
    return environ


def is_optimized(item):
    marker = item.get_closest_marker("optimized")
    return ALL_OPTIMIZED or (marker is not None and marker.args != (False,))


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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Under pytest-xdist: the longest scopes first, so that no worker is left alone with one at the end.

    Those compiled with all optimisations follow each other: a change of that forgets what was compiled.
    """
    if not hasattr(config, "workerinput"):
        return
    scopes = collections.defaultdict(list)
    for item in items:
        scopes[scope(item.nodeid)].append(item)

    def order(item):
        name = scope(item.nodeid)
        spread = Path(item.nodeid.partition("::")[0]).stem in SPREAD
        return not spread, not all(map(is_optimized, scopes[name])), -len(scopes[name]), name

    items.sort(key=order)  # stable: within a scope as collected


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is nothing to schedule
def pytest_xdist_make_scheduler(config, log):
    """Keep tests that share compiled programs in one worker."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # done above

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which compile too
def pytest_runtest_setup(item):
    """Compile as the test wants it; no test of the C++ kernels where nothing compiles them."""
    if item.path.parent.name == "native" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on this machine")
    global optimized
    optimized = is_optimized(item)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between scopes: forget programs compiled otherwise or once there are many, hide the rest from the collector."""
    if nextitem is not None and scope(item.nodeid) == scope(nextitem.nodeid):
        return
    maps = Path("/proc/self/maps")
    many = maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS
    if many or (nextitem is not None and is_optimized(nextitem) != is_optimized(item)):
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    # Every collection, and every look for leaked tracers, goes through all that a worker holds, but for these.
    gc.freeze()
