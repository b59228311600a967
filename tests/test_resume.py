"""Runs that are killed and interrupted in processes of their own, and continued to the same bits."""

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time

import fake_algorithm as fake
import numpy as np
import pytest

import jrl
from jrl import checkpoint, cli, driver, records, xla

PPO = {
    "num_envs": 2, "unroll_length": 8, "num_minibatches": 2, "num_epochs": 1, "hidden_sizes": (4,),
    "normalize_observations": True, "normalize_rewards": True,
}  # fmt: skip
DQN = {
    "num_envs": 2, "batch_size": 8, "capacity": 64, "warmup_env_steps": 16, "hidden_sizes": (4,),
    "prioritized": True, "n_step": 2,
}  # fmt: skip


def as_flags(config):
    flags = []
    for name, value in config.items():
        flag = f"--{name.replace('_', '-')}"
        flags += (
            [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
        )
    return flags


def start(*args, **kwargs):
    return subprocess.Popen([sys.executable, "-m", "jrl", *map(str, args)], env=fake.environ(), **kwargs)


def final_bits(out):
    loaded = driver.load(out)
    return {path: array.tobytes() for path, array in checkpoint.snapshot(loaded.state).arrays.items()}


def untimed(out):
    timing = {"seconds", "env_steps_per_second"}
    return [{k: v for k, v in row.items() if k not in timing} for row in records.read_metrics(out)]


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    steps = 16 * 1500
    reference = tmp_path / "reference"
    result = jrl.run(
        "ppo", "CartPole-v1", config=PPO, env_steps=steps, seed=1, out=reference, eval_episodes=2,
        progress="none",
    )  # fmt: skip
    out = tmp_path / "run"
    # A checkpoint every 112 steps, one chunk: most of the time goes into saving, and most kills hit a save.
    train = ["train", "ppo", "--env", "CartPole-v1", "--env-steps", steps, "--seed", 1, "--out", out]
    train += [*as_flags(PPO), "--eval-episodes", 2, "--checkpoint-every", 112]
    randomness = random.Random(os.urandom(8))
    done = 0
    for args in (train, ["resume", out], ["resume", out]):
        process = start(*args, stdout=subprocess.DEVNULL)
        # at least one checkpoint further than before
        wait_for(lambda done=done: (checkpoint.latest_step(out / "checkpoints") or 0) > done, process)
        time.sleep(randomness.uniform(0, 0.15))
        process.kill()
        process.wait()
        done = checkpoint.latest_step(out / "checkpoints")
        checkpoint.verify(out / "checkpoints", done)
    assert done < 1500
    # what remains is saved once only, and in this process: the rest of the test is quicker
    record = records.read_run(out)
    records.write_json(out / "run.json", {**record, "checkpoint_every": None})
    resumed = jrl.resume(out, progress="none")
    assert final_bits(out) == final_bits(reference)
    assert untimed(out) == untimed(reference)
    assert resumed.summary["evaluation"] == result.summary["evaluation"]
    assert not list((out / "checkpoints").glob(".*"))
    np.testing.assert_array_equal(resumed.state.env_steps, result.state.env_steps)


def read_until(terminal, pattern, seconds=120):
    """Read a terminal until ``pattern`` (or, with None, the end of the process) comes."""
    seen, deadline = b"", time.monotonic() + seconds
    while pattern is None or pattern not in seen:
        assert time.monotonic() < deadline, seen.decode()
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                block = os.read(terminal, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                block = b""
            if not block:
                assert pattern is None, seen.decode()
                break
            seen += block
    return seen


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_ctrl_c_on_a_terminal_saves_and_resume_ends_in_the_same_bits(tmp_path):
    out, steps = tmp_path / "run", 2_000_000
    controller, terminal = pty.openpty()
    process = start(
        "train", "dqn", "--env", "CartPole-v1", "--env-steps", steps, "--out", out, *as_flags(DQN),
        "--eval-episodes", 2,
        stdout=terminal, stderr=terminal, stdin=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    shown = read_until(controller, b"steps/s")
    process.send_signal(signal.SIGINT)
    shown += read_until(controller, None)
    os.close(controller)
    assert process.wait(60) == 130
    for words in (b"training", b"%", b"return", b"stopping after this chunk", b"jrl resume"):
        assert words in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"] is True
    trained = summary["env_steps"]
    assert 16 < trained < steps

    # Two more chunks, here; against the same total in one go.
    record = records.read_run(out)
    chunk = record["chunk_length"] * record["env_steps_per_step"]
    total = trained + 2 * chunk
    records.write_json(out / "run.json", {**record, "env_steps": total})
    jrl.resume(out, progress="none")
    assert len(records.read_metrics(out)) == (total - 16) // chunk
    whole = tmp_path / "whole"
    jrl.run("dqn", "CartPole-v1", config=DQN, env_steps=total, out=whole, eval_episodes=2, progress="none")
    assert final_bits(out) == final_bits(whole)


def test_what_begins_a_run_over_another_compiles_as_it_is_told(tmp_path):
    out = tmp_path / "run"
    common = {"config": PPO, "env_steps": 64, "eval_episodes": 0, "progress": "none"}
    jrl.run("ppo", "CartPole-v1", out=out, **common)
    record = json.loads((out / "run.json").read_text())
    record["versions"]["compiler"] = "quick"
    (out / "run.json").write_text(json.dumps(record))
    for args, quick in [
        (["resume", out], True),
        (["eval", out], True),
        (["sweep", "ppo", f"--out={out}", "--resume"], True),
        (["train", "ppo", "--out", out, "--overwrite"], False),
        (["train", "grpo", "--model", out], False),
        (["distill", out], False),
        (["train", "ppo", "--out", out, "--overwrite", "--quick-compile"], True),
    ]:
        environ = {}
        cli._configure([str(arg) for arg in args], environ)
        assert xla.compiles_quickly(environ) == quick, args


def test_what_goes_on_with_a_run_compiles_as_the_run_did(tmp_path):
    out = tmp_path / "run"
    args = ["train", "ppo", "--env", "CartPole-v1", *as_flags(PPO), "--eval-episodes", "2", "--out", out]
    for command in ([*args, "--env-steps", "64", "--quick-compile"], ["resume", out, "--env-steps", "128"]):
        process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "warning" not in errors
        assert json.loads((out / "summary.json").read_text())["versions"]["compiler"] == "quick"
    assert records.read_run(out)["versions"]["compiler"] == "quick"
