"""The plane with a goal: where a straight walk leads, and how episodes end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl


def walk(env, params, action, steps):
    state, obs = env.reset(jax.random.key(0), params)
    assert obs.tolist() == [0.0, 0.0]

    def step(state, key):
        state, out = env.step(key, state, action, params)
        return state, out

    return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), steps))[1]


def test_a_straight_walk_ends_at_the_goal():
    env = jrl.make("Navigation2D-jrl", params={"goal": np.array([0.3, -0.3])})
    out = walk(env, env.params, jnp.array([9.0, -1.0]), 4)  # 9 is clipped to 1
    np.testing.assert_allclose(out.next_obs[:3], [[0.1, -0.1], [0.2, -0.2], [0.3, -0.3]], atol=1e-6)
    np.testing.assert_allclose(out.reward[:3], [-np.sqrt(0.08), -np.sqrt(0.02), 0.0], atol=1e-6)
    assert out.terminated.tolist() == [False, False, True, False]
    np.testing.assert_allclose(out.obs[2:], [[0.0, 0.0], [0.1, -0.1]], atol=1e-6)  # begun anew
    assert not out.truncated.any()


def test_a_point_that_stays_is_cut_off_after_100_steps():
    env = jrl.make("Navigation2D-jrl")
    out = walk(env, env.params, jnp.zeros(2), 100)
    np.testing.assert_allclose(out.reward, -0.5, atol=1e-6)  # of the default goal, (0.3, 0.4)
    assert not out.terminated.any()
    assert out.truncated.tolist() == [False] * 99 + [True]


def test_an_unknown_parameter():
    with pytest.raises(ValueError, match="Navigation2D-jrl: params has no field 'speed'"):
        jrl.make("Navigation2D-jrl", params={"speed": 1.0})
