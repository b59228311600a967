"""The kernels are compiled for this machine once, and errors say what to do."""

from __future__ import annotations

import jax
import pytest
import test_native_adam
import test_native_categorical
import test_native_mlp
import test_native_noise
import test_native_threefry

import jrl
from jrl import dqn, networks, optim
from jrl.native import build


@pytest.fixture
def afresh(tmp_path, monkeypatch):
    """As in a process that has loaded no kernel, on a machine that has compiled none; gives the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (build.load, build._digest):
        function.cache_clear()
    yield tmp_path / "cache" / "jrl"
    for function in (build.load, build._digest):
        function.cache_clear()


def test_without_a_compiler_the_error_says_what_to_do(afresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler \(no-such-compiler.*kernels='xla'"):
        build.load()


def test_what_the_compiler_says_is_shown_and_nothing_is_kept(afresh, tmp_path, monkeypatch):
    broken = tmp_path / "broken.cc"
    broken.write_text("int main() { return this_is_no_name; }")
    monkeypatch.setattr(build, "SOURCE", broken)
    with pytest.raises(RuntimeError, match="this_is_no_name"):
        build.load()
    assert list(afresh.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(afresh, tmp_path):
    afresh.parent.write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match="XDG_CACHE_HOME"):
        build.load()


def test_it_is_right_with_vectors_of_four(afresh, monkeypatch):
    """As a processor without AVX has them."""
    monkeypatch.setattr(build, "FLAGS", tuple(f for f in build.FLAGS if f != "-march=native"))
    assert build.load().jrl_lanes() == 4
    test_native_mlp.test_it_equals_the_layers_one_by_one((5, 20, 33, 7, 3), 51, "tanh", True)
    test_native_mlp.test_of_an_input_that_is_nearly_all_zeros_too((67, 150, 12), 49)
    test_native_categorical.test_it_is_the_head_of_c51((6, 3, 51))
    test_native_adam.test_steps_are_those_of_optax(1.0)
    test_native_noise.test_it_is_the_normal_of_jax()
    test_native_threefry.test_words_are_those_of_jax((3, 50))
    test_native_threefry.test_keys_side_by_side_have_their_own(3)
    assert len(list(afresh.glob("native-*.so"))) == 1


def test_they_are_for_cpus(monkeypatch):
    """Whatever would be computed by them: a network of one's own leaves Adam."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    env, config = jrl.make("CartPole-v1"), dqn.Config(kernels="native")
    own = networks.q_network(env, dqn.Config())
    for network in (None, own):
        with pytest.raises(ValueError, match="kernels='native' on gpu"):
            dqn.make(env, config, network=network)
    with pytest.raises(ValueError, match="kernels='native' on gpu"):
        optim.adam(1e-3, max_grad_norm=None, kernels="native")
    with pytest.raises(ValueError, match="kernels='cuda'"):
        optim.adam(1e-3, max_grad_norm=None, kernels="cuda")


def test_every_kernel_has_its_name_in_the_source():
    sources = "".join(path.read_text() for path in build.FOLDER.glob("*.cc"))
    assert sources.count("XLA_FFI_DEFINE_HANDLER_SYMBOL") == len(build.NAMES)
