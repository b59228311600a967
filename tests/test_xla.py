import os
import re
import subprocess
import sys

import fake_algorithm as fake
import pytest

from jrl import xla

NO_TILES = "--xla_backend_extra_options=xla_cpu_disable_tiled_emitter"


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with this jaxlib and so many cores."""

    def pretend(jaxlib, cores):
        monkeypatch.setattr(xla.importlib.metadata, "version", lambda name: {"jaxlib": jaxlib}[name])
        monkeypatch.setattr(xla, "cores", lambda: cores)

    return pretend


@pytest.mark.parametrize("jaxlib", ["0.11.0", "0.11.2", "0.12.0.dev20270101", "1.0.0"])
@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_newer_jaxlib_needs_nothing(machine, jaxlib, cores):
    machine(jaxlib, cores)
    environ = {}
    xla.configure(environ)
    assert environ == ({"XLA_FLAGS": NO_TILES} if jaxlib in ("0.11.0", "0.11.2") else {})
    assert xla.diagnose(environ) == []


@pytest.mark.parametrize("jaxlib", ["0.10.2", "0.10.0.dev20260101", "0.9.1"])
@pytest.mark.parametrize(("cores", "threads"), [(1, None), (2, "4"), (3, "4"), (4, None), (16, None)])
def test_a_small_pool_of_older_jaxlib_becomes_four_threads(machine, jaxlib, cores, threads):
    machine(jaxlib, cores)
    environ = {}
    assert len(xla.diagnose(environ)) == (threads is not None)
    xla.configure(environ)
    flags = {"XLA_FLAGS": NO_TILES} if jaxlib == "0.10.2" else {}
    assert environ == flags | ({} if threads is None else {"NPROC": threads})
    assert xla.diagnose(environ) == []


@pytest.mark.parametrize(
    ("devices", "cores", "threads"),
    [(1, 1, None), (2, 1, "8"), (2, 2, "8"), (8, 2, "32"), (8, 31, "32"), (8, 32, None)],
)
def test_four_threads_for_each_device(machine, devices, cores, threads):
    machine("0.10.2", cores)
    environ = {}
    xla.configure(environ, num_devices=devices)
    assert environ["XLA_FLAGS"] == f"--xla_force_host_platform_device_count={devices} {NO_TILES}"
    assert environ.get("NPROC") == threads
    assert xla.diagnose(environ) == []


def test_devices_the_user_asked_for_count_too(machine):
    machine("0.10.2", 4)
    environ = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4"}
    xla.configure(environ)
    assert environ["NPROC"] == "16"
    assert environ["XLA_FLAGS"].endswith(f"device_count=4 {NO_TILES}")


def test_the_number_of_devices_replaces_an_older_one_and_leaves_other_flags(machine):
    machine("0.11.2", 2)
    environ = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_dump_to=/tmp/x"}
    xla.configure(environ, num_devices=8)
    assert environ["XLA_FLAGS"].split() == [
        "--xla_dump_to=/tmp/x",
        "--xla_force_host_platform_device_count=8",
        NO_TILES,
    ]
    assert "NPROC" not in environ
    xla.configure(environ, num_devices=8)
    assert environ["XLA_FLAGS"].count("device_count") == 1


@pytest.mark.parametrize("nproc", ["1", "2", "3", "4", "32"])
def test_what_the_user_set_stays(machine, nproc):
    machine("0.10.2", 2)
    environ = {"NPROC": nproc}
    xla.configure(environ)
    assert environ == {"NPROC": nproc, "XLA_FLAGS": NO_TILES}
    assert bool(xla.diagnose(environ)) == (nproc in ("2", "3"))


@pytest.mark.parametrize("nproc", ["", "0", "many"])
def test_a_setting_xla_cannot_read_counts_as_the_cores(machine, nproc):
    machine("0.10.2", 2)
    assert xla.diagnose({"NPROC": nproc})[0].startswith("XLA's CPU pool has 2 threads")


def test_the_warning_says_what_and_how(machine):
    machine("0.10.2", 2)
    (warning,) = xla.diagnose({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"})
    assert "has 2 threads" in warning
    assert "jaxlib 0.10.2 can hang with fewer than 12" in warning
    assert "set NPROC=12 in the environment before jax is imported" in warning
    assert "jaxlib 0.11 (Python 3.12)" in warning


def test_the_suite_itself_runs_under_safe_settings():
    import os

    assert "NPROC" in os.environ or xla.diagnose(os.environ) == []
    assert re.search(r"device_count=8\b", os.environ["XLA_FLAGS"])


def test_the_cores_of_this_machine():
    assert xla.cores() >= 1


def test_quick_compile_adds_its_flags_once_and_leaves_those_of_the_user(machine):
    machine("0.11.2", 3)
    environ = {}
    xla.configure(environ)
    assert not xla.compiles_quickly(environ)
    xla.configure(environ, num_devices=2, quick_compile=True)
    assert xla.compiles_quickly(environ)
    assert environ["XLA_FLAGS"].split() == [
        "--xla_force_host_platform_device_count=2",
        f"{NO_TILES},xla_cpu_disable_new_fusion_emitters",
        "--xla_backend_optimization_level=1",
        "--xla_cpu_parallel_codegen_split_count=3",
    ]
    before = dict(environ)
    xla.configure(environ, num_devices=2, quick_compile=True)
    assert sorted(environ["XLA_FLAGS"].split()) == sorted(before["XLA_FLAGS"].split())
    environ = {"XLA_FLAGS": "--xla_backend_extra_options=a,b=c --xla_backend_optimization_level=2"}
    xla.configure(environ, quick_compile=True)
    assert environ["XLA_FLAGS"].split() == [
        "--xla_backend_optimization_level=2",
        "--xla_backend_extra_options=a,b=c,xla_cpu_disable_tiled_emitter,xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=3",
    ]


def objects(folder, code):
    """Run ``code`` in a process of its own; return the names of what XLA's CPU compiler made."""
    environ = {
        **fake.environ(),
        "XLA_FLAGS": f"--xla_dump_to={folder}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environ
    )
    assert done.returncode == 0, done.stderr
    return [name for name in os.listdir(folder) if name.endswith(".o")]


@pytest.mark.parametrize("quick", [False, True])
def test_the_compiler_does_as_quick_compile_says(tmp_path, quick):
    """So that another jaxlib cannot leave the flags without effect: only the older emitters make elemental kernels."""
    code = f"""
import os
from jrl import xla
xla.configure(quick_compile={quick})
import jax, jax.numpy as jnp
assert jax.jit(lambda x: jnp.sin(x) * 2 + x.sum())(jnp.ones(1000)).shape == (1000,)
"""
    compiled = [name for name in objects(tmp_path, code) if name.endswith("_kernel_module.o")]
    assert compiled
    assert any("elemental_kernel_module" in name for name in compiled) == quick


@pytest.mark.parametrize("configured", [False, True])
def test_the_compiler_makes_no_tiles(tmp_path, configured):
    """So that another jaxlib cannot leave the option without effect, nor one make it needless unseen."""
    code = f"""
from jrl import xla
if {configured}:
    xla.configure()
import jax, jax.numpy as jnp
assert jax.jit(jnp.add)(jnp.ones((30, 20)), jnp.ones((30, 20))).shape == (30, 20)
"""
    (added,) = (name for name in objects(tmp_path, code) if "jit_add" in name)
    assert ("__compute_module" in added) != configured
