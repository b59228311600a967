"""The kernel of a whole network, interpreted on a CPU, is another way to compute the same function and gradient."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import networks, ppo
from jrl.bench import work
from jrl.networks import fused

KEY = jax.random.key(0)


def normal(seed, shape):
    """Drawn by NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layers(sizes, members=()):
    return tuple(
        fused.Layer(normal((0, i), (*members, a, b)) / np.float32(a**0.5), normal((1, i), (*members, b)))
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    )


def both(function, params, x, weight):
    """The value and the gradients, as one program."""

    def loss(params, x):
        return (function(params, x) * weight).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


def assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), ours, theirs)


@pytest.mark.parametrize(
    ("activation", "inputs", "rows"), [("tanh", 4, 37), ("silu", 4, 300), ("relu", 70, 130)]
)
def test_it_equals_the_layers_one_by_one(activation, inputs, rows):
    """Widths and rows that are no powers of two, more rows than one partial gradient takes, a wide first layer."""
    params = layers((inputs, 20, 33, 3))
    x = normal(1, (rows, inputs))
    weight = normal(2, (rows, 3))
    ours = both(lambda p, x: fused.mlp(p, x, activation), params, x, weight)
    theirs = both(lambda p, x: fused.reference(activation, True, p, x), params, x, weight)
    assert_equal(ours, theirs)


def test_members_side_by_side_keep_their_own_weights():
    params = layers((4, 16, 2), members=(3,))
    x = normal(1, (3, 5, 7, 4))
    weight = jnp.ones((5, 7, 2))
    ours = jax.vmap(lambda p, x: both(lambda p, x: fused.mlp(p, x, "tanh"), p, x, weight))(params, x)
    theirs = jax.vmap(lambda p, x: both(lambda p, x: fused.reference("tanh", True, p, x), p, x, weight))(
        params, x
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_the_network_of_ppo_is_the_same_function(name, shared, monkeypatch):
    env, config = jrl.make(name), ppo.Config(hidden_sizes=(16, 12))
    plain = networks.actor_critic(env, config, shared_torso=shared)
    monkeypatch.setattr(fused, "enabled", lambda: True)
    monkeypatch.setattr(fused, "mlp", counted := Counted(fused.mlp))
    ours = networks.actor_critic(env, config, shared_torso=shared, fuse=True)
    obs = normal(3, (5, *env.observation.shape))
    params = jax.jit(plain.init)(KEY, obs, ())
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(ours.init, KEY, obs, ()))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    assert_equal(jax.jit(ours.apply)(params, obs, ()), jax.jit(plain.apply)(params, obs, ()))
    assert counted.calls == (1 if shared else 2)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_what_it_cannot_compute_goes_layer_by_layer(monkeypatch):
    monkeypatch.setattr(fused, "enabled", lambda: True)
    monkeypatch.setattr(fused, "mlp", counted := Counted(fused.mlp))
    env = jrl.make("CartPole-v1")
    for config in (ppo.Config(hidden_sizes=(200,)), ppo.Config(hidden_sizes=(8,), layer_norm=True)):
        network = networks.actor_critic(env, config, fuse=True)
        obs = jnp.zeros((3, 4))
        params = jax.jit(network.init)(KEY, obs, ())
        jax.jit(network.apply)(params, obs, ())
    assert counted.calls == 0


def test_it_is_for_gpus_and_can_be_turned_off(monkeypatch):
    assert not fused.enabled()  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = type("Device", (), {"compute_capability": "9.0"})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fused.enabled()
    device.compute_capability = "7.5"
    assert not fused.enabled()
    device.compute_capability = "9.0"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jax.experimental.pallas.triton", None)  # as where it does not exist
        without.delattr("jax.experimental.pallas.triton", raising=False)
        assert not fused.enabled()
    assert fused.enabled()
    monkeypatch.setattr(fused, "ALLOWED", False)
    assert not fused.enabled()


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[200, 2\] outputs.*at most 128"):
        fused.mlp(layers((4, 200, 2)), jnp.zeros((3, 4)), "tanh")
    with pytest.raises(ValueError, match=r"activation='sine'.*tanh, relu"):
        fused.mlp(layers((4, 8, 2)), jnp.zeros((3, 4)), "sine")


def test_the_work_of_a_kernel_is_counted_without_what_stays_on_the_chip():
    """Products of padded layers are counted as computed, bytes are those of inputs and outputs."""
    params, x = layers((16, 16, 16), members=(3,)), jnp.ones((3, 64, 16))
    counted = work.count(jax.vmap(lambda p, x: fused.mlp(p, x, "tanh")), params, x)
    assert counted.products == {(3, 64, 16, 16): 2 * 2.0 * 3 * 64 * 16 * 16}
    assert counted.transcendentals == 3 * 64 * 16
    assert counted.bytes == work.nbytes((params, x, x))
