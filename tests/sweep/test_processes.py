"""A sweep over several processes equals one process, also after one of them is killed."""

import os
import re
import socket
import subprocess
import sys
import time

import fake_algorithm as fake
import pytest

from jrl import checkpoint, sweep

ARGS = [
    "sweep",
    "ppo",
    "--num-envs",
    "2",
    "--unroll-length",
    "8",
    "--num-minibatches",
    "2",
    "--num-epochs",
    "1",
]
ARGS += [
    "--hidden-sizes",
    "4",
    "--env",
    "CartPole-v1",
    "--grid",
    "learning_rate=1e-3,1e-2,1e6",
    "--seeds",
    "2",
]
# what the collectives' library prints piece by piece, from several threads at once
GLOO = r"\[Gloo\] Rank |\d+|is connected to | peer ranks\. |Expected number of connected peer ranks is : |\s"
NUM_STEPS = 40
ARGS += ["--env-steps", str(16 * NUM_STEPS), "--eval-episodes", "2", "--devices", "2", "--progress", "none"]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(*args):
    environ = fake.environ(XLA_FLAGS="")
    environ.pop("NPROC", None)  # for eight devices
    command = [sys.executable, "-m", "jrl", *ARGS, *map(str, args)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(*args):
    port = free_port()
    together = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2]
    return [start(*args, *together, "--process-id", index) for index in range(2)]


def finish(*processes):
    said = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    finish(start("--out", out))
    return out


def members_of(folder):
    found = []
    for member in range(6):
        state = sweep.load(folder, member).state
        arrays = checkpoint.snapshot(state).arrays
        found.append({path: array.tobytes() for path, array in arrays.items()})
    return found


def test_two_processes_of_two_devices_are_one_of_two_bit_for_bit(whole, tmp_path):
    out = tmp_path / "two"
    first, second = finish(*start_two("--out", out, "--progress", "lines"))
    assert "6 on 4 devices" in first
    assert "3 settings, 6 members" in first
    assert re.sub(GLOO, "", second) == ""  # only the first one speaks
    assert (out / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert members_of(out) == members_of(whole)


def test_a_killed_process_and_a_restart_change_nothing(whole, tmp_path):
    out = tmp_path / "killed"
    args = ["--out", out, "--resume", "--checkpoint-seconds", 0.01]
    processes = start_two(*args)
    deadline = time.monotonic() + 240
    while not checkpoint.latest_step(out / "checkpoints"):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].kill()
    # the first one waits for it until jax gives up; a scheduler ends the job
    time.sleep(0.5)
    processes[0].kill()
    for process in processes:
        process.communicate()
    saved = checkpoint.latest_step(out / "checkpoints")
    checkpoint.verify(out / "checkpoints", saved)
    assert not (out / "table.csv").exists()
    assert saved < NUM_STEPS
    # begun again by two, and then to the end
    finish(*start_two(*args[:3]))
    assert (out / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert members_of(out) == members_of(whole)


def test_bad_input_ends_all_of_them():
    processes = start_two("--grid", "learnig_rate=1", "--out", os.devnull)
    said = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "no hyperparameter 'learnig_rate'" in said[0]
