"""Saving and restoring states: bit-exact, atomic, and clear about what is wrong."""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import checkpoint, ops
from jrl.records import CheckpointError, CorruptCheckpointError


def make_state(seed=0, width=3):
    key = jax.random.key(seed)
    return {
        "params": {"Dense_0": {"kernel": jax.random.normal(key, (2, width)), "bias": jnp.zeros(width)}},
        "key": key,
        "keys": jax.random.split(jax.random.key(seed + 1, impl="rbg"), 3),
        "hashed": ops.hashed(jax.random.key(seed + 2)),
        "done": jnp.array([True, False]),
        "count": jnp.array([1, 2**32 - 1], jnp.uint32),
        "small": jnp.array([-1, 7], jnp.int8),
        "half": jnp.array([1.5, -0.0], jnp.bfloat16),
        "odd": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40]),
        "scalar": jnp.float32(3),
        "empty": jnp.zeros((0, 4)),
        "memory": (),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert not getattr(x, "weak_type", False)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    path = checkpoint.save(tmp_path, state, 12, metadata={"env_steps": 2**40})
    assert path == tmp_path / "000000000012"
    assert_same(checkpoint.restore(tmp_path, state), state)
    assert_same(checkpoint.restore(tmp_path, jax.eval_shape(lambda: make_state()), 12), state)
    assert checkpoint.metadata(tmp_path) == {"env_steps": 2**40}
    leaves = json.loads((path / "metadata.json").read_text())["leaves"]
    assert {"path": "params/Dense_0/kernel", "shape": [2, 3], "dtype": "float32"} in leaves
    assert {"path": "keys", "shape": [3], "dtype": "key<rbg>", "key_impl": "rbg"} in leaves
    assert not list(path.rglob("*.pkl"))


def test_a_restored_state_does_not_retrace(tmp_path):
    state = {"x": jnp.float32(1), "key": jax.random.key(0)}
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return {"x": state["x"] * 2, "key": jax.random.split(state["key"])[0]}

    state = step(state)
    checkpoint.save(tmp_path, state, 1)
    step(state)
    step(checkpoint.restore(tmp_path, state))
    assert len(traces) == 1


def test_a_snapshot_survives_donation(tmp_path):
    state = {"x": jnp.arange(4.0)}
    held = checkpoint.snapshot(state)
    jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)(state)
    checkpoint.save(tmp_path, held, 0)
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, {"x": jnp.zeros(4)})["x"], np.arange(4.0))


@pytest.fixture
def small_files():
    """No file of more than 64 KB: the system's error comes as that of a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_disk_does_not_take_is_an_oserror_and_leaves_nothing(tmp_path, small_files):
    small, large = {"x": np.ones(4, np.float32)}, {"x": np.random.default_rng(0).normal(size=100_000)}
    checkpoint.save(tmp_path, small, 1)
    with pytest.raises(OSError, match=str(tmp_path)) as raised:
        checkpoint.save(tmp_path, large, 2)
    assert raised.value.errno == errno.EFBIG
    assert [entry.name for entry in tmp_path.iterdir()] == ["000000000001"]
    assert_same(checkpoint.restore(tmp_path, small), small)


def test_what_fails_in_many_threads_is_one_error_and_leaves_nothing(tmp_path, small_files, capfd):
    large = np.random.default_rng(0).normal(size=20_000)
    with pytest.raises(OSError, match=str(tmp_path)):
        checkpoint.save(tmp_path, {f"{i}": large + i for i in range(40)}, 1)
    gc.collect()  # tells of errors that nobody has asked for
    time.sleep(0.5)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_changed_record_is_corrupt(tmp_path):
    state = {"x": jnp.zeros(2)}
    path = (
        checkpoint.save(tmp_path, state, 1, metadata={"env_steps": 4032, "of": (1, 0.1, "α")})
        / "metadata.json"
    )
    written = path.read_text()
    for old, new in (
        ("4032", "4033"),
        ("env_steps", "env_stepr"),
        ('"files"', '"filez"'),
        ('"shape"', '"shapf"'),
    ):
        path.write_text(written.replace(old, new))
        for read in (lambda: checkpoint.restore(tmp_path, state), lambda: checkpoint.metadata(tmp_path)):
            with pytest.raises(CorruptCheckpointError, match=r"metadata\.json is not as it was written"):
                read()
    record = json.loads(written)
    del record["crc"]  # checkpoints of before have none
    path.write_text(json.dumps(record))
    assert checkpoint.metadata(tmp_path)["env_steps"] == 4032
    assert_same(checkpoint.restore(tmp_path, state), state)


def test_the_newest_are_kept(tmp_path):
    state = {"x": jnp.zeros(2)}
    assert checkpoint.latest_step(tmp_path) is None
    for step in (1, 2, 10, 3):
        checkpoint.save(tmp_path, {"x": jnp.full(2, step)}, step, keep=2)
    # 3 is older by number than 10 and 2 but has just been saved: what is saved stays.
    assert checkpoint.steps(tmp_path) == [3, 10]
    assert checkpoint.latest_step(tmp_path) == 10
    checkpoint.save(tmp_path, {"x": jnp.full(2, 7.0)}, 10, keep=2)
    assert float(checkpoint.restore(tmp_path, state)["x"][0]) == 7.0
    checkpoint.save(tmp_path, state, 11, keep=None)
    assert checkpoint.steps(tmp_path) == [3, 10, 11]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match=r"step=-1: .* 0 or more"):
        checkpoint.save(tmp_path, state, -1)
    with pytest.raises(ValueError, match=r"keep=0: at least one checkpoint must stay"):
        checkpoint.save(tmp_path, state, 12, keep=0)


@pytest.mark.parametrize(
    "names",
    [("a/b",), ("a.b",), ("a\\b", "..", "%2E", "."), ("a\0b",)],
    ids=["slash", "dot", "others", "zero"],
)
def test_leaves_whose_names_a_file_could_not_tell_apart_are_kept_apart(tmp_path, names):
    state = {"a": {"b": jnp.zeros(1)}, **{name: jnp.full(1, 1.0 + i) for i, name in enumerate(names)}}
    checkpoint.save(tmp_path, state, 0)
    assert_same(checkpoint.restore(tmp_path, state), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"new": jnp.zeros(1)}, r"does not fit this state: new is missing in the checkpoint"),
        (lambda s: {k: v for k, v in s.items() if k != "half"}, "half is in the checkpoint only"),
        (
            lambda s: s | make_state(width=5),
            r"params/Dense_0/bias has shape \[3\] in the checkpoint and \[5\] here; "
            r"params/Dense_0/kernel has shape \[2, 3\] in the checkpoint and \[2, 5\] here",
        ),
        (lambda s: s | {"small": jnp.zeros(2)}, "small has dtype int8 in the checkpoint and float32 here"),
        (lambda s: s | {"key": jax.random.key(0, impl="rbg")}, r"key has dtype key<fry> .* key<rbg> here"),
        (lambda s: {f"new{i}": jnp.zeros(1) for i in range(9)}, r"; and \d+ more\. A checkpoint can only be"),
    ],
)
def test_a_leaf_that_differs_is_named(tmp_path, change, message):
    state = make_state()
    checkpoint.save(tmp_path, state, 0)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(tmp_path, change(state))


def _data(path):
    return [file for file in (path / "arrays").rglob("*") if file.is_file()]


def truncate(path):
    file = max(_data(path), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-5])


def flip(path):
    file = max(_data(path), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"is corrupt: arrays/.* was written with \d+ bytes, now has \d+ bytes"),
        (flip, r"is corrupt: arrays/.* its checksum differs"),
        (lambda path: shutil.rmtree(path / "arrays"), r"is corrupt: arrays/.* is missing"),
        (lambda path: (path / "metadata.json").write_text("{"), r"is corrupt: metadata\.json cannot be read"),
        (lambda path: (path / "metadata.json").unlink(), r"is not a checkpoint of jrl: it has no metadata"),
        (
            lambda path: (path / "metadata.json").write_text("{}"),
            r"is not a checkpoint .* 'jrl-checkpoint-1'",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_others_are_named(tmp_path, damage, message):
    state = {"x": jnp.arange(100.0)}
    for step in (1, 2):
        checkpoint.save(tmp_path, state, step)
    damage(tmp_path / f"{2:012d}")
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.restore(tmp_path, state)
    if "corrupt" in str(raised.value):
        assert "pass one of the others, step in [1]" in str(raised.value)
    assert_same(checkpoint.restore(tmp_path, state, step=1), state)


def test_a_path_that_is_a_pattern_is_refused(tmp_path):
    """Orbax looks for what it has written with a pattern: in `run[1]` it finds nothing, and says that all is well."""
    with pytest.raises(ValueError, match=r"run\[1\] has \[ in it, with which checkpoints cannot be written"):
        checkpoint.save(tmp_path / "run[1]", make_state(), 0)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\. .* pass the folder"):
        checkpoint.restore(tmp_path / "nowhere", {})
    checkpoint.save(tmp_path, {}, 4)
    assert checkpoint.restore(tmp_path, {}) == {}
    with pytest.raises(CheckpointError, match=r"does not exist\. The checkpoints there are: \[4\]"):
        checkpoint.restore(tmp_path, {}, step=5)


def test_what_a_killed_save_left_behind_is_ignored_and_removed(tmp_path):
    state = {"x": jnp.zeros(2)}
    checkpoint.save(tmp_path, state, 1)
    (tmp_path / ".saving-2-99").mkdir()
    (tmp_path / ".discarded-000000000000-99").mkdir()
    assert checkpoint.latest_step(tmp_path) == 1
    checkpoint.save(tmp_path, state, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000001", "000000000002"]


SAVE_FOR_EVER = """
import sys, numpy as np
from jrl import checkpoint
step = 0
while True:
    checkpoint.save(sys.argv[1], {"x": np.full(50_000, step, np.int32)}, step, keep=2)
    print(step, flush=True)
    step += 1
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for delay in (0.003, 0.011, 0.023):  # several moments within saves, in one process: SIGSTOP is a look
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGSTOP)
        step = checkpoint.latest_step(tmp_path)
        restored = checkpoint.restore(tmp_path, {"x": jnp.zeros(50_000, jnp.int32)})
        assert np.all(np.asarray(restored["x"]) == step)
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.communicate()
    last = checkpoint.latest_step(tmp_path)
    assert last >= 1
    checkpoint.save(tmp_path, {"x": np.zeros(1)}, last + 1, keep=2)
    assert not list(tmp_path.glob(".*"))
