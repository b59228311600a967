"""Anything with ``init`` and ``apply`` is a network; what does not fit is named."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jrl
from jrl import checkpoint, dqn, envs, networks, ops, ppo
from jrl.types import Box, MaskedObservation, MultiDiscrete, Network

KEY = jax.random.key(0)
ENV = jrl.make("ProbeObservation-jrl")  # one number, two actions
SMALL_PPO = ppo.Config(num_envs=2, unroll_length=4, num_epochs=1, num_minibatches=2, hidden_sizes=(4,))
SMALL_DQN = dqn.Config(num_envs=2, batch_size=4, capacity=16, warmup_env_steps=8, hidden_sizes=(4,))


class Linen(nn.Module):
    actions: int = 2
    values: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, obs):
        value = nn.Dense(1)(obs)
        return nn.Dense(self.actions)(obs), value.reshape(*obs.shape[:-1], *self.values)


class Pair(NamedTuple):
    init: Any
    apply: Any


def linear_init(key, obs):
    return {"w": jax.random.normal(key, (obs.shape[-1], 2))}


def linear_apply(params, obs):
    return obs @ params["w"], obs.sum(-1)


class Remembering:
    """A network whose memory is the sum of what it saw."""

    def init(self, key, obs, memory):
        return {"w": jax.random.normal(key, (obs.shape[-1], 2))}

    def apply(self, params, obs, memory):
        memory = memory + obs.sum(-1)
        return (obs @ params["w"], memory), memory

    def init_memory(self, batch_shape):
        return jnp.zeros(batch_shape)


class Functions:
    init = staticmethod(linear_init)
    apply = staticmethod(linear_apply)


@pytest.mark.parametrize(
    "network",
    [Linen(), Pair(linear_init, linear_apply), (linear_init, linear_apply), Functions, Network(
        lambda key, obs, memory: linear_init(key, obs), lambda p, obs, memory: (linear_apply(p, obs), memory)
    )],
    ids=["linen", "named-tuple", "pair", "functions", "network"],
)  # fmt: skip
def test_what_has_init_and_apply_is_a_network(network):
    adapted = networks.as_network(network)
    assert isinstance(adapted, Network)
    assert adapted.init_memory((3,)) == ()
    params = adapted.init(KEY, jnp.zeros(1), ())
    for batch in ((), (3,), (2, 3)):
        (head, value), memory = adapted.apply(params, jnp.ones((*batch, 1)), ())
        assert head.shape == (*batch, 2)
        assert value.shape == batch
        assert memory == ()
    algo = ppo.make(ENV, SMALL_PPO, network=network)
    state = jax.eval_shape(algo.init, KEY, ppo.HParams())
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_a_network_is_taken_as_it_is():
    network = Network(linear_init, linear_apply)
    assert networks.as_network(network) is network


def test_a_network_with_a_memory():
    network = networks.as_network(Remembering())
    memory = network.init_memory((2,))
    params = network.init(KEY, jnp.ones((2, 3)), memory)
    _, memory = network.apply(params, jnp.ones((2, 3)), memory)
    (_, value), memory = network.apply(params, jnp.ones((2, 3)), memory)
    np.testing.assert_array_equal(memory, [6.0, 6.0])
    np.testing.assert_array_equal(value, memory)


def test_algorithms_of_single_steps_refuse_a_memory():
    network = Network(linear_init, lambda p, o, m: (o @ p["w"], m), Remembering().init_memory)
    with pytest.raises(ValueError, match=r"make\(network=…\) has a memory: .* single steps"):
        dqn.make(ENV, network=network)


@pytest.mark.parametrize(
    "network", [3, object(), linear_apply, (linear_init, 3), (linear_init,), "mlp", Linen.apply]
)
def test_what_has_neither_is_refused(network):
    with pytest.raises(
        TypeError, match=r"network=.*needs init\(key, obs\) -> params and apply\(params, obs\)"
    ):
        networks.as_network(network)


def test_an_nnx_module_is_pointed_to_its_adapter():
    with pytest.raises(TypeError, match=r"wrap an nnx module in jrl\.networks\.from_nnx"):
        ppo.make(ENV, network=Nnx(nnx.Rngs(0)))


# ------------------------------------------------------------------------------------------------ nnx


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(1, 8, rngs=rngs)
        self.policy = nnx.Linear(8, 2, rngs=rngs)
        self.value = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, obs):
        features = jnp.tanh(self.hidden(obs))
        return self.policy(features), self.value(features)[..., 0]


def test_nnx_params_are_a_plain_pytree_with_names():
    network = networks.from_nnx(Nnx)
    params = network.init(KEY, jnp.zeros(1))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert jax.tree.map(jnp.shape, params["trained"]) == {
        "hidden": {"kernel": (1, 8), "bias": (8,)},
        "policy": {"kernel": (8, 2), "bias": (2,)},
        "value": {"kernel": (8, 1), "bias": (1,)},
    }
    assert params["fixed"] == {}
    reference = Nnx(nnx.Rngs(KEY))
    (head, value), memory = network.apply(params, jnp.ones((2, 3, 1)), ())
    np.testing.assert_allclose(head, reference(jnp.ones((2, 3, 1)))[0], rtol=1e-6)
    assert value.shape == (2, 3)
    assert memory == ()


def test_nnx_init_is_vmappable_and_depends_on_the_key():
    network = networks.from_nnx(Nnx)
    keys = jax.random.split(KEY, 3)
    members = jax.jit(jax.vmap(lambda key: network.init(key, jnp.zeros(1))))(keys)
    kernels = members["trained"]["policy"]["kernel"]
    assert kernels.shape == (3, 8, 2)
    assert (kernels[0] != kernels[1]).all()
    alone = network.init(keys[1], jnp.zeros(1))["trained"]["policy"]["kernel"]
    np.testing.assert_allclose(kernels[1], alone, rtol=1e-6)


class Averaged(nnx.Module):
    """A module with state that is not to be trained."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, use_running_average=True, rngs=rngs)
        self.inner = Nnx(rngs)

    def __call__(self, obs):
        return self.inner(self.norm(obs))


def test_nnx_running_averages_are_not_trained():
    algo = ppo.make(ENV, SMALL_PPO, network=networks.from_nnx(Averaged))
    hparams = ppo.HParams(learning_rate=0.1)
    state = jax.jit(algo.init)(KEY, hparams)
    after, _ = jrl.train(algo, state, hparams, num_steps=2)
    fixed = after.params["fixed"]["norm"]
    np.testing.assert_array_equal(fixed["mean"], jnp.zeros(1))
    np.testing.assert_array_equal(fixed["var"], jnp.ones(1))
    assert (after.params["trained"]["norm"]["scale"] != state.params["trained"]["norm"]["scale"]).all()


def test_running_averages_of_a_linen_module_are_not_trained():
    """Its loss has a gradient for them, and a variance that follows one becomes negative some day."""

    class Normalizing(nn.Module):
        @nn.compact
        def __call__(self, obs):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(obs + 1.0))

    network = networks.as_network(Normalizing())
    params = network.init(KEY, jnp.ones((2, 1)), ())
    grads = jax.grad(lambda params: network.apply(params, jnp.ones((2, 1)), ())[0].sum())(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["batch_stats"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["params"]["Dense_0"]))


def test_nnx_random_streams_and_instances_are_refused():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(TypeError, match=r"from_nnx: the module has state .* a random stream or a counter"):
        networks.from_nnx(Dropping)
    with pytest.raises(TypeError, match=r"from_nnx\(Nnx instance\): give a function that makes it"):
        networks.from_nnx(Nnx(nnx.Rngs(0)))


def test_nnx_trains_with_ppo_and_its_state_is_restored_by_name(tmp_path):
    algo = ppo.make(ENV, SMALL_PPO, network=networks.from_nnx(Nnx))
    hparams = ppo.HParams()
    state = jax.jit(algo.init)(KEY, hparams)
    after, metrics = jrl.train(algo, state, hparams, num_steps=1)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(jax.tree.leaves(changed))
    assert np.isfinite(metrics["loss"]).all()
    checkpoint.save(tmp_path, after, step=1)
    restored = checkpoint.restore(tmp_path, like=jax.eval_shape(algo.init, KEY, hparams))
    jax.tree.map(np.testing.assert_array_equal, restored.params, after.params)


# ------------------------------------------------------------------------------------ widths that do not fit


def test_ppo_names_a_policy_head_of_the_wrong_width():
    message = r"network's policy head is \(3,\) for one observation, but Discrete\(n=2\) needs \(2,\): change the width"
    with pytest.raises(ValueError, match=message):
        ppo.make(ENV, network=Linen(actions=3))


def test_ppo_names_a_value_that_is_no_scalar():
    with pytest.raises(
        ValueError, match=r"network's value is \(1,\) for one observation: it must be a scalar, \(\)"
    ):
        ppo.make(ENV, network=Linen(values=(1,)))


def test_ppo_names_an_output_that_is_no_pair():
    with pytest.raises(ValueError, match=r"network returns \(2,\): PPO needs \(policy head, value\)"):
        ppo.make(ENV, network=nn.Dense(2))


@pytest.mark.parametrize(
    ("action", "needs"),
    [
        (MultiDiscrete((2, 3)), r"MultiDiscrete\(ns=\(2, 3\)\) needs \(5,\)"),
        (Box((3,), -1.0, 1.0), r"Box\(.*\) needs \(3,\) and \(3,\)"),
    ],
    ids=["multi-discrete", "box"],
)
def test_ppo_names_what_other_spaces_need(action, needs):
    with pytest.raises(
        ValueError, match=rf"(?s)network's policy head is \(2,\) for one observation, but {needs}"
    ):
        ppo.make(ENV._replace(action=action), network=Linen())


def test_dqn_names_a_wrong_width():
    message = (
        r"network returns \(3,\) for one observation, but Discrete\(n=2\) needs \(2,\) action values: change"
    )
    with pytest.raises(ValueError, match=message):
        dqn.make(ENV, network=nn.Dense(3))


def test_dqn_names_a_pair():
    with pytest.raises(ValueError, match=r"network returns tuple of shapes \(2,\), \(\) for one observation"):
        dqn.make(ENV, network=Linen())


# ------------------------------------------------------------------------------------------- observations


def test_flattener_joins_leaves_of_any_shape_and_dtype():
    spec = {
        "a": jax.ShapeDtypeStruct((2, 2), jnp.uint8),
        "b": jax.ShapeDtypeStruct((), jnp.int32),
        "c": jax.ShapeDtypeStruct((3,), jnp.bool_),
    }
    flatten = networks.observation_flattener(spec)
    # uint8 is the dtype of pixels, which are scaled.
    joined = np.array([*(np.array([1, 2, 3, 250]) / np.float32(255)), -7, 1, 0, 1], np.float32)
    for batch in ((), (4,), (2, 4)):
        obs = {
            "a": jnp.broadcast_to(jnp.array([[1, 2], [3, 250]], jnp.uint8), (*batch, 2, 2)),
            "b": jnp.full(batch, -7, jnp.int32),
            "c": jnp.broadcast_to(jnp.array([True, False, True]), (*batch, 3)),
        }
        out = flatten(obs)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, np.broadcast_to(joined, (*batch, 8)), rtol=1e-6)


def test_flattener_of_one_array():
    flatten = networks.observation_flattener(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert flatten(jnp.zeros((5, 2, 3))).shape == (5, 6)


def test_mask_aware_shows_the_observation_and_masks_the_output():
    network = networks.mask_aware(networks.as_network(nn.Dense(3)), ops.masked)
    mask = jnp.array([[True, False, True], [False, True, True]])
    obs = MaskedObservation(jnp.ones((2, 4)), mask)
    params = network.init(KEY, obs, ())
    assert params["params"]["kernel"].shape == (4, 3)
    plain, _ = network.apply(params, obs.obs, ())
    out, memory = network.apply(params, obs, ())
    assert memory == ()
    np.testing.assert_array_equal(out[mask], plain[mask])
    assert (out[~mask] == jnp.finfo(jnp.float32).min).all()
    jax.tree.map(np.testing.assert_array_equal, network.init(KEY, obs.obs, ()), params)


@pytest.mark.parametrize("module", [ppo, dqn])
def test_no_algorithm_takes_a_masked_action(module):
    env = envs.action_mask(
        jrl.make("ProbePolicy-jrl"), lambda obs, params: jnp.stack([obs[0] > 0, obs[0] < 0])
    )
    config = SMALL_PPO if module is ppo else SMALL_DQN
    algo = module.make(env, config)
    state = jax.jit(algo.init)(KEY, module.HParams())
    obs = MaskedObservation(jnp.ones((64, 1)), jnp.tile(jnp.array([[True, False], [False, True]]), (32, 1)))
    for policy in (algo.policy(state), algo.policy(state, greedy=False)):
        action, _, _ = policy(jax.random.key(3), obs, ())
        np.testing.assert_array_equal(action, [0, 1] * 32)
