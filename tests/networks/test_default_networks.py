"""The networks that ``make`` builds, for each kind of observation, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, networks, ppo
from jrl.envs import from_functions
from jrl.types import Box, Discrete

KEY = jax.random.key(0)
PPO = {"num_envs": 2, "unroll_length": 4, "num_epochs": 1, "num_minibatches": 2, "hidden_sizes": (4,)}


def observing(obs, action=None, name="test environment"):
    """An environment that always shows ``obs`` and never ends."""

    def transition(key, state, action, params):
        return state, obs, 1.0, False, False

    return from_functions(lambda key, params: ((), obs), transition, (), action or Discrete(2), name)


VECTOR = observing(jnp.zeros(3))
MIXED = observing({"image": jnp.ones((2, 2), jnp.uint8), "flag": jnp.bool_(True), "x": jnp.ones(3)})


def step_once(algo, hparams):
    state, metrics = jrl.train(algo, jax.jit(algo.init)(KEY, hparams), hparams, num_steps=1)
    assert np.isfinite(metrics["loss"]).all()
    return state


def test_ppo_on_a_dict_of_mixed_types():
    state = step_once(ppo.make(MIXED, ppo.Config(**PPO, normalize_observations=True)), ppo.HParams())
    assert state.params["params"]["MLP_0"]["Dense_0"]["kernel"].shape == (4 + 1 + 3, 4)
    assert state.rollout.obs["image"].dtype == jnp.uint8


def test_ppo_on_frozen_lake_sees_one_hot_vectors():
    env = jrl.make("FrozenLake-misc")
    state = step_once(ppo.make(env, ppo.Config(**PPO)), ppo.HParams())
    np.testing.assert_array_equal(state.rollout.obs.sum(-1), [1.0, 1.0])
    assert state.params["params"]["MLP_0"]["Dense_0"]["kernel"].shape == (16, 4)


def test_auto_takes_a_cnn_for_images_and_an_mlp_for_the_rest():
    def torso(shape, **choices):
        algo = ppo.make(observing(jnp.zeros(shape)), ppo.Config(**PPO, **choices))
        return set(jax.eval_shape(algo.init, KEY, ppo.HParams()).params["params"])

    assert {"CNN_0", "CNN_1"} <= torso((5, 5, 2))
    assert {"MLP_0", "MLP_1"} <= torso((5, 5, 2), torso="mlp")
    assert {"MLP_0", "MLP_1"} <= torso((5, 5))
    assert torso((5, 5, 2), shared_torso=True) == {"CNN_0", "PolicyHead_0", "Dense_0"}


def test_dqn_makes_a_cnn_and_takes_dueling_from_its_config():
    network = networks.q_network(observing(jnp.zeros((4, 4, 1))), dqn.Config(), dueling=True)
    params = jax.eval_shape(network.init, KEY, jnp.zeros((4, 4, 1)), ())["params"]
    assert set(params) == {"CNN_0", "Dense_0", "Dense_1"}
    algo = dqn.make(VECTOR, dqn.Config(dueling=True))
    assert len(jax.eval_shape(algo.init, KEY, dqn.HParams()).params["params"]) == 3


def test_a_q_network_needs_discrete_actions():
    env = VECTOR._replace(action=Box((1,), -1.0, 1.0))
    for network in (networks.q_network, networks.implicit_q_network):
        with pytest.raises(TypeError, match=r"on test environment with actions Box.*discretize_actions"):
            network(env, dqn.Config())


@pytest.mark.parametrize("module", [ppo, dqn])
def test_a_cnn_needs_an_image(module):
    for env, shapes in ((VECTOR, r"\(3,\)"), (MIXED, r"\(\), \(2, 2\), \(3,\)")):
        message = rf"torso='cnn' on test environment: .* this environment's are {shapes}; use torso='mlp'"
        with pytest.raises(ValueError, match=message):
            module.make(env, module.Config(torso="cnn"))


@pytest.mark.parametrize("module", [ppo, dqn])
def test_an_image_too_small_for_its_convolutions(module):
    env = observing(jnp.zeros((6, 4, 1)))
    with pytest.raises(
        ValueError, match=r"channels=\(8, 8\) on images \(6, 4, 1\): .* both must be at least 5"
    ):
        module.make(env, module.Config(channels=(8, 8)))
    module.make(env, module.Config(channels=(8,)))


def test_a_box_of_rank_two_is_refused():
    env = observing(jnp.zeros(3), action=Box((2, 3), -1.0, 1.0))
    with pytest.raises(
        ValueError, match=r"Box\(shape=\(2, 3\)\): policy heads need a vector of actions, shape \(n,\)"
    ):
        ppo.make(env)


@pytest.mark.parametrize("module", [ppo, dqn])
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"torso": "rnn"}, "torso='rnn': must be 'auto', 'mlp' or 'cnn'"),
        ({"activation": "sine"}, "activation='sine': must be one of tanh, relu, elu, gelu, silu"),
        ({"hidden_sizes": ()}, r"hidden_sizes=\(\): needs one or more layers"),
        (
            {"hidden_sizes": (8, 0)},
            r"hidden_sizes=\(8, 0\): needs one or more layers, each of at least 1 unit",
        ),
        ({"channels": (-1,)}, r"channels=\(-1,\): needs one or more layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_no_network_can_have(module, choices, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**choices)
