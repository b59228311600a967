"""make, register and ids."""

import subprocess
import sys

import pytest

import jrl
from jrl.envs import DOWNLOADS, ids, make, probes, register
from jrl.envs.registry import NEED_DATA


def test_a_jrl_environment_is_returned_as_it_is():
    env = probes.CONSTANT.env
    assert make(env) is env
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        make(env, raw=True)


def test_ids():
    names = ids()
    assert len(names) == len(set(names))
    assert {"CartPole-v1", "ProbeTruncation-jrl"} <= set(names)
    assert not {*DOWNLOADS, *NEED_DATA} & set(names)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("Cartpole-v0", "CartPole-v1"),
        ("cartpole", "CartPole-v1"),
        ("ProbeTruncatoin-jrl", "ProbeTruncation-jrl"),
    ],
)
def test_an_unknown_id_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=rf"Unknown environment id '{wrong}'\. Nearest: {near}.*jrl envs"):
        make(wrong)


def test_an_unknown_id_unlike_any():
    with pytest.raises(ValueError, match=r"Unknown environment id 'xyzzy'\. List all"):
        make("xyzzy")


def test_register():
    env = probes.CONSTANT.env
    register("RegisteredHere-test", lambda scale=1: env._replace(name=f"scaled {scale}"))
    assert jrl.make("RegisteredHere-test", scale=3).name == "scaled 3"
    assert "RegisteredHere-test" in ids()
    with pytest.raises(ValueError, match="'RegisteredHere-test' is already registered"):
        register("RegisteredHere-test", lambda: env)
    with pytest.raises(ValueError, match="non-empty"):
        register("", lambda: env)
    with pytest.raises(TypeError, match="factory=3"):
        register("Other-test", 3)


def test_data_that_cannot_be_had(monkeypatch):
    from gymnax.utils import load_mnist

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(load_mnist, "load_mnist", fail)
    with pytest.raises(RuntimeError, match=r"MNISTBandit-bsuite downloads its data .*no route to host"):
        make(DOWNLOADS[0])


def test_gymnax_is_imported_only_when_needed():
    code = (
        "import sys, jrl.envs; jrl.envs.make('ProbeConstant-jrl'); assert 'gymnax' not in sys.modules;"
        "jrl.envs.make('CartPole-v1'); assert 'gymnax' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
