"""A run from Python: its files, its numbers, its errors."""

import errno
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from unittest import mock

import fake_algorithm as fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep_tables import make_table

import jrl
from jrl import (
    checkpoint,
    configuration,
    driver,
    interrupt,
    loop,
    ops,
    progress,
    records,
    sweep_plots,
    tables,
)
from jrl.loggers import TensorBoardLogger, WandbLogger
from jrl.records import CheckpointError, NonFiniteError, RunError, RunWarning

ENV = fake.environment()


def run(out=None, **changes):
    arguments = {"env_steps": 800, "out": out, "eval_episodes": 4, "progress": "none"} | changes
    return driver.run(fake, ENV, **arguments)


def resume(out, *args, **kwargs):
    return driver.resume(out, *args, algorithm=fake, env=ENV, progress="none", **kwargs)


def bits(state):
    return {path: array.tobytes() for path, array in checkpoint.snapshot(state).arrays.items()}


def test_a_run_folder_has_everything(tmp_path):
    out = tmp_path / "new" / "run"
    result = run(out, seed=3, hparams={"learning_rate": 0.25})
    assert not result.interrupted
    assert {path.name for path in out.iterdir()} == {
        ".lock", "run.json", "metrics.jsonl", "checkpoints", "learning_curve.png", "summary.json",
    }  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert record["config"] == {"num_envs": 2, "sizes": [3], "warmup": 0}
    assert record["hparams"]["learning_rate"] == 0.25
    assert record["hparams"]["env/limit"] == 7
    assert (record["env_steps"], record["seed"], record["chunk_length"]) == (800, 3, 1)
    assert record["versions"]["jax"] == jax.__version__

    rows = records.read_metrics(out)
    assert [row["env_steps"] for row in rows] == list(range(8, 801, 8))
    assert [row["episode_return"] for row in rows[:3]] == [None, None, 2.0]
    assert rows[2]["episode_return_max"] == 3.0
    assert all(row["env_steps_per_second"] > 0 and math.isfinite(row["loss"]) for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)

    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation"]["episode_return_mean"] == 5.0
    assert summary["evaluation"]["episode_return_std"] == 0.0
    assert summary["evaluation"]["num_episodes"] == 4
    assert summary["evaluation"]["num_cut_short"] == 0
    assert (summary["env_steps"], summary["seed"], summary["interrupted"]) == (800, 3, False)
    assert summary["compile_seconds"] > 0
    assert summary["precision"] == "default"
    assert jax.devices()[0].platform in summary["device"]
    assert checkpoint.latest_step(out / "checkpoints") == 100
    loaded = driver.load(out, algorithm=fake, env=ENV)
    assert bits(loaded.state) == bits(result.state)


def test_without_a_folder_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run()
    assert result.out is None
    assert result.summary["evaluation"]["episode_return_mean"] == 5.0
    assert not list(tmp_path.iterdir())


def test_a_run_is_what_train_computes():
    result = run(seed=5)
    key = jax.random.fold_in(jax.random.key(5), loop.INIT)
    state, _ = jrl.train(result.algo, result.algo.init(key, result.hparams), result.hparams, num_steps=100)
    np.testing.assert_array_equal(state.params["w"], result.state.params["w"])
    assert jrl.ops.counter.to_int(result.state.env_steps) == 800
    assert bits(result.state) == bits(run(seed=5).state)
    assert bits(result.state) != bits(run(seed=6).state)


def test_chunks_do_not_depend_on_time_and_do_not_change_the_result(tmp_path, monkeypatch):
    assert driver.chunk_length(500_000, 2048) == 1
    assert driver.chunk_length(500_000, 10) == 250
    assert driver.chunk_length(10**10, 1024) == 256
    whole = run(env_steps=804)  # 101 steps: rounded up
    monkeypatch.setattr(driver, "NUM_CHUNKS", 7)
    chunked = run(tmp_path / "run", env_steps=804)
    assert bits(whole.state) == bits(chunked.state)
    rows = records.read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [14, 28, 42, 56, 70, 84, 98, 101]


def test_rows_are_reduced_as_summarize_does():
    from jrl.training import summarize

    metrics = {
        "num_episodes": np.array([0, 2, 1], np.float32),
        "episode_return": np.array([0, 3, 9], np.float32),
        "episode_return_min": np.array([0, 1, 9], np.float32),
        "episode_return_max": np.array([0, 5, 9], np.float32),
        "loss": np.array([1, 2, 6], np.float32),
    }
    expected = {name: float(value) for name, value in summarize(jax.tree.map(jnp.asarray, metrics)).items()}
    assert loop.reduce_rows(metrics) == pytest.approx(expected)
    none = loop.reduce_rows({name: values[:1] for name, values in metrics.items()})
    assert none["episode_return"] is None
    assert none["num_episodes"] == 0


def test_nothing_is_compiled_twice():
    traces = []

    def counted(env, config):
        algo = fake.make(env, config)

        def step(state, hparams):
            traces.append(1)
            return algo.step(state, hparams)

        return algo._replace(step=step)

    algo = counted(ENV, fake.Config())
    driver.run(algo, ENV, hparams=fake.HParams(), env_steps=8 * 997, eval_episodes=0, progress="none")
    assert len(traces) == 1  # to know the metrics and to compile; none for the shorter last chunk


def test_checkpoints_are_written_on_the_way_and_the_newest_kept(tmp_path):
    run(tmp_path / "run", checkpoint_every=160, checkpoint_seconds=None, keep=2)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [80, 100]
    run(tmp_path / "timed", checkpoint_seconds=0, keep=100)
    assert len(checkpoint.steps(tmp_path / "timed" / "checkpoints")) > 1


def test_values_given_as_integers_and_environment_parameters_reach_the_algorithm():
    result = run(hparams=fake.HParams(learning_rate=1, env={"reward": 2.0, "limit": 7}))
    assert result.hparams.learning_rate.dtype == jnp.float32
    assert result.hparams.env["limit"].dtype == jnp.int32
    assert not result.hparams.env["reward"].weak_type
    assert result.summary["evaluation"]["episode_return_mean"] == 10.0


# -------------------------------------------------------------------------------------------------- loggers


class Recorder:
    def __init__(self):
        self.rows, self.closed = [], 0

    def write(self, env_steps, metrics):
        self.rows.append((env_steps, dict(metrics)))

    def close(self):
        self.closed += 1


def test_loggers_are_given_every_chunk_and_closed(tmp_path):
    logger = Recorder()
    run(tmp_path / "run", loggers=[logger])
    assert logger.closed == 1
    assert [{"env_steps": steps, **row} for steps, row in logger.rows] == records.read_metrics(
        tmp_path / "run"
    )
    with pytest.raises(NonFiniteError):
        run(loggers=[logger], hparams={"nan_at": 3})
    assert logger.closed == 2


def test_a_resumed_run_writes_where_its_loggers_wrote(tmp_path, monkeypatch):
    """Also outside of the run folder, and into the W&B run of the id that was given."""
    tensorboard, wandb, opened = type(sys)("tensorboardX"), type(sys)("wandb"), []
    tensorboard.SummaryWriter = lambda folder, **_: (
        opened.append(os.path.normpath(folder)) or mock.MagicMock()
    )
    wandb.init = lambda dir, id, config, **_: (
        opened.append((os.path.normpath(dir), id, config)) or mock.MagicMock()
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out = tmp_path / "runs" / "a"
    mine = WandbLogger(tmp_path / "wb", config={"note": 1}, run_id="mine")
    run(
        out,
        loggers=[
            TensorBoardLogger(tmp_path / "tb"),
            mine,
            TensorBoardLogger(out / "tensorboard"),
            WandbLogger(out),
        ],
    )
    own = json.loads((out / "run.json").read_text())["id"]
    assert opened[1][2].items() >= {"note": 1, "seed": 0}.items()
    resume(out, 1608)
    places = [place[:2] if isinstance(place, tuple) else place for place in opened]
    assert places[:4] == [
        str(tmp_path / "tb"),
        (str(tmp_path / "wb"), "mine"),
        str(out / "tensorboard"),
        (str(out), own),
    ]
    assert places[4:] == places[:4]
    again = WandbLogger(tmp_path / "wb")
    for name in "bc":
        run(tmp_path / name, loggers=[again])  # one logger for two runs: each is a run of W&B's too
    assert opened[-1][1] != opened[-2][1]


# ------------------------------------------------------------------------------------------------ NaN


def test_nan_in_training_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    out = tmp_path / "run"
    message = (
        r"^loss is nan at env step 488 \(seed 3, learning_rate=0\.1\)\. Training stops at the first value .* "
        r"Lower learning_rate .* The checkpoint at env step 480 is from before and intact\.$"
    )
    with pytest.raises(NonFiniteError, match=message):
        run(out, seed=3, hparams={"nan_at": 60}, checkpoint_every=160, checkpoint_seconds=None)
    checkpoints = out / "checkpoints"
    assert checkpoint.latest_step(checkpoints) == 60
    like = jax.eval_shape(fake.make(ENV, fake.Config()).init, jax.random.key(0), fake.HParams())
    assert np.isfinite(checkpoint.restore(checkpoints, like).params["w"]).all()
    assert records.read_metrics(out)[-1]["env_steps"] == 480


def test_the_first_bad_step_within_a_chunk_is_named(monkeypatch):
    monkeypatch.setattr(driver, "NUM_CHUNKS", 4)
    with pytest.raises(NonFiniteError, match=r"loss is nan at env step 312 .* writes no checkpoints"):
        run(hparams={"nan_at": 38})


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    # NaN in the parameters of the very last step: no loss has seen it.
    with pytest.raises(NonFiniteError, match=r"params/w is nan at env step 800 .* No checkpoint had been"):
        run(tmp_path / "run", hparams={"nan_params_at": 99})
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


# ------------------------------------------------------------------------------------------------ resume


def test_a_finished_run_is_extended_bit_for_bit(tmp_path):
    out = tmp_path / "run"
    run(out, env_steps=800)
    assert resume(out).already_finished
    before = (out / "summary.json").read_text()
    assert resume(out, 800).already_finished
    assert (out / "summary.json").read_text() == before

    extended = resume(out, 1608)
    assert not extended.already_finished
    assert bits(extended.state) == bits(run(env_steps=1608).state)
    rows = records.read_metrics(out)
    assert [row["env_steps"] for row in rows] == list(range(8, 1609, 8))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert extended.summary["train_seconds"] > rows[99]["seconds"]
    assert json.loads((out / "run.json").read_text())["env_steps"] == 1608
    with pytest.raises(
        RunError, match=r"env_steps=16: the run in .* has already trained for 1608\. .* larger"
    ):
        resume(out, 16)


def test_a_run_with_the_cheap_generator_goes_on_with_it(tmp_path):
    out = tmp_path / "run"
    short = run(out, env_steps=800, prng="hashed")
    assert str(jax.random.key_impl(short.state.key)) == ops.keys.NAME
    assert json.loads((out / "run.json").read_text())["prng"] == "hashed"
    extended, whole = resume(out, 1608), run(env_steps=1608, prng="hashed")
    assert bits(extended.state) == bits(whole.state)
    assert bits(whole.state) != bits(run(env_steps=1608).state)
    loaded = driver.load(out, algorithm=fake, env=ENV)
    assert bits(loaded.state) == bits(whole.state)


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    out = tmp_path / "run"
    expected = run(out, checkpoint_every=400, checkpoint_seconds=None)
    rows = records.read_metrics(out)
    # As after a kill: the last checkpoint gone, more lines than it has, the last of them cut short.
    checkpoint._discard(out / "checkpoints" / f"{100:012d}")
    (out / "summary.json").unlink()
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"env_steps": 808, "lo')
    resumed = resume(out)
    assert bits(resumed.state) == bits(expected.state)
    again = records.read_metrics(out)
    assert again[:50] == rows[:50]
    timing = {"seconds", "env_steps_per_second"}
    for a, b in zip(rows, again, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path):
    out = tmp_path / "run"
    expected = run(out, checkpoint_every=400, checkpoint_seconds=None)
    (out / "checkpoints" / f"{100:012d}" / "metadata.json").write_text("garbage")
    with pytest.warns(
        UserWarning, match=r"000000000100 is corrupt: .* step in \[50\]\. Going on from step 50"
    ):
        resumed = resume(out)
    assert bits(resumed.state) == bits(expected.state)
    for step in (50, 100):
        (out / "checkpoints" / f"{step:012d}" / "metadata.json").write_text("garbage")
    with pytest.raises(CheckpointError, match="000000000100 is corrupt"):
        resume(out)


def test_a_run_without_a_checkpoint_starts_over(tmp_path):
    out = tmp_path / "run"
    expected = run(out)
    checkpoint._discard(out / "checkpoints" / f"{100:012d}")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint yet\. .* jrl resume"):
        driver.load(out, algorithm=fake, env=ENV)
    assert bits(resume(out).state) == bits(expected.state)


def test_a_run_of_objects_needs_them_again(tmp_path):
    run(tmp_path / "run", eval_episodes=0)
    with pytest.raises(RunError, match=r"given its algorithm \(fake_algorithm\) as an object, .* algorithm="):
        driver.resume(tmp_path / "run")
    with pytest.raises(RunError, match=r"given its environment \(Fake-v0\) as an object, .* env="):
        driver.resume(tmp_path / "run", algorithm=fake)
    algo = fake.make(ENV, fake.Config())
    out = tmp_path / "ready-made"
    hparams = fake.HParams(learning_rate=0.3)
    driver.run(algo, ENV, hparams=hparams, env_steps=80, out=out, eval_episodes=0, progress="none")
    more = driver.resume(out, 160, algorithm=algo, env=ENV, hparams=fake.HParams(), progress="none")
    assert float(more.hparams.learning_rate) == pytest.approx(0.3)
    with pytest.raises(TypeError, match=r"ready-made Algorithm is run with its own hparams"):
        driver.run(algo, ENV, env_steps=80)


def test_another_version_is_told(tmp_path):
    out = tmp_path / "run"
    run(out, eval_episodes=0)
    record = json.loads((out / "run.json").read_text())
    record["versions"]["jax"] = "0.1"
    records.write_json(out / "run.json", record)
    with pytest.warns(RunWarning, match=rf"other versions \(jax 0\.1 -> {jax.__version__}\)"):
        resume(out)
    record["versions"] |= {"jax": jax.__version__, "compiler": "quick"}
    records.write_json(out / "run.json", record)
    with pytest.warns(RunWarning, match=r"other versions \(compiler quick -> full\)"):
        resume(out)
    del record["versions"]["compiler"]  # of a run from before there was a choice
    records.write_json(out / "run.json", record)
    resume(out)
    record["hparams"]["new"] = 1.0
    records.write_json(out / "run.json", record)
    with pytest.raises(RunError, match=r"hyperparameters in run\.json are not those of this version: new"):
        resume(out)


# ---------------------------------------------------------------------------------------- interruption


class Interrupt(Recorder):
    """Sends this process a signal as soon as the first chunk is logged."""

    def __init__(self, number=signal.SIGINT):
        super().__init__()
        self.number = number

    def write(self, env_steps, metrics):
        if not self.rows:
            signal.raise_signal(self.number)
        super().write(env_steps, metrics)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_is_continued_bit_for_bit(tmp_path, number):
    out = tmp_path / "run"
    handler = signal.getsignal(number)
    result = run(out, loggers=[Interrupt(number)])
    assert signal.getsignal(number) is handler
    assert result.interrupted
    assert result.summary["evaluation"] is None
    trained = result.summary["env_steps"]
    assert 8 <= trained <= 24
    assert checkpoint.latest_step(out / "checkpoints") == trained // 8
    assert records.read_summary(out)["interrupted"] is True
    resumed = resume(out)
    assert not resumed.interrupted
    assert records.read_summary(out)["interrupted"] is False
    assert bits(resumed.state) == bits(run().state)


def test_a_second_interrupt_aborts_at_once(tmp_path):
    class Twice(Recorder):
        def write(self, env_steps, metrics):
            super().write(env_steps, metrics)
            if env_steps == 400:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    logger = Twice()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", loggers=[logger], checkpoint_every=160, checkpoint_seconds=None)
    assert logger.closed == 1
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints") == 40
    assert bits(resume(tmp_path / "run").state) == bits(run().state)


def test_in_another_thread_signals_are_left_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(eval_episodes=0)))
    thread.start()
    thread.join()
    assert results[0].summary["env_steps"] == 800


def test_waiting_handles_signals_in_small_naps():
    class Slow:
        until = time.monotonic() + 0.2

        def is_ready(self):
            return time.monotonic() > self.until

    said = []
    stop = interrupt.StopRequest(said.append)
    stop.requested = True
    interrupt.wait([Slow()], stop)
    assert said == ["stopping after this chunk; press Ctrl-C again to abort at once"]
    Slow.until = time.monotonic() + 100
    interrupt.wait([Slow()], stop, leave_early=True)


# ---------------------------------------------------------------------------------------------- bad input


def test_a_used_folder_is_refused_and_overwrite_replaces_it(tmp_path):
    out = tmp_path / "run"
    run(out, eval_episodes=0)
    (out / "wandb" / "run-1").mkdir(parents=True)
    before = (out / "run.json").read_text()
    with pytest.raises(
        RunError, match=rf"run folder {out} already holds a run\. .* `jrl resume {out}`, .*--over"
    ):
        run(out)
    assert (out / "run.json").read_text() == before
    run(out, seed=9, overwrite=True, env_steps=80, eval_episodes=0)
    assert json.loads((out / "run.json").read_text())["seed"] == 9
    assert len(records.read_metrics(out)) == 10
    assert checkpoint.steps(out / "checkpoints") == [10]
    assert not (out / "wandb").exists()


def test_a_run_that_another_process_ends_meanwhile_is_not_lost(tmp_path, monkeypatch):
    build = configuration.build

    def slowly(*args, **kwargs):
        monkeypatch.setattr(configuration, "build", build)
        run(tmp_path, eval_episodes=0)  # as another process may, while this one builds
        return build(*args, **kwargs)

    monkeypatch.setattr(configuration, "build", slowly)
    with pytest.raises(RunError, match="already holds a run"):
        run(tmp_path, seed=9)
    assert records.read_run(tmp_path)["seed"] != 9
    assert records.read_summary(tmp_path)["env_steps"] == 800


def test_a_folder_of_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        RunError, match=r"is not empty and holds no run \(found thesis\.tex\)\. .* another path"
    ):
        run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "run"):
        with pytest.raises(RunError, match=rf"run folder {path} cannot be made: {file} is not a folder\."):
            run(path)
    with pytest.raises(
        RunError, match=r"run folder /proc/nothing cannot be written to: .*choose a path that"
    ):
        run("/proc/nothing")


def test_a_failure_before_the_first_chunk_leaves_the_folder_free(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"env_steps=80: the warm-up alone takes 100 .* pass more env_steps"):
        run(out, env_steps=80, config={"warmup": 100})
    result = run(out, env_steps=180, config={"warmup": 100}, eval_episodes=0)
    assert result.summary["env_steps"] == 180
    assert len(records.read_metrics(out)) == 10


def test_a_folder_in_use_is_refused(tmp_path):
    out = tmp_path / "run"
    run(out, eval_episodes=0)
    with (
        records.locked(out),
        pytest.raises(RunError, match=r"is in use by another process\. Only one may write"),
    ):
        resume(out, 1600)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"env_steps": 0}, ValueError, r"env_steps=0: must be at least 1"),
        ({"env_steps": 1e5}, TypeError, r"env_steps=100000\.0: expected an integer"),
        ({"seed": -1}, ValueError, r"seed=-1: must be at least 0"),
        ({"seed": 2**32}, ValueError, r"seed=4294967296: must be below 2\*\*32"),
        ({"keep": 0}, ValueError, r"keep=0: must be at least 1"),
        ({"checkpoint_every": 0}, ValueError, r"checkpoint_every=0: must be at least 1"),
        (
            {"checkpoint_seconds": -1},
            ValueError,
            r"checkpoint_seconds=-1: must be finite and at least 0, or None",
        ),
        (
            {"checkpoint_seconds": math.nan},
            ValueError,
            r"checkpoint_seconds=nan: must be finite and at least",
        ),
        ({"config": {"num_env": 3}}, ValueError, r"config has no field 'num_env'\. Nearest: num_envs\. "),
        ({"config": {"num_envs": 0}}, ValueError, r"num_envs=0: must be at least 1\."),
        ({"config": 3}, TypeError, r"config=3: expected a Config, a mapping"),
        ({"hparams": {"lr": 3}}, ValueError, r"hparams has no field 'lr'\. Its fields are: .*learning_rate"),
        ({"hparams": {"learning_rate": "high"}}, TypeError, r"learning_rate='high' is not a number"),
        ({"prng": "rbg"}, ValueError, r"prng='rbg': expected threefry or hashed\."),
        ({"progress": "dots"}, ValueError, r"progress='dots': expected one of \['bar', 'lines', 'none'\]"),
    ],
)
def test_bad_values_are_named(change, error, message):
    with pytest.raises(error, match=message):
        run(**change)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown algorithm 'pppo'\. Nearest: ppo, grpo\. "):
        driver.run("pppo", ENV, env_steps=8)
    with pytest.raises(ValueError, match=r"Unknown environment id 'CartPol-v1'\. Nearest: CartPole-v1"):
        driver.run(fake, "CartPol-v1", env_steps=8)
    with pytest.raises(TypeError, match=r"has no make, Config, HParams\. Pass one of the names"):
        driver.run(3, ENV, env_steps=8)


def test_overwriting_leaves_nothing_of_a_sweep_and_all_that_is_not_ours(tmp_path):
    inner = tmp_path / "num_envs=2"
    other = tmp_path / "mine=1"  # a sub-folder that holds no sweep
    for folder in (inner, other):
        folder.mkdir()
    table = make_table({"learning_rate": [0.1, 0.2], "env.length": [1.0, 2.0]}, seeds=2)
    for folder in (tmp_path, inner):
        table.to_csv(folder / "table.csv")
        assert len(sweep_plots.figures(table, folder)) == 5
    for path in (tmp_path / "groups.json", inner / "sweep.json", inner / "metrics.jsonl", inner / ".lock"):
        path.touch()
    ours = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")]
    assert len(ours) == 10
    kept = ["notes.txt", "sensitivity_mine.png", "mine=1/notes.txt"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    run(tmp_path, env_steps=80, overwrite=True)
    assert not [path for path in ours if (tmp_path / path).exists()]
    assert [(tmp_path / name).read_text() for name in kept] == ["mine"] * 3
    names = {"run.json", "metrics.jsonl", "checkpoints", "learning_curve.png", "summary.json", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == names | {
        "notes.txt",
        "sensitivity_mine.png",
        "mine=1",
    }


def test_the_commands_that_are_named_can_be_pasted(tmp_path):
    out = tmp_path / "a b $ü"
    text = progress.report(run(out, env_steps=80).summary, out)
    more = next(line for line in text.splitlines() if line.startswith("more"))
    words = shlex.split(more)
    assert [words[i + 2] for i, word in enumerate(words) if word == "jrl"] == [str(out)] * 3
    text = progress.report({**records.read_summary(out), "interrupted": True}, out)
    assert shlex.split(text.partition("continue with: ")[2]) == ["jrl", "resume", str(out)]
    with pytest.raises(RunError) as raised:
        run(out)
    assert f"`jrl resume {shlex.quote(str(out))}`" in str(raised.value)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json\. A run folder is what"):
        driver.resume(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"does not say format 'jrl-run-1': something else wrote it"):
        driver.resume(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        driver.resume(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"env_steps": 1}\n{"a"\n{"env_steps": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        records.read_metrics(tmp_path)


def test_what_a_file_of_the_folder_no_longer_says_is_named(tmp_path):
    def wrong(file, text, message):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text)
        for read in (resume, tables.read):
            with pytest.raises(RunError, match=message):
                read(tmp_path)
        (tmp_path / file).write_text(before)

    run(tmp_path, env_steps=80)
    damaged = ((tmp_path / records.RUN).read_text()).replace('"seed": 0', '"seed": "0"')
    for text, message in (
        ('{"a": 1}', r"summary\.json does not say env_steps: .* Delete it and resume the run"),
        (
            '{"env_steps": 80, "interrupted": "no"}',
            r'summary\.json says interrupted = "no", which jrl does not',
        ),
        ("[]", r"summary\.json is not a JSON object: it holds \[\]"),
        ("3", r"summary\.json is not a JSON object: it holds 3"),
    ):
        wrong("summary.json", text, message)
    for text, message in (
        (
            '{"format": "jrl-run-1"}',
            r"run\.json does not say algorithm\.name: .* Put it back as jrl wrote it",
        ),
        ('{"format": "jrl-run-1", "algorithm": 3}', r"run\.json does not say algorithm\.name"),
        (damaged, r'run\.json says seed = "0", which jrl does not write'),
    ):
        wrong("run.json", text, message)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"env_steps": null}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 1 is not .* env_steps a number; found null"):
        resume(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert resume(tmp_path).summary["env_steps"] == 80


def test_a_run_longer_than_its_annealing_is_told():
    setup = configuration.build("ppo", "CartPole-v1", hparams={"anneal_env_steps": 1000.0})
    with pytest.warns(RunWarning, match="learning rate is 0 from env step 1,000 on, and the run has 5,000"):
        driver._warn_of_zero_step_size(setup, 5000)
    driver._warn_of_zero_step_size(setup, 1000)  # no warning: those are errors here
    constant = configuration.build("ppo", "CartPole-v1", hparams={"anneal_env_steps": 0.0})
    driver._warn_of_zero_step_size(constant, 5000)


def test_a_folder_that_may_only_be_read_is_not_begun_with(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    what = f"run folder {tmp_path} cannot be written to: no permission. Copy it"
    with pytest.raises(RunError, match=what), records.locked(tmp_path):
        pass


def test_a_full_disk_says_what_is_intact_and_how_to_go_on(tmp_path, monkeypatch):
    out = tmp_path / "a run"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunError, match=rf"No space left on device.*intact; make room.*jrl resume '{out}'$"):
        run(out)
