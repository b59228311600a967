"""Noise on parameters: its law, its gradient, and which layers have it."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, networks
from jrl.algos import q_functions

LAYER = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}


def draws(params, count):
    noise = networks.noisy.draw(jax.random.key(0), params, (count,))
    return jax.vmap(lambda noise: networks.noisy.perturb(params, noise))(noise)


def test_noise_is_factorised_of_the_right_scale_and_centred_on_the_means():
    params = networks.noisy.init({"a": LAYER, "b": LAYER}, 0.5)
    sample = draws(params, 20_000)
    noise = (sample["a"]["kernel"] - LAYER["kernel"]) / (0.5 / np.sqrt(3))
    bias = (sample["a"]["bias"] - 1.0) / (0.5 / np.sqrt(3))
    # f(x)² = |x|: one factor has second moment E|x| = sqrt(2/π), a product of two its square.
    for moment, expected in ((bias**2, np.sqrt(2 / np.pi)), (noise**2, 2 / np.pi)):
        np.testing.assert_allclose(moment.mean(0), np.full(moment.shape[1:], expected), atol=0.03)
    np.testing.assert_allclose(noise.mean(0), np.zeros((3, 2)), atol=0.03)
    # Factorised: every draw's matrix has rank 1, and its columns are those of the bias's factors.
    np.testing.assert_allclose(noise[:, 0, 0] * noise[:, 1, 1], noise[:, 0, 1] * noise[:, 1, 0], atol=1e-3)
    np.testing.assert_allclose(noise[:, 0, 0] * bias[:, 1], noise[:, 0, 1] * bias[:, 0], atol=1e-3)
    other = (sample["b"]["kernel"] - LAYER["kernel"]) / (0.5 / np.sqrt(3))
    assert abs(np.mean(noise[:, 0, 0] * other[:, 0, 0])) < 0.02  # layers are independent


def test_gradients_of_scale_and_mean_are_those_of_the_reparametrisation():
    params = networks.noisy.init({"a": LAYER}, 0.3)
    drawn = networks.noisy.draw(jax.random.key(1), params)
    x = jnp.asarray([1.0, -2.0, 0.5])

    def output(params):
        layer = networks.noisy.perturb(params, drawn)["a"]
        return (x @ layer["kernel"] + layer["bias"]).sum()

    grad = jax.grad(output)(params)
    noise = networks.noisy.perturb(params, drawn)["a"]["kernel"] - LAYER["kernel"]
    np.testing.assert_allclose(grad.mean["a"]["kernel"], jnp.broadcast_to(x[:, None], (3, 2)))
    np.testing.assert_allclose(grad.scale["a"]["kernel"], x[:, None] * noise / (0.3 / np.sqrt(3)), rtol=1e-4)


def test_fully_connected_layers_are_noisy_and_nothing_else():
    env = jrl.make("Breakout-MinAtar")
    algo = dqn.make(env, dqn.Config(noisy=True, dueling=True, hidden_sizes=(8,), channels=(2,)))
    params = jax.eval_shape(algo.init, jax.random.key(0), dqn.HParams()).params
    layers = {"params/CNN_0/MLP_0/Dense_0", "params/Dense_0", "params/Dense_1"}
    assert params.scale.keys() == layers  # no convolution, no layer norm


def test_environments_share_a_draw_of_the_noise_or_have_their_own():
    env = jrl.make("CartPole-v1")
    same = jnp.broadcast_to(jnp.asarray([0.01, -0.02, 0.03, 0.04]), (4, 4))
    for num, distinct in ((1, 1), (2, 2), (4, 4)):
        config = dqn.Config(num_envs=4, noisy=True, noise_draws=num, hidden_sizes=(4,))
        params = q_functions.make(env, config, None, "dqn").init(jax.random.key(0), same, 0.5)
        state = types.SimpleNamespace(params=params, support=())  # all that a policy reads of it
        policy = dqn.make(env, config).policy(state, greedy=False, epsilon=0.0)
        q = np.asarray(policy(jax.random.key(1), same)[2]["q"])
        assert len(np.unique(q.round(5), axis=0)) == distinct
        assert np.allclose(q.reshape(num, 4 // num, -1), q.reshape(num, 4 // num, -1)[:, :1])
        alone = np.asarray(policy(jax.random.key(1), same[:1])[2]["q"])
        assert alone.shape == (1, 2)  # as many rows as one likes
        assert policy(jax.random.key(1), same[0])[2]["q"].shape == (2,)
        assert policy(jax.random.key(1), same[None])[2]["q"].shape == (1, 4, 2)
    with pytest.raises(ValueError, match=r"noise_draws=3 cannot be shared evenly by num_envs=4.*a divisor"):
        dqn.Config(num_envs=4, noise_draws=3)


def test_a_network_without_such_layers_is_refused():
    def init(key, obs):
        return {"w": jnp.zeros((4, 2))}

    network = (init, lambda params, obs: obs @ params["w"])
    algo = dqn.make(jrl.make("CartPole-v1"), dqn.Config(noisy=True), network=network)
    with pytest.raises(
        ValueError, match=r"noisy: no layer of the network has a kernel \[F, K\].*or noisy=False"
    ):
        jax.eval_shape(algo.init, jax.random.key(0), dqn.HParams())
