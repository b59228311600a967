"""Normalising wrappers of vectorised environments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, normalize
from jrl.types import Discrete, MaskedObservation


def noisy(limit=5):
    """Observation: a draw around 100; the first of an episode around 0. Reward: 3 times a draw."""

    def reset(key, params):
        obs = jax.random.normal(key, (2,))
        return 0, {"x": obs, "n": jnp.zeros((), jnp.int32)}

    def transition(key, time, action, params):
        obs = 100.0 + jax.random.normal(key, (2,))
        return time + 1, {"x": obs, "n": time + 1}, 3.0 * obs[0] - 300.0, time >= 7, time + 1 >= params

    return envs.from_functions(reset, transition, limit, Discrete(2), "Noisy")


def rollout(env, steps, num_envs, params=None):
    params = env.params if params is None else params

    @jax.jit
    def go(params):
        env_state, obs = env.reset(jax.random.key(0), params)

        def step(env_state, key):
            env_state, out = env.step(key, env_state, jnp.zeros(num_envs, jnp.int32), params)
            return env_state, (out, env_state)

        _, (out, states) = jax.lax.scan(step, env_state, jax.random.split(jax.random.key(1), steps))
        return obs, out, states

    return jax.device_get(go(params))


def test_observation():
    steps, num_envs = 12, 3
    plain = envs.vectorize(noisy(), num_envs)
    env = envs.normalize_observation(plain)
    first_raw, raw, _ = rollout(plain, steps, num_envs)
    first, out, states = rollout(env, steps, num_envs)
    assert env.observation == {
        "x": jax.ShapeDtypeStruct((2,), jnp.float32),
        "n": jax.ShapeDtypeStruct((), jnp.float32),
    }
    assert raw.truncated.any()
    seen = first_raw["x"]
    np.testing.assert_allclose(first["x"], np.clip((seen - seen.mean(0)) / seen.std(0), -10, 10), rtol=1e-4)
    for t in range(steps):
        seen = np.concatenate([seen, raw.obs["x"][t]])  # the observations shown, not the final ones
        mean, std = seen.mean(0, dtype=np.float64), seen.std(0, dtype=np.float64)
        np.testing.assert_allclose(states.statistics.count[t], len(seen))
        for ours, theirs in ((out.obs, raw.obs), (out.next_obs, raw.next_obs)):
            np.testing.assert_allclose(
                ours["x"][t], np.clip((theirs["x"][t] - mean) / std, -10, 10), atol=2e-4
            )
    ended = raw.terminated | raw.truncated
    assert (out.obs["x"][ended] < out.next_obs["x"][ended]).all()  # near 0 against near 100
    np.testing.assert_array_equal(out.reward, raw.reward)


def test_frozen_observation():
    plain = envs.vectorize(noisy(), 3)
    spec = plain.observation
    statistics = normalize.init_statistics(spec)
    statistics = statistics._replace(
        count=jnp.float32(4.0),
        mean={"x": jnp.full(2, 100.0), "n": jnp.float32(2.0)},
        m2={"x": jnp.full(2, 16.0), "n": jnp.float32(4.0)},
    )
    env = envs.normalize_observation(plain, statistics, clip=30.0)
    first_raw, raw, _ = rollout(plain, 8, 3)
    first, out, _ = rollout(env, 8, 3)
    np.testing.assert_allclose(first["x"], np.maximum((first_raw["x"] - 100) / 2, -30), rtol=1e-5)
    np.testing.assert_allclose(out.obs["x"], np.maximum((raw.obs["x"] - 100) / 2, -30), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.next_obs["n"], raw.next_obs["n"] - 2.0, rtol=1e-5)
    # new statistics are new parameters, not a new environment
    other = env.params._replace(statistics=statistics._replace(mean={"x": jnp.zeros(2), "n": jnp.float32(0)}))
    _, out, _ = rollout(env, 8, 3, other)
    np.testing.assert_allclose(out.next_obs["x"], 30.0)


def test_a_mask_is_not_normalised():
    env = envs.action_mask(noisy(), lambda obs, params: jnp.array([True, False]))
    env = envs.normalize_observation(envs.vectorize(env, 2))
    first, out, _ = rollout(env, 3, 2)
    assert isinstance(first, MaskedObservation)
    assert out.next_obs.action_mask.dtype == np.bool_
    assert not out.obs.action_mask[..., 1].any()


def test_reward():
    steps, num_envs, gamma = 14, 3, 0.9
    plain = envs.vectorize(noisy(), num_envs)
    env = envs.normalize_reward(plain, gamma)
    _, raw, _ = rollout(plain, steps, num_envs)
    _, out, states = rollout(env, steps, num_envs)
    ended = raw.terminated | raw.truncated
    assert ended.any()
    running, returns = np.zeros(num_envs), []
    for t in range(steps):
        running = gamma * running + raw.reward[t]
        returns.append(running)
        scaled = np.clip(raw.reward[t] / np.sqrt(np.var(returns) + 1e-8), -10, 10)
        np.testing.assert_allclose(out.reward[t], scaled, rtol=1e-3, atol=1e-5)
        running = np.where(ended[t], 0.0, running)
        np.testing.assert_allclose(states.scaling.running_return[t], running, rtol=1e-3, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, out.next_obs, raw.next_obs)


def test_both_wrap_each_other():
    env = envs.normalize_reward(envs.normalize_observation(envs.vectorize(noisy(), 3)), 0.9)
    _, out, _ = rollout(env, 6, 3)
    assert np.isfinite(out.reward).all()
    assert np.abs(out.obs["x"]).max() <= 10.0


@pytest.mark.parametrize("wrapper", [envs.normalize_observation, envs.normalize_reward])
def test_a_single_environment_is_refused(wrapper):
    env = wrapper(noisy())
    with pytest.raises(ValueError, match=rf"{wrapper.__name__}\(Noisy\).*after jrl.envs.vectorize"):
        env.reset(jax.random.key(0), env.params)
