"""The benchmarks at toy size: that they run, and that their records say what a record must say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import against_peers  # noqa: E402
import env_stepping  # noqa: E402
import learning  # noqa: E402
import throughput  # noqa: E402

TOY_DQN = throughput.Work(
    "dqn", env_steps=200, num_envs=4, unroll_length=1, batch_size=8, capacity=100, warmup_env_steps=40
)
MACHINE = {"python", "jax", "jaxlib", "gymnax", "device", "cpu", "matmul_precision", "cores", "NPROC"}

# Learns nothing, has the interface: a TrainState-like record first in runner_state.
FAKE_PEER = """
import jax, jax.numpy as jnp
import wandb
from brax.envs.wrappers.training import AutoResetWrapper
from flax import struct

print("a peer may print")

@struct.dataclass
class Learned:
    params: jax.Array
    apply_fn: object = struct.field(pytree_node=False)

class Policy:
    def __init__(self, logits):
        self.logits = logits

def apply(params, obs):
    return Policy(obs @ params), obs.sum(-1)

def make_train(config):
    updates = config["TOTAL_TIMESTEPS"] // config["NUM_ENVS"] // config["NUM_STEPS"]
    assert config["LR"] == 2.5e-4
    def train(key):
        params = jax.random.normal(key, (4, 2))
        params = jax.lax.fori_loop(0, updates, lambda _, p: jnp.tanh(p), params)
        return {"runner_state": (Learned(params, apply), key), "metrics": {}}
    return train
"""


@pytest.fixture(autouse=True)
def _package_on_the_path(monkeypatch):
    # The workers are scripts in benchmarks/: they need not be started from the checkout.
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))


def test_spread_is_relative_to_the_median():
    assert throughput.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {
        "median": 3.0,
        "iqr": 0.6667,
        "min": 1.0,
        "max": 5.0,
    }
    assert throughput.spread([7.0]) == {"median": 7.0, "iqr": 0.0, "min": 7.0, "max": 7.0}


def test_throughput_records_every_repeat():
    work = TOY_DQN  # PPO is what the comparison below trains
    record = throughput.measure_training(work, repeats=2)
    assert record["benchmark"] == work.algorithm
    assert [row["seed"] for row in record["repeats"]] == [1, 2]
    for row in record["repeats"]:
        rate = work.env_steps / row["seconds"]
        assert row["env_steps_per_second"] == pytest.approx(rate, rel=1e-2)
    assert record["compile_seconds"] > 0
    assert set(record["machine"]) >= MACHINE
    assert 1 <= record["episode_return"]["median"] <= 500
    json.dumps(record, allow_nan=False)


def test_env_steps_that_would_not_be_equal_are_refused():
    with pytest.raises(ValueError, match=r"env_steps=250: must exceed the warm-up of 0 by a multiple of 64"):
        throughput.build(throughput.Work("ppo", env_steps=250, num_envs=4, unroll_length=16))


def test_the_capacity_record_compares_pairs_and_shows_no_copy_of_the_replay():
    record = throughput.measure_capacity(TOY_DQN, [100, 20_000], steps=3, repeats=2, fill=True)
    assert record["warmup_env_steps"] == [100, 20_000]
    assert len(record["pairs"]) == len(record["cpu_pairs"]) == 2
    small, large = record["pairs"][0]
    assert record["ratio"]["min"] <= large / small * 1.001
    small, large = record["temporary_bytes"]
    assert large - small < record["replay_bytes"][1] / 10


def test_env_stepping_compares_equal_work_in_turn():
    record = env_stepping.measure(env_stepping.Stepping("CartPole-v1", num_envs=8, env_steps=2_000), pairs=2)
    assert record["work"] == {"env": "CartPole-v1", "num_envs": 8, "env_steps": 2_000}
    assert [row["seed"] for row in record["pairs"]] == [1, 2]
    for row in record["pairs"]:
        assert row["ratio"] == pytest.approx(row["gymnax"]["seconds"] / row["jrl"]["seconds"], rel=0.05)
    for episodes in record["episodes"].values():
        assert 15 < 2 * 2_000 / episodes < 35  # random play keeps the pole up for 22 steps
    assert set(record["machine"]) >= MACHINE
    json.dumps(record, allow_nan=False)


def run_script(*arguments, tmp_path):
    command = [sys.executable, str(FOLDER / arguments[0]), *map(str, arguments[1:]), "--out", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=200)


def test_the_alternating_comparison_with_a_fake_peer(tmp_path):
    peer = tmp_path / "clone" / "purejaxrl" / "ppo.py"
    peer.parent.mkdir(parents=True)
    peer.write_text(FAKE_PEER)
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    toy = ["--env-steps", 256, "--num-envs", 4, "--unroll-length", 16, "--num-minibatches", 2]
    out = run_script(
        "against_peers.py",
        "purejaxrl-ppo",
        "--peer-path",
        tmp_path / "clone",
        "--pairs",
        2,
        "--core",
        core,
        *toy,
        tmp_path=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert "its speed" in out.stdout
    (line,) = (tmp_path / "peers-purejaxrl-ppo.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["benchmark"] == "peers-purejaxrl-ppo"
    assert [row["jrl"]["seed"] for row in record["pairs"]] == [1, 2]
    assert [row["peer"]["seed"] for row in record["pairs"]] == [1, 2]
    for row in record["pairs"]:
        assert row["ratio"] == pytest.approx(row["peer"]["seconds"] / row["jrl"]["seconds"], abs=1e-4)
    for side in ("jrl", "peer"):
        assert 1 <= record[side]["episode_return"]["median"] <= 500
        assert record[side]["compile_seconds"] > 0
        assert record[side]["machine"]["jax"]
        assert record[side]["machine"]["cores"] in (None, [core])
    assert record["jrl"]["machine"]["NPROC"] == record["peer"]["machine"]["NPROC"]
    assert record["work"]["env_steps"] == 256
    assert str(tmp_path) not in line


def test_a_peer_that_fails_says_so_and_writes_no_record(tmp_path):
    peer = tmp_path / "purejaxrl" / "dqn.py"
    peer.parent.mkdir()
    peer.write_text("raise ImportError('a package the peer needs')")
    # No jrl in that process either: the peer's worker is asked directly.
    job = {"peer": "purejaxrl-dqn", "file": str(peer), "work": {}}
    with pytest.raises(SystemExit, match="purejaxrl-dqn: it ended with exit status 1"):
        against_peers.Worker("purejaxrl-dqn", sys.executable, job, dict(os.environ), limit=100)
    out = run_script("against_peers.py", "purejaxrl-ppo", "--peer-path", tmp_path, tmp_path=tmp_path)
    assert out.returncode != 0
    assert "it has no purejaxrl/ppo.py; pass a clone of the peer" in out.stderr
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_worker_that_does_not_answer_is_stopped(tmp_path):
    peer = tmp_path / "slow.py"
    peer.write_text("import time; time.sleep(1000)")
    job = {"peer": "purejaxrl-dqn", "file": str(peer), "work": {}}
    with pytest.raises(SystemExit, match="slow: no answer within 1 s"):
        against_peers.Worker("slow", sys.executable, job, dict(os.environ), limit=1)


def test_learning_writes_a_curve_for_each_seed(tmp_path, monkeypatch):
    # Chunks of one step of 2,048 steps each would take long to compile anew for every seed: one seed, tiny.
    row = learning.Row(
        "ppo", "CartPole-v1", 512, 495.0, config={"num_envs": 4, "unroll_length": 16, "num_minibatches": 2}
    )
    monkeypatch.setitem(learning.ROWS, "toy", row)
    monkeypatch.setattr(learning, "CURVE_POINTS", 2)
    monkeypatch.setattr(sys, "argv", ["learning.py", "toy", "--seeds", "1", "--out", str(tmp_path)])
    learning.main()
    record = json.loads((tmp_path / "learning-toy.json").read_text())
    assert record["seeds"] == len(record["records"]) == 1
    assert record["records"][0]["curve"][-1][0] == 512
    assert record["records"][0]["episodes_completed"] == 100
    assert 1 <= record["iqm"] <= 500
