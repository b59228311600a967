"""``jrl bench`` at toy size: what is counted, what is timed, what the records say; and the script for a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import gpu
import jax
import jax.numpy as jnp
import learning
import numpy as np
import pytest

from jrl import cli
from jrl.bench import calibrate, child, command, measure, options, recording, report
from jrl.bench.work import Work, count, nbytes
from jrl.records import RunError

# An environment of jrl's own: gymnax takes seconds to import in a fresh process.
ENV = ["--env", "ProbeObservation-jrl"]
TINY = [*ENV, "--num-envs", "4", "--members", "2", "--capacities", "8", "--seconds", "0.005"]
PPO = [*TINY, "--unroll-length", "4", "--num-minibatches", "2", "--num-epochs", "1", "--hidden-sizes", "8"]
DQN = [*TINY, "--algo", "dqn", "--warmup-env-steps", "8", "--capacity", "16", "--batch-size", "4"]
DQN += ["--hidden-sizes", "8"]
HEAD = {"benchmark", "time", "commit", "algo", "env", "num_envs", "members", "config", "machine", "load"}
TIMED = {"unit", "rate", "seconds", "processor_share", "roofline", "repeats"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """Keep what the command sets in the environment, and the folder it works in, to the test."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "NPROC"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)


CALIBRATIONS = ("matmul", "tanh", "arithmetic", "random_bits", "copy")


@pytest.fixture
def same_rate(monkeypatch):
    """Every calibrated operation takes a microsecond: measuring them is tested once, below.

    Repeats are timed by the processor: what else this machine does must not make more work look like less.
    """
    for name in CALIBRATIONS:
        monkeypatch.setattr(calibrate, name, getattr(calibrate, name).__wrapped__)
    monkeypatch.setattr(calibrate, "_seconds", lambda body, start: 1e-6)
    timed = recording.timed

    def by_the_processor(function):
        result, _, cpu_seconds = timed(function)
        return result, cpu_seconds, cpu_seconds

    monkeypatch.setattr(recording, "timed", by_the_processor)
    monkeypatch.setattr(measure, "EXTRA_UPDATES", 40)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- what is counted


@pytest.mark.optimized
def test_products_are_those_of_xla():
    def forward(x, w, v):
        return jnp.tanh(x @ w) @ v

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 5), (5, 16), (16, 3))]
    work = count(forward, *arrays)
    assert work.products == {(1, 32, 16, 5): 2.0 * 32 * 16 * 5, (1, 32, 3, 16): 2.0 * 32 * 3 * 16}
    assert work.transcendentals == 32 * 16
    assert work.bytes == 4 * ((32 * 5 + 5 * 16 + 32 * 16) + (32 * 16 + 16 * 3 + 32 * 3))
    xla = jax.jit(forward).lower(*arrays).compile().cost_analysis()
    assert work.flops == xla["flops"]
    assert work.transcendentals == xla["transcendentals"]


@pytest.mark.optimized
def test_a_loop_counts_as_often_as_it_runs_and_unused_results_do_not():
    w = jnp.ones((4, 4))

    def body(x, _):
        unused = jnp.exp(x) @ w
        return jnp.sin(x @ w), unused

    def run(x):
        return jax.lax.scan(body, x, length=7)[0]

    assert count(run, jnp.ones((2, 4))) == count(lambda x: jnp.sin(x @ w), jnp.ones((2, 4))) * 7
    with_outputs = count(lambda x: jax.lax.scan(body, x, length=7), jnp.ones((2, 4)))
    assert with_outputs.flops == 2 * 7 * (2 * 2 * 4 * 4)
    # XLA's own analysis counts the body once.
    xla = jax.jit(run).lower(jnp.ones((2, 4))).compile().cost_analysis()
    assert count(run, jnp.ones((2, 4))).transcendentals == 7 * 8 > xla.get("transcendentals", 0)


def test_batches_convolutions_gathers_and_random_bits():
    x, w = jnp.ones((6, 3, 5)), jnp.ones((6, 5, 2))
    assert count(jax.vmap(jnp.matmul), x, w).products == {(6, 3, 2, 5): 2.0 * 6 * 3 * 2 * 5}
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count(convolve, image, kernel).flops == 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)
    key = jax.random.key(0)
    assert count(lambda key: jax.random.bits(key, (10,)), key).random_bits == 320
    assert count(lambda key: jax.random.split(key, 5), key).random_bits == 5 * 64
    table, index = jnp.ones((1_000, 3)), jnp.arange(7)
    assert count(lambda table, index: table[index], table, index).bytes == 2 * 7 * 3 * 4
    assert nbytes((table, key, index)) == 4 * 3_000 + 8 + 4 * 7


def test_the_cheapest_branch_counts():
    def either(x):
        return jax.lax.cond(x[0] > 0, lambda x: x, lambda x: jnp.tanh(x @ jnp.ones((4, 4))), x)

    assert count(either, jnp.ones(4)).flops == count(either, jnp.ones(4)).transcendentals == 0


def test_work_adds_multiplies_and_subtracts():
    one = Work({(1, 2, 3, 4): 48.0}, transcendentals=5.0, bytes=7.0, array_bytes=3.0)
    two = Work({(1, 2, 3, 4): 48.0, (1, 1, 1, 1): 2.0}, elementwise=1.0, array_bytes=9.0)
    total = one * 3 + two
    assert total.flops == 3 * 48 + 50
    assert (total.transcendentals, total.elementwise, total.bytes, total.array_bytes) == (15, 1, 21, 9)
    assert (total - two).products == {(1, 2, 3, 4): 144.0}


# --------------------------------------------------------------------------------------------- what is timed


@pytest.mark.optimized
def test_calibration_measures_rates(monkeypatch):
    monkeypatch.setattr(calibrate, "RUNS", 2)
    monkeypatch.setattr(calibrate, "_large_product", lambda: (1, 64, 64, 64))
    monkeypatch.setattr(calibrate, "_large_copy", lambda: 2**16)
    monkeypatch.setattr(calibrate, "_size", lambda: 2**10)
    work = Work({(1, 64, 64, 64): 2.0 * 64**3}, 100.0, 100.0, 100.0, bytes=1e9, array_bytes=2**16)
    found = calibrate.roofline(work, seconds=1.0)
    assert all(rate > 1e5 for rate in found["rates"].values())
    assert found["limited_by"] == "bytes"
    # The least time is that of the bytes, at the rate found for arrays of their size.
    assert found["bound_seconds"] == pytest.approx(1e9 / found["rates"]["bytes"], rel=1e-3)
    assert found["reached"] == pytest.approx(found["bound_seconds"], abs=1e-3)


def test_operations_add_up_in_the_bound(same_rate):
    work = Work({(1, 2, 2, 2): 160.0}, transcendentals=2.0**17, array_bytes=4.0)
    found = calibrate.roofline(work, seconds=1e-3)
    # Ten products of a microsecond each, and twice 2^16 tanh, of which eight times as many take a microsecond.
    assert found["bound_seconds"] == pytest.approx(10e-6 + 0.25e-6, rel=1e-3)
    assert found["reached"] == pytest.approx(0.01025, abs=1e-4)
    assert found["limited_by"] == "products"


@pytest.mark.parametrize(("microseconds", "limited_by"), [(12.0, "products"), (21.0, "bytes")])
def test_the_bound_is_of_bytes_where_they_take_longer_than_all_operations(
    same_rate, microseconds, limited_by
):
    # 2^16 bytes are read and written in a microsecond; ten products and ten times 2^19 tanh take twenty.
    moved = microseconds * 2.0**17
    work = Work({(1, 2, 2, 2): 160.0}, transcendentals=10 * 2.0**19, bytes=moved, array_bytes=2.0**16)
    found = calibrate.roofline(work, seconds=1e-3)
    assert found["bound_seconds"] == pytest.approx(max(20.0, microseconds) * 1e-6, rel=1e-3)
    assert found["limited_by"] == limited_by


def test_repeats_are_as_long_as_asked_and_in_turn():
    calls = []

    def program(name):
        def run(state, length):
            calls.append(name)
            time.sleep(1e-4 * length)
            return state + length

        return measure.Program(run, 0, 1.0, Work())

    rows = measure.repeat([program("a"), program("b")], repeats=5, seconds=0.01)
    assert calls[-10:] == ["a", "b"] * 5
    assert [len(each) for each in rows] == [5, 5]
    # As many as take 10 ms, or 70 % of that; a sleep may take longer than asked for.
    assert all(row["count"] > 1 and row["seconds"] >= 1e-4 * row["count"] for each in rows for row in each)
    assert measure.processor_share([{"seconds": 2.0, "cpu_seconds": 1.0}]) == 0.5


# ---------------------------------------------------------------------------------------------- the commands


def test_ppo_parts_and_whole(same_rate, tmp_path, capsys):
    kinds = ["env", "policy", "train", "sweep", "update"]
    files = ["--json", str(tmp_path / "new" / "out.jsonl"), "--plot", str(tmp_path / "out.png")]
    assert cli.main(["bench", *kinds, *PPO, *files]) == 0
    records = lines(tmp_path / "new" / "out.jsonl")
    sizes = [(record["benchmark"], record["num_envs"], record["members"]) for record in records]
    assert sizes == [(kind, 4, 2 if kind == "sweep" else 1) for kind in kinds]
    for record in records:
        assert set(record) >= HEAD | TIMED
        assert len(record["repeats"]) == options.MIN_REPEATS
        assert record["rate"]["median"] > 0
        assert record["machine"]["matmul_precision"] == "default"
        assert record["config"]["num_envs"] == record["num_envs"]
        assert record["roofline"]["reached"] >= 0
    found = {record["benchmark"]: record for record in records}
    assert (found["train"]["units"], found["sweep"]["units"]) == (16, 32)
    assert found["env"]["roofline"]["work"]["products"] == {}
    # The policy's own layers and no other: 1 observed number, 8 hidden units, 2 actions; not the value's.
    policy = found["policy"]["roofline"]["work"]
    assert policy["products"] == {"1x4x2x8": 128.0, "1x4x8x1": 64.0}
    # A step's gradients: both networks forward, backward by weights, and by inputs but in the first layer.
    update = found["update"]["roofline"]["work"]["flops"]
    first, second = 2 * 16 * 1 * 8, 2 * 16 * 8 * (2 + 1)
    assert update == 2 * (2 * first) + 3 * second
    assert set(found["update"]["repeats"][0]) == {"plain", "more"}
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    assert "ppo on ProbeObservation-jrl, cpu, matmul precision default" in shown
    assert "\x1b" not in shown
    for kind in kinds:
        assert f"\n{kind} " in shown


def test_dqn_and_its_replay(same_rate, tmp_path):
    assert cli.main(["bench", "update", "replay", *DQN, "--json", "out.jsonl", "--plot", "out.png"]) == 0
    update, *replays = lines(tmp_path / "out.jsonl")
    assert update["roofline"]["work"]["flops"] > 0
    assert [(r["operation"], r["prioritized"], r["capacity"]) for r in replays] == [
        ("sample", False, 8),
        ("add", False, 8),
        ("sample", True, 8),
        ("add", True, 8),
    ]
    assert [r["held"] for r in replays] == [12] * 4  # eight and the row under way, of four environments
    assert report.row(replays[0])[0] == "replay sample, uniform, 12"
    del replays[0]["held"]  # as in records from before there was such a field
    assert report.row(replays[0])[0] == "replay sample, uniform, 8"
    assert [r["units"] for r in replays] == [4, 4, 4, 4]
    assert all(r["unit"] == "transitions/s" for r in replays)
    assert (tmp_path / "out.png").stat().st_size > 1_000


@pytest.mark.optimized
def test_memory_and_compile(tmp_path, monkeypatch, capsys):
    """Compile in two fresh processes instead of ten, memory in this one instead of in a fresh one."""
    both = recording.compile_cold_and_cached
    monkeypatch.setattr(recording, "compile_cold_and_cached", lambda command, repeats: both(command, 1))
    fresh = recording.in_fresh_process

    def process(command, environ):
        job = json.loads(command[-1])
        return child.main(job) if job["what"] == "memory" else fresh(command, environ)

    monkeypatch.setattr(recording, "in_fresh_process", process)
    alone = ["--members", "1", "--json", "out.jsonl"]
    assert cli.main(["bench", "memory", "compile", *PPO, *alone]) == 0
    memory, compiled = lines(tmp_path / "out.jsonl")
    assert set(memory) >= HEAD
    # The state is donated: what comes in is what goes out, but for a few numbers.
    assert memory["program"]["alias"] >= memory["state_bytes"] > 500
    assert memory["program"]["argument"] - memory["program"]["alias"] < 1_000
    peak = memory["peak_rss"]
    assert peak["compiled"] >= peak["imported"] > 10_000_000
    assert set(compiled) >= HEAD
    assert compiled["cached_compile_seconds"]["median"] < compiled["cold_compile_seconds"]["median"]
    assert compiled["cold_import_seconds"]["median"] > 0
    assert list(compiled["repeats"][0]) == ["cold", "cached"]
    shown = capsys.readouterr().out
    assert "memory of the program" in shown
    assert "cached" in shown


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match="exit status 1: ValueError: no such thing"):
        recording.in_fresh_process([sys.executable, "-c", "raise ValueError('no such thing')"], os.environ)


def test_what_was_measured_before_a_failure_is_kept(same_rate, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RunError("out of something")

    monkeypatch.setattr(measure, "policy", fails)
    files = ["--num-envs", "2", "4", "--json", "out.jsonl", "--plot", "out.png"]
    assert cli.main(["bench", "env", "policy", *PPO, *files]) == 2
    shown = capsys.readouterr()
    assert shown.err == "error: out of something\n"
    kept = [(record["benchmark"], record["num_envs"]) for record in lines(tmp_path / "out.jsonl")]
    assert kept == [("env", 2), ("env", 4)]
    assert "\nenv " in shown.out
    assert (tmp_path / "out.png").exists()


def test_an_update_that_is_noise_is_no_result(same_rate, monkeypatch):
    same = [{"count": 1, "seconds": 1.0, "cpu_seconds": 1.0}] * 5
    monkeypatch.setattr(measure, "stepping", lambda algo, setup: measure.Program(None, None, 1.0, Work()))
    monkeypatch.setattr(measure, "repeat", lambda programs, repeats, seconds: [same, same])
    setup = measure.configuration.build("ppo", "ProbeObservation-jrl")
    with pytest.raises(
        RunError, match=r"not slower than one with num_epochs=4, so their difference is noise"
    ):
        measure.update(setup, options.Options())
    more = [{"count": 2, "seconds": 6.0, "cpu_seconds": 6.0}] * 5
    monkeypatch.setattr(measure, "repeat", lambda programs, repeats, seconds: [same, more])
    monkeypatch.setattr(measure, "EXTRA_UPDATES", 4)
    # Five times the epochs took 3 s instead of 1 s: 0.5 s for the epochs of one step.
    assert measure.update(setup, options.Options())["seconds"]["median"] == 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian", *PPO], "there is no benchmark 'trian'. Nearest: train"),
        (["env", "--env", "CartPol-v1"], "Unknown environment id 'CartPol-v1'. Nearest: CartPole-v1"),
        (["env", *ENV, "--num-envs", "4", "0"], "--num-envs 0: must be at least 1."),
        (
            ["env", *ENV, "--repeats", "4"],
            "--repeats 4: must be at least 5, or the median and its spread say",
        ),
        (["env", *ENV, "--seconds", "0"], "--seconds 0.0: must be above 0"),
        (["env", *ENV, "--seconds", "inf"], "--seconds inf: must be above 0 and finite."),
        (["env", *ENV, "--json", "."], "--json .: is a folder; name a file in it."),
        (["env", *ENV, "--plot", "x.txt"], "--plot x.txt: must end in .png."),
        (["memory", *ENV, "--plot", "x.png"], "--plot x.png: nothing of memory scales; leave it out"),
        (["sweep", *ENV, "--members"], "--members: needs at least one value."),
        (["train", *ENV, "--num-minibatches", "7"], "num_minibatches=7 does not divide the batch"),
    ],
)
def test_bad_input_is_one_clear_line(args, message, capsys):
    assert cli.main(["bench", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_help_lists_every_flag(capsys):
    assert cli.main(["bench"]) == 2
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {what} " in shown for what in command.WHAT)
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", "env", "--algo", "dqn", "--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    from jrl import dqn, flags

    for cls in (options.Options, dqn.Config):
        docs = flags.field_docs(cls)
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in text
            if (cls, field.name) != (dqn.Config, "num_envs"):  # it is one of Options here
                assert " ".join(docs[field.name].split())[:40] in text


def test_numbers_are_written_for_people():
    assert [report.short(x) for x in (7, 64, 10_000, 2_513_000, 3.2e9)] == [
        "7",
        "64",
        "10 k",
        "2.51 M",
        "3.2 G",
    ]
    assert [report.size(x) for x in (100, 2**10, 3 * 2**29)] == ["100 B", "1 KiB", "1.5 GiB"]
    assert [report.seconds(x) for x in (2.5, 0.01, 3e-6)] == ["2.5 s", "10 ms", "3 µs"]
    # What three digits do not tell from the next power of ten.
    assert [report.short(x) for x in (999.7, 999_700, 998_400)] == ["1000 ", "1000 k", "998 k"]
    assert [report.size(x) for x in (1000, 1010 * 2**10, 1023.6 * 2**20)] == [
        "1000 B",
        "1010 KiB",
        "1024 MiB",
    ]
    assert [report.seconds(x) for x in (0.9997, 120, 4321.0)] == ["1000 ms", "120 s", "4321 s"]


# ------------------------------------------------------------------------------------- the script for a GPU


def test_the_gpu_script_trains_and_evaluates_at_toy_size():
    trainings = gpu.trainings()
    assert {name for name, one in trainings.items() if one.goal_seconds} == {
        "ppo-cartpole-2048-seeds",
        "ppo-breakout-256-seeds",
        "dqn-breakout-alone",
    }
    small = dataclasses.replace(gpu.toy(trainings["ppo-cartpole-2048-seeds"]), env="ProbeTruncation-jrl")
    speed, returns = gpu.train("toy", small)
    assert speed["all_env_steps"] == 2 * 256
    assert 1 <= len(speed["seconds_of_repeats"]) <= speed["repeats"] == gpu.MAX_REPEATS
    assert speed["in_time"] is True
    assert len(returns["returns"]) == small.members
    assert np.isfinite(returns["iqm"])
    assert returns["learned"] is None
    json.dumps([speed, returns], allow_nan=False)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_script(tmp_path, monkeypatch, capsys):
    log, environ = tmp_path / "log", dict(os.environ)
    assert gpu.run_stage([sys.executable, "-c", "print('well')"], 60, log, environ) == "done"
    assert gpu.run_stage([sys.executable, "-c", "raise SystemExit(3)"], 60, log, environ) == "exit code 3"
    slow = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert gpu.run_stage(slow, 1, log, environ) == "stopped after its limit of 1 s"
    assert "well" in log.read_text()

    monkeypatch.setattr(gpu, "trainings", dict)
    monkeypatch.setattr(gpu, "minatar_stages", lambda small: {})
    monkeypatch.setattr(gpu, "bench_stages", lambda small: {"bad": (60.0, "trian"), "good": (60.0, "--help")})
    assert gpu.main(["--out", str(tmp_path), "--toy"]) == 1
    ends = json.loads((tmp_path / "summary.json").read_text())
    assert [end["end"] for end in ends.values()] == ["exit code 2", "done"]
    assert "there is no benchmark 'trian'" in (tmp_path / "gpu.log").read_text()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--toy", "--stages", "none-such"])
    assert "unknown stage none-such: choose from bad, good" in capsys.readouterr().err


def test_every_bench_stage_of_the_gpu_script_has_good_flags(tmp_path):
    for small in (False, True):
        for _, words in gpu.bench_stages(small).values():
            whats = [word for word in words.split() if word in command.WHAT]
            command.parse(whats, words.split()[len(whats) :])
        for _, words in gpu.minatar_stages(small).values():
            assert set(words.split()[:2]) <= set(learning.ROWS)


def test_the_child_is_a_script_of_its_own():
    done = subprocess.run([sys.executable, "-m", "jrl.bench.child", "{}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError: 'algo'" in done.stderr
