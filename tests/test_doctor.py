"""What ``jrl doctor`` finds."""

import os
import sys

import pytest

from jrl import doctor, trial, xla


def test_the_report_has_versions_devices_and_settings(capsys):
    facts, warnings = doctor.report({"NPROC": "4", "JAX_PLATFORMS": "cpu"})
    for name in ("jrl", "python", "jax", "jaxlib", "flax", "optax", "chex", "gymnax", "orbax-checkpoint"):
        assert facts[name][0].isdigit()
    assert facts["NPROC"] == "4"
    assert facts["XLA_FLAGS"] == "not set"
    assert {
        "devices",
        "matmul precision",
        "64-bit numbers",
        "compilation cache",
        "memory",
        "CPU cores",
    } <= set(facts)
    assert not any("GPU" in warning for warning in warnings)
    doctor.print_report()
    assert "matmul precision" in capsys.readouterr().out


def test_the_cpu_of_a_machine_with_a_gpu_is_a_warning(tmp_path):
    assert doctor.cpu_fallback("cpu", {}, tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    warning = doctor.cpu_fallback("cpu", {}, tmp_path)
    assert 'pip install "jrl-kernels[cuda]"' in warning
    assert "JAX_PLATFORMS=cpu" in warning
    assert doctor.cpu_fallback("gpu", {}, tmp_path) is None
    assert doctor.cpu_fallback("cpu", {"JAX_PLATFORMS": "cpu"}, tmp_path) is None


def test_what_xla_diagnoses_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(xla, "diagnose", lambda environ: ["NPROC=1 may hang"], raising=False)
    assert doctor.report({"JAX_PLATFORMS": "cpu"})[1] == ["NPROC=1 may hang"]
    doctor.print_report()
    assert "warning: NPROC=1 may hang" in capsys.readouterr().out


def test_sizes_and_caches_in_words(tmp_path):
    assert [doctor.readable_size(count) for count in (5, 2048, 3 * 2**30)] == ["5 B", "2.0 KiB", "3.0 GiB"]
    assert doctor._cache(None) == "off: every process compiles anew"
    (tmp_path / "program").write_bytes(b"12345")
    assert doctor._cache(str(tmp_path)) == f"{tmp_path} (1 files, 5 B)"


def test_tables_of_environments_and_algorithms(monkeypatch, capsys):
    from jrl import envs

    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(envs, "ids", lambda: ["CartPole-v1", "Pendulum-v1", "GridWorld-jrl"])
    doctor.print_envs()
    table = capsys.readouterr().out
    rows = [line.split() for line in table.splitlines()]
    assert ["CartPole-v1", "float32[4]", "Discrete(2)", "500"] in rows
    assert ["GridWorld-jrl", "float32[16]", "Discrete(4)", "100"] in rows  # its field is max_steps
    assert "Box((1,))" in table
    assert "MovieBooking-jrl needs --env-kwarg data=FOLDER" in table
    doctor.print_algos()
    table = capsys.readouterr().out
    for name in ("ppo", "dqn"):
        assert f"jrl train {name} --help" in table


@pytest.mark.parametrize(("name", "backend", "words"), [
    ("default", "cpu", "default (float32)"),
    ("default", "gpu", "default (TF32 on recent NVIDIA GPUs, bfloat16 on TPUs)"),
    ("highest", "gpu", "highest"),
])  # fmt: skip
def test_the_precision_in_words(name, backend, words):
    assert doctor._precision(name, backend) == words


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_program_that_waits_for_ever_is_told_from_one_that_computes(monkeypatch):
    monkeypatch.setattr(trial, "IDLE_SECONDS", 1.0)
    computes = "import time\nend = time.process_time() + 2.0\nwhile time.process_time() < end: pass"
    assert not trial.hangs(computes, os.environ, 0.5)
    assert trial.hangs("import time\ntime.sleep(600)", os.environ, 3.0)
    with pytest.raises(RuntimeError, match="exit code 3"):
        trial.hangs("raise SystemExit(3)", os.environ, 60.0)


@pytest.mark.parametrize("hung", [False, True])
def test_the_trial_of_a_vmapped_program_is_reported(monkeypatch, capsys, hung):
    monkeypatch.setattr(trial, "hangs", lambda program, environ, limit: hung)
    doctor.print_report()
    shown = capsys.readouterr().out
    assert ("a batch of QR factorisations ran" in shown) is not hung
    assert ("a batch of QR factorisations hung" in shown) is hung


def test_the_suites_own_settings_pass_the_trial():
    assert doctor.try_vmapped(limit=120.0) == ("a batch of QR factorisations ran", None)
