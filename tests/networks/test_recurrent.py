"""Memories: acting step by step and the loss's sequence form are one function; episodes do not see each other."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import networks
from jrl.envs import action_mask
from jrl.types import MaskedObservation, Network

T, B = 12, 3
CORES = {
    "gru": networks.GRU(8),
    "transformer": networks.WindowTransformer(8, window=3, num_layers=2),
}
TORSO = types.SimpleNamespace(
    torso="mlp", hidden_sizes=(8,), channels=(1,), activation="tanh", layer_norm=False
)


@functools.cache
def recurrent(core):
    """A network, its parameters (biases and distances not at their zeros), and 12 steps with resets."""
    network = networks.actor_critic(jrl.make("CartPole-v1"), TORSO, core=CORES[core])
    keys = jax.random.split(jax.random.key(0), 4)
    memory = network.init_memory((B,))
    params = jax.jit(network.init)(keys[0], jnp.zeros((B, 4)), memory)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(keys[1], leaf.shape), params)
    obs = jax.random.normal(keys[2], (T, B, 4))
    # One environment is reset before the first step and twice in a row, one late, one never.
    reset = jnp.zeros((T, B), bool).at[jnp.array([0, 4, 5]), 0].set(True).at[9, 1].set(True)
    # A memory in use, as an unroll begins with.
    _, memory = jax.jit(network.sequence)(params, jax.random.normal(keys[3], (T, B, 4)), memory, reset[::-1])
    return network, params, obs, memory, reset


def by_steps(core):
    network, params, obs, memory, reset = recurrent(core)
    plain = Network(network.init, network.apply, network.init_memory)
    return jax.jit(functools.partial(networks.apply_sequence, plain))(params, obs, memory, reset)


@pytest.mark.parametrize("core", CORES)
def test_the_sequence_form_equals_the_steps(core):
    network, params, obs, memory, reset = recurrent(core)
    at_once = jax.jit(functools.partial(networks.apply_sequence, network))(params, obs, memory, reset)
    (logits, value), _ = at_once
    assert logits.shape == (T, B, 2)
    assert value.shape == (T, B)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), at_once, by_steps(core))


@pytest.mark.parametrize("core", CORES)
def test_what_a_step_sees(core):
    """The derivative of each step's value by each observation: nothing later, nothing before a reset."""
    network, params, obs, memory, reset = recurrent(core)

    def value(obs, memory):
        return network.sequence(params, obs, memory, reset)[0][1]

    by_obs, by_memory = jax.jit(jax.jacrev(value, argnums=(0, 1), allow_int=True))(obs, memory)
    by_obs = np.abs(by_obs).max(-1)  # [T, B, T, B]
    episode = np.cumsum(reset, axis=0)
    # Each of two layers of the transformer sees three steps further back.
    reach = T if core == "gru" else 6
    for b in range(B):
        for t in range(T):
            seen = by_obs[t, b, :, b] > 0
            expected = [episode[k, b] == episode[t, b] and t - reach <= k <= t for k in range(T)]
            np.testing.assert_array_equal(seen, expected, f"environment {b}, step {t}")
            assert not by_obs[t, b, :, [i for i in range(B) if i != b]].any()
    leaf = next(leaf for leaf in jax.tree.leaves(by_memory) if leaf.dtype == jnp.float32)
    sees_memory = np.abs(leaf).reshape(T, B, B, -1).max(-1)
    for b in range(B):
        seen = [t for t in range(T) if sees_memory[t, b, b] > 0]
        assert seen == [t for t in range(T) if episode[t, b] == 0 and t < reach]


@pytest.mark.parametrize("core", CORES)
def test_a_step_takes_any_batch_shape(core):
    network, params, obs, memory, _ = recurrent(core)
    batch = jnp.broadcast_to(obs[0], (2, B, 4))
    batch_memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, *leaf.shape)), memory)
    many = network.apply(params, batch, batch_memory)
    one = network.apply(params, obs[0, 1], jax.tree.map(lambda leaf: leaf[1], memory))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1, 1], b, atol=1e-5), many, one)
    assert jax.tree.map(jnp.shape, network.init_memory((4, 5))) == jax.tree.map(
        lambda leaf: (4, 5, *leaf.shape[1:]), memory
    )


def test_the_cell_is_the_equation():
    network, params, obs, memory, _ = recurrent("gru")
    core = params["params"]["core"]
    torso = params["params"]["torso"]["Dense_0"]
    x, h = np.tanh(obs[0] @ torso["kernel"] + torso["bias"]), np.asarray(memory)
    wx = np.split(np.asarray(x @ core["inputs"]["kernel"] + core["inputs"]["bias"]), 3, axis=1)
    uh = np.split(np.asarray(h @ core["recurrent"] + core["bias"]), 3, axis=1)
    r, z = (1 / (1 + np.exp(-wx[i] - uh[i])) for i in range(2))
    expected = (1 - z) * np.tanh(wx[2] + r * uh[2]) + z * h
    np.testing.assert_allclose(network.apply(params, obs[0], memory)[1], expected, atol=1e-5)
    start = networks.GRU(6).init(jax.random.key(0), jnp.zeros(4), jnp.zeros(6))["params"]
    for square in np.split(np.asarray(start["recurrent"]), 3, axis=1):
        np.testing.assert_allclose(square.T @ square, np.eye(6), atol=1e-5)


def test_a_q_network_and_a_mask():
    env = action_mask(jrl.make("CartPole-v1"), lambda obs, params: jnp.stack([obs[0] > 0.0, jnp.bool_(True)]))
    network = networks.mask_aware(
        networks.q_network(env, TORSO, dueling=True, core=CORES["gru"]), jrl.ops.masked
    )
    memory, reset = network.init_memory((B,)), jnp.zeros((T, B), bool)
    obs = MaskedObservation(jnp.ones((T, B, 4)), jnp.broadcast_to(jnp.array([False, True]), (T, B, 2)))
    params = network.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], obs), memory)
    q, _ = networks.apply_sequence(network, params, obs, memory, reset)
    assert q.shape == (T, B, 2)
    assert (q[..., 0] == jnp.finfo(jnp.float32).min).all()
    unmasked, _ = networks.apply_sequence(network, params, obs.obs, memory, reset)
    np.testing.assert_array_equal(q[..., 1], unmasked[..., 1])


def test_without_a_memory_a_sequence_is_a_batch():
    network = networks.actor_critic(jrl.make("CartPole-v1"), TORSO)
    params = network.init(jax.random.key(0), jnp.zeros(4), ())
    obs = jax.random.normal(jax.random.key(1), (T, B, 4))
    out, memory = networks.apply_sequence(network, params, obs, (), jnp.zeros((T, B), bool))
    assert memory == ()
    jax.tree.map(np.testing.assert_array_equal, out, network.apply(params, obs, ())[0])


def test_an_episode_that_ended_resets_the_next_step():
    ended = jnp.array([[False], [True], [False], [True]])
    np.testing.assert_array_equal(networks.reset_before(ended)[:, 0], [False, False, True, False])


def test_heads_that_do_not_divide_the_size():
    core = networks.WindowTransformer(6, num_heads=4)
    with pytest.raises(ValueError, match=r"size=6 cannot be split over num_heads=4"):
        core.init(jax.random.key(0), jnp.zeros(3), core.init_memory(()))
