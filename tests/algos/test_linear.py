"""Linear action values: MountainCar, Baird's counterexample, and tile coding by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import linear
from jrl.envs import counterexamples, to_mdp
from jrl.ops import mdp


def learn(algo, hparams, num_steps, learners):
    states = jax.jit(jax.vmap(algo.init, (0, None)))(jax.random.split(jax.random.key(0), learners), hparams)
    run = jax.jit(jax.vmap(lambda state: jrl.train(algo, state, hparams, num_steps=num_steps)))
    return jax.device_get(run(states))


def test_sarsa_lambda_drives_the_mountain_car():
    """Sutton and Barto, section 10.1 and 12.7: 8 tilings of 8 × 8, λ = 0.9; the first 500 episodes, no limit."""
    env = jrl.make("MountainCar-v0", params={"max_steps_in_episode": 100_000})
    _, metrics = learn(linear.make(env), linear.HParams(), 1000, learners=2)
    episodes = np.cumsum(metrics["num_episodes"], axis=1)
    assert (episodes[:, -1] >= 500).all()
    late = (episodes > 400) & (episodes <= 500)
    length = np.average(metrics["episode_length"], weights=metrics["num_episodes"] * late)
    assert length <= 130


def test_bairds_counterexample_diverges_unless_a_target_network_holds_it():
    features = jnp.asarray(counterexamples.BAIRD_FEATURES)
    norm = {}
    for target_network in (False, True):
        config = linear.Config(target="q_learning", trace="none", target_network=target_network)
        algo = linear.make(
            jrl.make("Baird-jrl", raw=True), config, features=lambda obs: features[obs]
        )  # fmt: skip
        hparams = linear.HParams(
            learning_rate=0.1, gamma=0.99, epsilon_start=1.0, initial_scale=1.0, target_period=500.0
        )
        state, metrics = learn(algo, hparams, 1500, learners=4)
        norm[target_network] = metrics["weight_norm"]
    assert (norm[False][:, 500] > 1e10).all()
    assert norm[True].max() < 100
    # Rewards are 0, and so are all values; what is left of them goes on shrinking.
    q = np.einsum("sd,lad->lsa", features, state.params)
    assert np.abs(q).max() < 10
    assert (norm[True][:, -1] < norm[True].max(1) / 2).all()


def test_one_hot_features_are_a_table():
    env = jrl.make("GridWorld-jrl")
    config = linear.Config(target="q_learning", trace="none")
    state, _ = learn(linear.make(env, config), linear.HParams(gamma=0.9, epsilon_start=1.0), 800, learners=4)
    q = mdp.policy_iteration(to_mdp(env, 0.9).mdp).q
    np.testing.assert_allclose(state.params, np.broadcast_to(np.asarray(q).T, (4, 4, 16)), atol=1e-3)


def test_tiles_by_hand():
    """Two tilings of a line in [0, 4) with four tiles: the second is half a tile ahead."""
    features = linear.tile_coding([0.0], [4.0], num_tilings=2, tiles=4)
    for x, first, second in ((0.0, 0, 0), (0.6, 0, 1), (1.2, 1, 1), (3.9, 3, 4), (9.0, 4, 4), (-1.0, 0, 0)):
        expected = np.concatenate([np.eye(5)[first], np.eye(5)[second]])
        np.testing.assert_array_equal(features(jnp.array([x])), expected)
    features = linear.tile_coding([0, 0], [1, 1], num_tilings=4, tiles=3)
    x = features(jnp.array([[0.5, 0.2], [0.1, 0.9]]))
    assert x.shape == (2, 4 * 16)
    np.testing.assert_array_equal(x.sum(-1), 4)
    # Near observations share tiles, far ones none.
    near, far = features(jnp.array([0.52, 0.22])), features(jnp.array([0.99, 0.99]))
    assert (near * x[0]).sum() >= 3
    assert (far * x[1]).sum() == 0


def test_what_is_wrong_is_named():
    with pytest.raises(
        ValueError, match=r"linear on CartPole-v1: the bounds of its observation .* low=.*high="
    ):
        linear.make(jrl.make("CartPole-v1"))
    with pytest.raises(ValueError, match=r"low has shape \(2,\), the observation is .*; give one bound"):
        linear.make(jrl.make("CartPole-v1"), low=(0, 0), high=(1, 1))
    with pytest.raises(ValueError, match=r"tile_coding\(low=\[1.\], high=\[0.\]\): needs finite vectors"):
        linear.tile_coding([1.0], [0.0], num_tilings=2, tiles=2)
    with pytest.raises(TypeError, match=r"linear on Pendulum-v1 with actions .*discretize_actions"):
        linear.make(jrl.make("Pendulum-v1"))
    masked = jrl.envs.action_mask(jrl.make("CartPole-v1"), lambda obs, params: jnp.array([True, False]))
    with pytest.raises(
        TypeError, match=r"linear on .*CartPole-v1.* with a mask of its actions.*use jrl\.dqn"
    ):
        linear.make(masked, features=lambda obs: obs.obs)
    with pytest.raises(ValueError, match=r"target='dqn': must be one of sarsa, q_learning"):
        linear.Config(target="dqn")
