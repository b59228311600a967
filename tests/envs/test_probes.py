"""The probes are what they say: their values against the Bellman equation, run through the environments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl.envs import probes
from jrl.types import Box, Discrete

DISCRETE = [p for p in probes.PROBES if p.action_values is not None]


def rollout(env, steps=200, params=None):
    params = env.params if params is None else params

    @jax.jit
    def go(params):
        env_state, obs = env.reset(jax.random.key(0), params)

        def step(carry, key):
            env_state, obs = carry
            action_key, key = jax.random.split(key)
            action = env.action.sample(action_key)
            env_state, out = env.step(key, env_state, action, params)
            return (env_state, out.obs), (obs, action, out)

        return jax.lax.scan(step, (env_state, obs), jax.random.split(jax.random.key(1), steps))[1]

    return jax.device_get(go(params))


@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda p: p.id)
def test_made_by_id(probe):
    env = jrl.make(probe.id)
    assert env.name == probe.id
    assert probe.env is probe.env
    assert env.observation == jax.ShapeDtypeStruct(probe.observations.shape[1:], jnp.float32)
    assert isinstance(env.action, Discrete | Box)
    assert probe.value(0.9).shape == (len(probe.observations),)


@pytest.mark.parametrize("probe", [p for p in DISCRETE if p is not probes.MEMORY], ids=lambda p: p.id)
def test_values_satisfy_the_bellman_equation(probe):
    """``E[r + γ (1 - terminated) V(next_obs)] = Q(obs, action)``, for every pair that occurs."""
    gamma = 0.9
    obs, action, out = rollout(probe.env)
    q, value = probe.q(gamma), probe.value(gamma)

    def index(x):
        match = (x[:, None] == probe.observations[None]).all(-1)
        assert match.any(1).all()  # every observation is among those listed
        return match.argmax(1)

    here, there = index(obs), index(out.next_obs)
    target = out.reward + gamma * (1 - out.terminated) * value[there]
    for k in range(len(probe.observations)):
        for a in range(q.shape[1]):
            targets = target[(here == k) & (action == a)]
            assert len(targets) > 0
            np.testing.assert_allclose(targets, q[k, a], rtol=1e-6)  # the probes are deterministic


@pytest.mark.parametrize("probe", DISCRETE, ids=lambda p: p.id)
def test_optimal_actions(probe):
    q = probe.q(0.9)
    if probe.optimal_actions is None:
        np.testing.assert_array_equal(q, q[:, :1].repeat(q.shape[1], 1))
    else:
        np.testing.assert_array_equal(q.argmax(1), probe.optimal_actions)


def test_truncation_never_terminates():
    for max_steps in (5, 10):
        env = jrl.make("ProbeTruncation-jrl", params={"max_steps": max_steps})
        _, _, out = rollout(env, 20)
        assert not out.terminated.any()
        np.testing.assert_array_equal(np.flatnonzero(out.truncated) + 1, np.arange(max_steps, 21, max_steps))
    np.testing.assert_allclose(probes.TRUNCATION.value(0.9), [10.0])
    np.testing.assert_allclose(probes.TRUNCATION.value(0.9, probes.LimitParams(reward=2.0)), [20.0])


def test_successor_is_not_the_reset_observation():
    obs, _, out = rollout(probes.SUCCESSOR.env, 6)
    np.testing.assert_array_equal(obs[:, 0], [0, 1] * 3)
    np.testing.assert_array_equal(out.next_obs[:, 0], 1)
    np.testing.assert_array_equal(out.truncated, [False, True] * 3)
    np.testing.assert_allclose(probes.SUCCESSOR.value(0.9), [9.0, 10.0])


def test_both_flags():
    _, _, out = rollout(probes.BOTH_FLAGS.env, 4)
    assert (out.terminated & out.truncated).all()


def test_parameters_are_traced():
    env = probes.TRUNCATION.env
    lengths = jax.vmap(lambda n: jnp.float32(n))(jnp.array([2, 3]))

    def truncations(max_steps):
        params = env.params._replace(max_steps=max_steps)
        env_state, _ = env.reset(jax.random.key(0), params)
        keys = jax.random.split(jax.random.key(1), 6)
        return jax.lax.scan(lambda s, k: env.step(k, s, 0, params), env_state, keys)[1].truncated.sum()

    np.testing.assert_array_equal(jax.vmap(truncations)(lengths), [3, 2])


def test_continuous():
    probe = probes.CONTINUOUS
    obs, action, out = rollout(probe.env, 20)
    np.testing.assert_allclose(out.reward, -((action - 0.5 * obs)[:, 0] ** 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(probe.value(0.9), [0, 0])
    with pytest.raises(ValueError, match="ProbeContinuous-jrl: actions are continuous"):
        probe.q(0.9)


@pytest.mark.parametrize("delay", [1, 3])
def test_memory(delay):
    env = probes.MEMORY.make({"delay": delay})
    obs, action, out = rollout(env, 12 * (delay + 1))
    obs, action, out = jax.tree.map(lambda x: x.reshape(12, delay + 1, *x.shape[1:]), (obs, action, out))
    cue = obs[:, 0, 0]
    assert set(cue) == {-1.0, 1.0}
    np.testing.assert_array_equal(obs[:, 0, 1], 0)
    np.testing.assert_array_equal(obs[:, 1:, 0], 0)
    np.testing.assert_array_equal(obs[:, 1:-1, 1], 0)
    np.testing.assert_array_equal(obs[:, -1, 1], 1)
    np.testing.assert_array_equal(out.reward[:, :-1], 0)
    np.testing.assert_array_equal(out.reward[:, -1], np.where((action[:, -1] == 1) == (cue > 0), 1, -1))
    assert out.terminated[:, -1].all()
    assert not out.terminated[:, :-1].any()
    np.testing.assert_allclose(probes.MEMORY.value(0.9, env.params), 0.9**delay)


def test_an_unknown_parameter():
    with pytest.raises(ValueError, match=r"ProbeTruncation-jrl: params has no field 'limit'"):
        jrl.make("ProbeTruncation-jrl", params={"limit": 3})
