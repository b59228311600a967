"""The benchmarks at toy size: that they run, and that their records say what a record must say."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import xla
from jrl.language.rewards import Text

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import ablations  # noqa: E402
import against_peers  # noqa: E402
import decoding  # noqa: E402
import env_stepping  # noqa: E402
import fake_algorithm  # noqa: E402
import floor  # noqa: E402
import hang  # noqa: E402
import ladder  # noqa: E402
import ladder_applications  # noqa: E402
import ladder_poems  # noqa: E402
import learning  # noqa: E402
import meta_learning  # noqa: E402
import peers  # noqa: E402
import search  # noqa: E402
import sweep_memory  # noqa: E402
import tabular  # noqa: E402
import throughput  # noqa: E402
import token_envs  # noqa: E402
from peers import ours, protocol, purejaxrl, sbx  # noqa: E402

TOY_DQN = throughput.Work(
    "dqn", env_steps=200, num_envs=4, unroll_length=1, batch_size=8, capacity=100, warmup_env_steps=40
)
MACHINE = {"python", "jax", "jaxlib", "gymnax", "device", "cpu", "matmul_precision", "cores", "NPROC"}

# Learns nothing, has PureJaxRL's interface: a TrainState-like record first in runner_state, a log of episodes.
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
        returns = jnp.arange(updates, dtype=float)[:, None, None] * jnp.ones((1, config["NUM_STEPS"], 1))
        metrics = {"returned_episode_returns": returns, "returned_episode": returns % 2 == 1}
        return {"runner_state": (Learned(params, apply), key), "metrics": metrics}
    return train
"""
TOY_PPO = {"env_steps": 256, "num_envs": 4, "unroll_length": 16, "num_minibatches": 2}


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


def test_tabular_counts_every_update_and_learns():
    work = tabular.Learning(planning_updates=2, learners=6, batch=3, unroll_length=16, env_steps=4_000)
    assert work.updates == 6 * 41 * 16 * 3
    record = tabular.measure(work, repeats=2)
    assert len(record["repeats"]) == 2
    assert record["updates_per_second"]["median"] > 0
    assert record["work"]["batch"] == 3
    # Learned over three repeats: with γ = 0.9 the start is worth 0.9⁵.
    assert abs(record["start_value"] - 0.59049) < 0.2


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


def test_throughput_is_recorded_where_all_returns_are_zero():
    record = throughput.measure_training(dataclasses.replace(TOY_DQN, env="DeepSea-bsuite"), repeats=1)
    assert set(record["episode_return"]) == {"median", "min", "max"}
    assert record["episode_return"]["median"] <= 0.01


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


def test_the_prioritized_record_compares_pairs():
    record = throughput.measure_prioritized(TOY_DQN, steps=3, repeats=2, fill=True)
    assert record["benchmark"] == "dqn-prioritized"
    assert record["warmup_env_steps"] == 100
    uniform, prioritized = record["pairs"][0]
    assert record["ratio"]["min"] <= prioritized / uniform * 1.001
    uniform, prioritized = record["replay_bytes"]
    assert prioritized > uniform  # by its sum tree
    json.dumps(record, allow_nan=False)


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


def test_decoding_compares_equal_work_in_turn():
    record = decoding.measure(decoding.Decoding(batch=128, tokens=3), pairs=1)
    assert set(record["tokens_per_second"]) == set(record["compile"]) == {"ours", "stacked", "cacheless"}
    (row,) = record["pairs"]
    # All sample the same distribution: means of log-probabilities agree but for chance.
    means = [row[side]["log_prob"] for side in decoding.SIDES]
    assert max(means) - min(means) < 0.05
    assert -6.5 < means[0] < -6  # a new model is nearly uniform over 512 tokens
    json.dumps(record, allow_nan=False)


def test_a_search_is_judged_by_the_grid(tmp_path):
    arguments = search.parse(["--rates", "9", "--grid-seeds", "2", "--seeds", "1", "--searches", "2"])
    arguments.algo, arguments.env = fake_algorithm.Ranked, fake_algorithm.environment()
    arguments.env_steps, arguments.eval_episodes = 8 * 60, 0
    record = search.compare(arguments)
    rates = record["learning_rates"]
    assert (rates[0], rates[-1]) == (search.LOW, search.HIGH)
    assert [interval[0] for interval in record["grid"]] == pytest.approx(rates)  # returns are learning rates
    for found in record["searches"]:
        assert (found["learning_rate"], found["rank_in_grid"], found["found"]) == (search.HIGH, 1, True)
        assert found["env_steps"] == [8 * 7] * 6 + [8 * 20] * 2 + [8 * 60]  # rungs at 1/9 and 1/3
        assert found["share_of_steps"] == pytest.approx((6 * 7 + 2 * 20 + 60) / (9 * 60))
    assert record["found"] == 2
    json.dumps(record, allow_nan=False)
    work = {"algo": "ranked", "env": "fake", "env_steps": 8 * 60}
    search.draw({"work": work, **record}, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_texts_side_by_side_are_written_and_learned_from():
    work = token_envs.Texts(num_envs=(16,), tokens=3, vocab_size=16, num_layers=1, width=16)
    record = token_envs.measure(work, repeats=2)
    write, learn = record["rows"]
    assert (write["side"], learn["side"]) == token_envs.SIDES
    assert write["tokens"] == learn["tokens"] == 48
    for row in (write, learn):
        assert row["tokens_per_second"]["median"] > 0
        assert len(row["repeats"]) == 2
    (axes,) = token_envs.plot(record).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["16"]
    assert axes.containers[0].lines[0].get_ydata() == [write["tokens_per_cpu_second"]["median"]]
    json.dumps(record, allow_nan=False)


def run_script(*arguments, tmp_path):
    command = [sys.executable, str(FOLDER / arguments[0]), *map(str, arguments[1:]), "--out", str(tmp_path)]
    environ = conftest.quickly_compiled(os.environ)
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=200)


@pytest.fixture
def fake_clone(tmp_path):
    file = tmp_path / "clone" / "purejaxrl" / "ppo.py"
    file.parent.mkdir(parents=True)
    file.write_text(FAKE_PEER)
    return tmp_path / "clone"


def test_the_alternating_comparison_with_a_fake_peer(tmp_path, fake_clone):
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    toy = [part for name, value in TOY_PPO.items() for part in ("--" + name.replace("_", "-"), value)]
    out = run_script(
        "against_peers.py",
        "purejaxrl-ppo",
        "--peer-path",
        fake_clone,
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
        assert row["ratio"] == pytest.approx(row["peer"]["seconds"] / row["jrl"]["seconds"], abs=1e-3)
        # Of 4 updates the last quarter is update 3; its episodes returned 3.
        assert row["peer"]["training_return"] == 3.0
    for side in ("jrl", "peer"):
        assert 1 <= record[side]["episode_return"]["median"] <= 500
        assert 1 <= record[side]["sampled_return"]["median"] <= 500
        assert record[side]["compile_seconds"] > 0
        assert record[side]["machine"]["jax"]
        assert record[side]["machine"]["cores"] in (None, [core])
    assert 1 <= record["jrl"]["training_return"]["median"] <= 64
    assert record["jrl"]["machine"]["NPROC"] == record["peer"]["machine"]["NPROC"]
    assert record["work"]["env_steps"] == 256
    assert str(tmp_path) not in line


def test_the_floor_is_the_network_passes_of_a_step():
    toy = {"env_steps": 200, "warmup_env_steps": 40, "batch_size": 8}
    record = floor.measure("dqn", peers.Work(**{**peers.DEFAULTS["dqn"], **toy}), steps=2, repeats=3)
    assert record["share"]["median"] == pytest.approx(
        np.median([b / a for a, b in record["pairs"]]), abs=1e-3
    )

    work = peers.Work(**TOY_PPO)
    run, params, _ = floor.network_steps("ppo", work, jrl.make(work.env), steps=2)
    # XLA counts a loop's body once: acting, values of the rollout and of what follows it, one of the gradients, whose
    # backward pass is two products a layer but for the first, which needs no gradient of its input.
    weights = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    first = 2 * 4 * 64
    batch = 4 * 16 // 2
    products = 2 * sum(weights) * (4 + 64 + 4) + batch * (6 * sum(weights) - 2 * first)
    assert products <= run.cost_analysis()["flops"] < 1.2 * products


class FakeWorker:
    """Answers as a process would; ``started`` counts them."""

    started = 0

    def __init__(self, name, job, limit):
        FakeWorker.started += 1
        scale = 2 if job.module == "purejaxrl" else 1
        self.ready = {
            "lower_seconds": 1.0 * scale,
            "compile_seconds": 2.0 * scale,
            "program_bytes": {"temp": 60 * scale, "total": 100 * scale},
            "machine": {"python": sys.version},
        }
        self.answer = {"resident_bytes": 1000, "peak_bytes": 1000 + 30 * scale**2, "seconds": 1.0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def repeat(self, seed):
        return {"seed": seed, **self.answer}


def test_compile_and_memory_are_those_of_fresh_processes(fake_clone, monkeypatch):
    monkeypatch.setattr(against_peers, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "started", 0)
    jobs = against_peers.make_jobs("purejaxrl-ppo", peers.Work(), fake_clone, sys.executable)
    record = against_peers.measure_compile(jobs, pairs=2, limit=1)
    assert FakeWorker.started == 4
    assert record["ratio"]["median"] == 6 / 3
    assert record["peer"]["compile_seconds"]["median"] == 4.0
    record = against_peers.measure_memory(jobs, pairs=2, limit=1)
    assert FakeWorker.started == 8
    assert record["ratio"]["median"] == 200 / 100
    assert record["process_ratio"]["median"] == 120 / 30
    assert [row["jrl"]["seed"] for row in record["pairs"]] == [0, 1]


@pytest.mark.optimized
def test_the_programs_bytes_and_the_processs_peak():
    x = jax.ShapeDtypeStruct((1000,), np.float32)
    _, facts = protocol.compile_program(jax.jit(lambda x: x + 1), x)
    assert facts["program_bytes"]["total"] == facts["program_bytes"]["temp"] + 2 * 4000
    _, facts = protocol.compile_program(jax.jit(lambda x: x + 1, donate_argnums=0), x)
    assert facts["program_bytes"]["total"] == facts["program_bytes"]["temp"] + 4000  # one in place of two

    def run(size):
        return np.ones(size, np.uint8).sum()  # all of its pages are touched, and it is freed again

    training = protocol.Training(lambda seed: 64 << 20, run, lambda result, seed: {})
    row = protocol.repeat(training, peers.Work(), 0)
    if row["peak_bytes"] is not None:
        assert 64 << 20 <= row["peak_bytes"] - row["resident_bytes"] + (4 << 20) < 200 << 20


def test_members_over_two_devices():
    work = peers.Work(**TOY_PPO, seeds=2, devices=2, hidden_sizes=(4,))
    training = ours.training("ppo", work, None)
    state, metrics = result = training.run(training.prepare(0))
    assert len(state.env_steps.sharding.device_set) == 2
    assert state.env_steps[:, 0].tolist() == [256, 256]
    assert metrics["num_episodes"].shape == (2, 4)
    first, second = jax.tree.leaves(state.params)[-1]
    assert not np.array_equal(first, second)
    returns = training.returns(result, 0)
    assert 1 <= returns["training_return"] <= 64
    assert 1 <= returns["episode_return"] <= 500
    assert 1 <= returns["sampled_return"] <= 500


def test_members_in_turn_are_those_side_by_side():
    work = peers.Work(**TOY_PPO | {"env_steps": 64}, seeds=4, hidden_sizes=(4,))
    results = []
    for at_once in (0, 2):
        training = ours.training("ppo", dataclasses.replace(work, at_once=at_once), None)
        results.append(training.run(training.prepare(0))[0].params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *results)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"devices=1000: this process has"):
        ours.training("ppo", peers.Work(**TOY_PPO, devices=1000), None)


@pytest.mark.parametrize("at_once", [0, 2])
def test_two_devices_get_the_pool_of_a_sweep(fake_clone, monkeypatch, at_once):
    monkeypatch.setenv("NPROC", "1")  # as pinned to one core
    monkeypatch.setattr("jrl.xla._jaxlib", lambda: (0, 10))
    monkeypatch.setattr("jrl.xla.cores", lambda: 2)
    work = peers.Work(**TOY_PPO, seeds=2, devices=2, at_once=at_once)
    jobs = against_peers.make_jobs("purejaxrl-ppo", work, fake_clone, "python")
    assert "--xla_force_host_platform_device_count=2" in jobs["jrl"].environ["XLA_FLAGS"]
    assert "NPROC" not in jobs["jrl"].environ  # the cores there are, as in jrl sweep
    assert jobs["peer"].environ["NPROC"] == "1"
    assert "PYTHONPATH" not in jobs["peer"].environ
    jobs = against_peers.make_jobs("purejaxrl-ppo", work, fake_clone, "python", 7, 8)
    assert jobs["jrl"].environ["NPROC"] == "7"
    assert jobs["peer"].environ["NPROC"] == "8"


def test_only_our_side_is_compiled_quickly(fake_clone):
    work = peers.Work(**TOY_PPO, compiler="quick")
    jobs = against_peers.make_jobs("purejaxrl-ppo", work, fake_clone, "python")
    assert xla.compiles_quickly(jobs["jrl"].environ)
    assert not xla.compiles_quickly(jobs["peer"].environ)
    with pytest.raises(ValueError, match=r"compiler='fast': expected full or quick"):
        peers.Work(compiler="fast")


def test_returns_of_zero_or_none_have_a_spread():
    assert throughput.spread_of_returns([0.0, 0.0, 3.0, None]) == {"median": 0.0, "min": 0.0, "max": 3.0}
    assert throughput.spread_of_returns([1.0, 2.0]) == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert throughput.spread_of_returns([None]) is None


def test_constant_keys_can_be_made_each_members_own():
    def train(key):
        return jax.random.normal(jax.random.PRNGKey(0))

    keys = jax.random.split(jax.random.PRNGKey(3), 2)
    shared = jax.vmap(train)(keys)
    assert shared[0] == shared[1]
    own = jax.jit(jax.vmap(purejaxrl.with_own_keys(train)))(keys)
    assert own[0] != own[1]
    np.testing.assert_array_equal(jax.random.PRNGKey(0), [0, 0])  # as before


def fake_job(file, **work):
    return protocol.Job(sys.executable, dict(os.environ), "purejaxrl", "dqn", work, str(file))


def test_a_peer_that_fails_says_so_and_writes_no_record(tmp_path):
    peer = tmp_path / "purejaxrl" / "dqn.py"
    peer.parent.mkdir()
    peer.write_text("raise ImportError('a package the peer needs')")
    with pytest.raises(SystemExit, match="purejaxrl-dqn: it ended with exit status 1"):
        protocol.Worker(
            "purejaxrl-dqn", fake_job(peer, **vars(peers.Work(**peers.DEFAULTS["dqn"]))), limit=100
        )
    out = run_script("against_peers.py", "purejaxrl-ppo", "--peer-path", tmp_path, tmp_path=tmp_path)
    assert out.returncode != 0
    assert "it has no purejaxrl/ppo.py; pass a clone of the peer" in out.stderr
    assert not list(tmp_path.glob("*.jsonl"))
    with pytest.raises(SystemExit, match="stoix-ppo: it is imported from a clone; pass --peer-path"):
        against_peers.make_jobs("stoix-ppo", peers.Work(), None, "python")


@pytest.mark.parametrize("sizes", [(120, 84), (64,), (64, 64, 64)])
def test_layers_that_the_other_library_would_not_have_are_refused(sizes):
    """SBX's DQN reads the first width only, and its layers are two."""
    work = peers.Work(**{**peers.DEFAULTS["dqn"], "hidden_sizes": sizes})
    with pytest.raises(
        ValueError, match=rf"two layers of one width.* --hidden-sizes {sizes[0]} {sizes[0]}\."
    ):
        sbx.training("dqn", work, None)


def test_a_worker_that_does_not_answer_is_stopped(tmp_path):
    peer = tmp_path / "slow.py"
    peer.write_text("import time; time.sleep(1000)")
    with pytest.raises(SystemExit, match="slow: no answer within 1 s"):
        protocol.Worker("slow", fake_job(peer, **vars(peers.Work(**peers.DEFAULTS["dqn"]))), limit=1)


@pytest.mark.parametrize("at_once", [False, True])
def test_learning_writes_a_curve_for_each_seed(at_once, tmp_path, monkeypatch):
    row = learning.Row(
        "ppo", "CartPole-v1", 512, 495.0, config={"num_envs": 4, "unroll_length": 16, "num_minibatches": 2}
    )
    monkeypatch.setitem(learning.ROWS, "toy", row)
    monkeypatch.setattr(learning, "CURVE_POINTS", 2)
    monkeypatch.chdir(tmp_path)  # which is in no clone
    flags = ["--seeds", "2", "--out", str(tmp_path), *(["--at-once"] if at_once else [])]
    monkeypatch.setattr(sys, "argv", ["learning.py", "toy", *flags])
    learning.main()
    record = json.loads((tmp_path / "learning-toy.json").read_text())
    assert record["seeds"] == len(record["records"]) == 2
    assert record["at_once"] == at_once
    assert record["commit"] == throughput.commit(FOLDER)
    curves = [one["curve"] for one in record["records"]]
    assert [curve[-1][0] for curve in curves] == [512, 512]
    assert curves[0] != curves[1]
    assert [one["episodes_completed"] for one in record["records"]] == [100, 100]
    assert 1 <= record["iqm"] <= 500


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (learning, ["ppo-cartpole", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (ladder, ["level0-rloo", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (meta_learning, ["--seeds", "0"], "--seeds 0: must be at least 1"),
        (meta_learning, ["--updates", "15"], "--updates 15: must be a multiple of 10"),
        (ablations, ["double", "--seeds", "-1"], "--seeds -1: must be at least 1"),
        (ablations, [], "name an ablation, or --all: double, dueling"),
        (ablations, ["double", "--plot"], "--plot: there is no record of double in "),
        (meta_learning, ["--plot"], "--plot: there is no record "),
        (token_envs, ["--plot"], "--plot: there is no record "),
        (hang, ["--settings", "configred"], "invalid choice: 'configred'"),
        (hang, ["--sizes", "4"], "argument --sizes: 4: must be environments x calls of step, such as 4x50"),
        (hang, ["--sizes", "4x0"], "argument --sizes: 0: must be at least 1"),
        (hang, ["--repeats", "0"], "argument --repeats: 0: must be at least 1"),
        (against_peers, ["rejax-ppo", "--pairs", "0"], "argument --pairs: 0: must be at least 1"),
        (decoding, ["--pairs", "0"], "argument --pairs: 0: must be at least 1"),
        (decoding, ["--requests", "9", "--batch", "10"], "--requests 9: must be at least --batch 10"),
        (env_stepping, ["--pairs", "-1"], "argument --pairs: -1: must be at least 1"),
        (floor, ["dqn", "--repeats", "0"], "argument --repeats: 0: must be at least 1"),
        (floor, ["dqn", "--steps", "0"], "argument --steps: 0: must be at least 1"),
        (tabular, ["--repeats", "0"], "argument --repeats: 0: must be at least 1"),
        (throughput, ["ppo", "--repeats", "0"], "argument --repeats: 0: must be at least 1"),
        (token_envs, ["--repeats", "0"], "argument --repeats: 0: must be at least 1"),
        (search, ["--searches", "0"], "argument --searches: 0: must be at least 1"),
        (search, ["--rates", "1"], "--rates 1: must be at least 2"),
        (sweep_memory, ["--members", "0"], "argument --members: 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(script, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, *flags, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_native_kernels_are_of_the_rows_that_have_them(tmp_path, monkeypatch):
    asked = {}

    def measure(name, row, seeds, at_once, kernels):
        asked[name] = kernels
        return {"iqm": 0.0, "iqm_interval_95": (0.0, 0.0)}

    monkeypatch.setattr(learning, "measure", measure)
    rows = ["r2d2-memorychain", "dqn-cartpole"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *rows, "--kernels", "native", "--out", str(tmp_path)])
    learning.main()
    assert asked == {"r2d2-memorychain": None, "dqn-cartpole": "native"}


def test_the_memory_of_sweeps_is_written_into_a_new_folder(tmp_path, monkeypatch):
    row = {"members": 2, "planned": 5.0, "taken": 6.0, "machine": {}}
    ran = subprocess.CompletedProcess([], 0, stdout=f"{json.dumps(row)}\n")
    monkeypatch.setattr(sweep_memory.subprocess, "run", lambda *_, **__: ran)
    monkeypatch.setattr(sweep_memory, "machine", dict)
    monkeypatch.setattr(sweep_memory, "commit", str)
    sweep_memory.main(["--members", "2", "--out", str(tmp_path / "new")])
    (written,) = json.loads((tmp_path / "new" / "sweep-memory-dqn.json").read_text())["sweeps"]
    assert written == {"members": 2, "planned": 5.0, "taken": 6.0}


def test_a_curve_has_no_return_where_no_episode_ended():
    steps = jrl.ops.counter.add(jrl.ops.counter.zero(), 640)
    metrics = {"num_episodes": jnp.zeros(3), "episode_return": jnp.zeros(3)}
    assert learning.curve_point(steps, metrics) == (640, None)
    metrics = {"num_episodes": jnp.array([0.0, 1.0, 3.0]), "episode_return": jnp.array([0.0, 2.0, 4.0])}
    assert learning.curve_point(steps, metrics) == (640, 3.5)


def test_inflected_forms_of_a_word_are_on_one_side_of_the_split():
    families = [
        ["wade", "wades", "waded", "wading"],
        ["carry", "carries", "carried", "carrying"],
        ["lily", "lilies"],
    ]
    families += [["stop", "stops", "stopped", "stopping"], ["double", "doubles", "doubled", "doubling"]]
    families += [["reply", "replies", "replied"], ["big", "bigger", "biggest"], ["go", "goes", "going"]]
    families += [["quick", "quickly", "quicker"], ["happy", "happiness"], ["box", "boxes"], ["bus", "buses"]]
    for family in families:
        assert len({ladder_applications.stem(word) for word in family}) == 1, family
    assert ladder_applications.stem("wade") != ladder_applications.stem("reply")
    pairs = {tuple(map(ord, word)): [[1]] for family in families for word in family}
    kept, held = ladder_applications.halves(
        pairs, 12, lambda source: ladder_applications.stem("".join(map(chr, source)))
    )
    assert kept | held == pairs
    assert not kept.keys() & held.keys()
    assert 12 <= len(held) < 18
    for family in families:
        sides = {tuple(map(ord, word)) in held for word in family}
        assert len(sides) == 1, family


def test_poems_that_share_a_line_are_on_one_side_of_the_split():
    # The first and the third by way of the second.
    poems = [("a", "b", "c", "d"), ("e", "f", "g", "a"), ("h", "e", "i", "j")]
    poems += [(f"{i}1", f"{i}2", f"{i}3", f"{i}4") for i in range(9)]
    kept, held = ladder_poems.parted(poems, 5)
    assert sorted(kept + held) == list(range(12))
    assert 5 <= len(held) <= 7
    assert len({0, 1, 2} & set(kept)) in (0, 3)
    assert not {line for i in kept for line in poems[i]} & {line for i in held for line in poems[i]}


def test_a_quatrain_has_its_form_and_its_rhyme():
    comma, end, five, seven = 20, 21, 22, 23
    rhyme_of = jnp.arange(24) // 2
    form, rhyme = ladder_poems.judges(comma, {5: five, 7: seven}, rhyme_of)

    def scored(prompt, lines, finished=True):
        written = [token for line in lines for token in [comma, *line]][1:] + [end] * finished
        tokens = np.full(33, -1)
        tokens[: 1 + len(written)] = [prompt, *written]
        text = Text(jnp.asarray(tokens), jnp.int32(1), jnp.int32(1 + len(written)), jnp.bool_(finished))
        return float(form(text)), float(rhyme(text))

    def lines(size, second, fourth):
        return [[*[i] * (size - 1), last] for i, last in enumerate((9, second, 9, fourth))]

    assert scored(five, lines(5, 12, 13)) == (1.0, 1.0)
    assert scored(seven, lines(7, 12, 13)) == (1.0, 1.0)
    assert scored(five, lines(5, 12, 14)) == (1.0, 0.0)
    assert scored(five, lines(5, 12, 12)) == (1.0, 0.0)  # the same character is no rhyme
    assert scored(seven, lines(5, 12, 13)) == (0.0, 0.0)  # five where seven were asked for
    assert scored(five, lines(5, 12, 13)[:3]) == (0.0, 0.0)
    assert scored(seven, lines(7, 12, 13), finished=False) == (0.0, 0.0)
    assert scored(five, [[1] * 4, *lines(5, 12, 13)[1:-1], [1] * 6]) == (0.0, 0.0)
