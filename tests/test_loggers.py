"""Loggers: what they write can be read back, and a missing extra is named."""

import json
import struct
import sys
from pathlib import Path

import pytest

from jrl import loggers


def test_the_protocol_is_two_methods():
    class Mine:
        def write(self, env_steps, metrics):
            pass

        def close(self):
            pass

    assert isinstance(Mine(), loggers.Logger)
    assert not isinstance(object(), loggers.Logger)


def test_jsonl_is_strict_and_readable_before_it_is_closed(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    logger = loggers.JsonlLogger(path)
    assert not path.parent.exists()  # nothing is opened before the first write
    logger.write(2**40, {"loss": 0.5, "episode_return": None})
    assert json.loads(path.read_text()) == {"env_steps": 2**40, "loss": 0.5, "episode_return": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        logger.write(2, {"loss": float("nan")})
    logger.close()
    logger.close()
    again = loggers.JsonlLogger(path)
    again.write(3, {})
    again.close()
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_full_disk_names_the_file_and_closing_adds_no_error_of_its_own():
    logger = loggers.JsonlLogger("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        logger.write(1, {"loss": 0.5})
    logger.close()


def scalars(path):
    """Read the scalars of a TensorBoard event file: records of length, crc, protobuf, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found, content = [], path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_tensorboard_events_hold_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    logger = loggers.TensorBoardLogger(tmp_path / "tensorboard")
    assert not (tmp_path / "tensorboard").exists()
    logger.write(10, {"loss": 0.5, "episode_return": None})
    logger.write(20, {"loss": 0.25, "episode_return": 3.0})
    logger.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert scalars(events) == [(10, "loss", 0.5), (20, "loss", 0.25), (20, "episode_return", 3.0)]


class StubRun:
    def __init__(self, **kwargs):
        self.kwargs, self.logged, self.finished = kwargs, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def stub_wandb(monkeypatch):
    module = type(sys)("wandb")
    module.runs = []
    module.init = lambda **kwargs: module.runs.append(StubRun(**kwargs)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_given_the_run(tmp_path, stub_wandb):
    logger = loggers.WandbLogger(
        tmp_path / "run", project="p", mode="online", config={"seed": 1}, run_id="abc"
    )
    assert stub_wandb.runs == []
    logger.write(10, {"loss": 0.5, "episode_return": None})
    logger.close()
    (run,) = stub_wandb.runs
    assert run.logged == [(10, {"loss": 0.5})]
    assert run.finished
    assert run.kwargs == {
        "project": "p", "name": "run", "dir": str(tmp_path / "run"), "mode": "online",
        "config": {"seed": 1}, "id": "abc", "resume": "allow",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"mode='off': W&B is used online or offline"):
        loggers.WandbLogger(tmp_path, mode="off")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_offline_writes_a_file(tmp_path):
    pytest.importorskip("wandb")
    logger = loggers.WandbLogger(tmp_path, mode="offline", run_id="abc")
    logger.write(10, {"loss": 0.5})
    logger.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-abc.wandb"))


@pytest.mark.parametrize(
    ("cls", "module", "extra"),
    [(loggers.TensorBoardLogger, "tensorboardX", "tensorboard"), (loggers.WandbLogger, "wandb", "wandb")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, cls, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf'{module} is not installed\. .* pip install "jrl-kernels\[{extra}\]"'
    ):
        cls(tmp_path)


def test_a_resumed_run_builds_its_loggers_again(tmp_path, stub_wandb):
    pytest.importorskip("tensorboardX")
    for logger in (
        loggers.TensorBoardLogger(tmp_path / "tensorboard"),
        loggers.WandbLogger(tmp_path, project="p", mode="offline"),
    ):
        again = loggers.build(json.loads(json.dumps(logger.spec())), tmp_path)
        assert type(again) is type(logger)
        assert again.spec(tmp_path) == logger.spec(tmp_path) == logger.spec()
    with pytest.raises(ValueError, match="unknown kind of logger 'paper'"):
        loggers.build({"kind": "paper"}, tmp_path)
