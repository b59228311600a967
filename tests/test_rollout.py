"""The unroll against a slow loop over single environments, and its bookkeeping over episodes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import rollout
from jrl.envs import from_functions, vectorize
from jrl.types import Discrete, Policy, Transition

B = 3
LIMITS = np.array([2, 3, 5])


def countdown():
    """Deterministic: the environment's index (its reset order) decides how long an episode is.

    The observation is (index, time), the reward 10 · index + time + action; index 0 terminates after 2
    steps, index 1 is truncated after 3, index 2 does both at once after 5.
    """

    def reset(key, params):
        return (jnp.int32(-1), jnp.int32(0)), jnp.array([-1, 0])

    def transition(key, state, action, params):
        index, time = state
        over = time + 1 >= jnp.asarray(LIMITS)[index]
        reward = params["scale"] * (10 * index + time + action)
        obs = jnp.stack([index, time + 1])
        return (index, time + 1), obs, reward, over & (index != 1), over & (index != 0)

    env = from_functions(reset, transition, {"scale": 1.0}, Discrete(4), "countdown")

    def keep_index(key, env_state, action, params):
        # The next episode has the same index: every environment is a machine of its own.
        state, out = env.step(key, env_state, action, params)
        index = jnp.stack([env_state[0], state[1]])
        return (env_state[0], state[1]), out._replace(obs=index)

    return env._replace(step=keep_index)


ENV = countdown()
ENVS = vectorize(ENV, B)


def start(memory=()):
    state = rollout.start(jax.random.key(0), ENVS, ENV.params, B, memory)
    index = jnp.arange(B, dtype=jnp.int32)
    return state._replace(
        env_state=(index, state.env_state[1]), obs=jnp.stack([index, jnp.zeros_like(index)], axis=1)
    )


def counting_act(params, key, obs, memory):
    """The memory counts the steps since the episode began; the action is a function of observation and memory."""
    action = ((memory["steps"] + obs[..., 0]) % 4).astype(jnp.int32)
    trail = memory["trail"].at[..., 0].add(1.0)
    return action, {"steps": memory["steps"] + 1, "trail": trail}, {"seen": memory["steps"], "obs": obs}


def counting_memory(batch_shape):
    return {"steps": jnp.zeros(batch_shape, jnp.int32), "trail": jnp.full((*batch_shape, 2), 7.0)}


COUNTING = Policy(counting_act, (), counting_memory)


@jax.jit
def unroll_twelve(state):
    return rollout.unroll(jax.random.key(1), ENVS, ENV.params, COUNTING, state, 12)


def slow_loop(length):
    """Each environment alone, one step at a time, in plain Python."""
    rows = {name: np.zeros((length, B)) for name in ("action", "reward", "terminated", "truncated", "seen")}
    rows |= {name: np.zeros((length, B, 2)) for name in ("obs", "next_obs")}
    episodes, returns, lengths = [], np.zeros(B), np.zeros(B, int)
    for b in range(B):
        state, obs, steps = (jnp.int32(b), jnp.int32(0)), jnp.array([b, 0]), 0
        for t in range(length):
            action = (steps + b) % 4
            state, out = ENV.step(jax.random.key(9), state, jnp.int32(action), ENV.params)
            row = {
                "obs": obs, "action": action, "reward": out.reward, "terminated": out.terminated,
                "truncated": out.truncated, "next_obs": out.next_obs, "seen": steps,
            }  # fmt: skip
            for name, value in row.items():
                rows[name][t, b] = value
            returns[b] += out.reward
            lengths[b] += 1
            obs, steps = out.obs, steps + 1
            if out.terminated or out.truncated:
                episodes.append((returns[b], lengths[b]))
                returns[b], lengths[b], steps = 0.0, 0, 0
    return rows, np.array(episodes), returns, lengths


def test_unroll_equals_a_slow_loop():
    state, transitions, metrics = unroll_twelve(start(counting_memory((B,))))
    rows, episodes, returns, lengths = slow_loop(12)
    for name in ("obs", "action", "reward", "terminated", "truncated", "next_obs"):
        np.testing.assert_array_equal(np.asarray(getattr(transitions, name), float), rows[name], err_msg=name)
    np.testing.assert_array_equal(transitions.extras["seen"], rows["seen"])
    np.testing.assert_array_equal(transitions.extras["obs"], transitions.obs)
    np.testing.assert_array_equal(state.episode_return, returns)
    np.testing.assert_array_equal(state.episode_length, lengths)
    assert float(metrics["num_episodes"]) == len(episodes) == 12 // 2 + 12 // 3 + 12 // 5
    np.testing.assert_allclose(metrics["episode_return"], episodes[:, 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["episode_length"], episodes[:, 1].mean(), rtol=1e-6)
    assert float(metrics["episode_return_min"]) == episodes[:, 0].min()
    assert float(metrics["episode_return_max"]) == episodes[:, 0].max()


def test_flags_and_the_successor_at_an_episodes_end():
    state, transitions, _ = unroll_twelve(start(counting_memory((B,))))
    ended = np.asarray(transitions.terminated | transitions.truncated)
    assert transitions.terminated.dtype == transitions.truncated.dtype == jnp.bool_
    assert not transitions.terminated[:, 1].any()
    assert not transitions.truncated[:, 0].any()
    np.testing.assert_array_equal(transitions.terminated[:, 2], transitions.truncated[:, 2])
    # The successor is the last observation of the episode; what is acted on next is the first of another.
    last_time = np.broadcast_to(LIMITS, ended.shape)[ended]
    np.testing.assert_array_equal(transitions.next_obs[..., 1][ended], last_time)
    following = np.concatenate([transitions.obs[1:], state.obs[None]])
    np.testing.assert_array_equal(following[..., 1][ended], np.zeros_like(last_time))
    np.testing.assert_array_equal(following[~ended], transitions.next_obs[~ended])


@pytest.mark.parametrize(("likely", "least_rounds"), [(0.0, 1), (0.1, 2), (0.6, 3)])
def test_values_of_successors_are_those_of_evaluating_all_of_them(likely, least_rounds):
    """No truncation, a few, and more than many rounds of B evaluations take; vmapped members have their own."""
    length = 40

    def value_of(scale, obs):
        return scale * obs["x"].sum(-1) ** 2 + obs["y"]

    def make(key):
        keys = jax.random.split(key, 6)
        shape = (length + 1, B)
        seen = {"x": jax.random.normal(keys[0], (*shape, 2)), "y": jax.random.normal(keys[1], shape)}
        terminated = jax.random.bernoulli(keys[2], 0.2, (length, B))
        truncated = jax.random.bernoulli(keys[3], likely, (length, B))
        ended = terminated | truncated
        other = {
            "x": jax.random.normal(keys[4], (length, B, 2)),
            "y": jax.random.normal(keys[5], (length, B)),
        }
        next_obs = {
            "x": jnp.where(ended[..., None], other["x"], seen["x"][1:]),
            "y": jnp.where(ended, other["y"], seen["y"][1:]),
        }
        reward = jnp.zeros((length, B))
        transitions = Transition((), reward, reward, terminated, truncated, next_obs, ())

        def by_rounds(scale, following):
            seen_values = value_of(scale, seen)[:-1]
            return rollout.successor_values(value_of, scale, seen_values, transitions, following)

        def all_of_them(scale, following):
            values = jnp.where(ended, value_of(scale, following), value_of(scale, seen)[1:])
            values = values.at[-1].set(value_of(scale, jax.tree.map(lambda leaf: leaf[-1], following)))
            return jnp.where(terminated, 0.0, values)

        def with_gradient(values):
            # In a loop, as an algorithm's step is where many of them are differentiated.
            def total(*args):
                return jax.lax.scan(
                    lambda total, _: (total + (values(*args) ** 2).sum(), None), 0.0, length=2
                )[0]

            return values(2.0, next_obs), jax.grad(total, argnums=(0, 1))(2.0, next_obs)

        return with_gradient(by_rounds), with_gradient(all_of_them), (truncated & ~terminated).sum()

    found, expected, cut = jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(0), 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)
    assert (1 + cut // B).min() >= least_rounds


def test_the_memory_starts_anew_where_an_episode_ended():
    state, transitions, _ = unroll_twelve(start(counting_memory((B,))))
    np.testing.assert_array_equal(state.memory["steps"], state.episode_length)
    np.testing.assert_array_equal(transitions.extras["seen"], transitions.obs[..., 1])
    # Not to zero, but to what init_memory returns; and leaf by leaf, whatever its rank.
    np.testing.assert_array_equal(state.memory["trail"][:, 0], 7.0 + state.episode_length)
    np.testing.assert_array_equal(state.memory["trail"][:, 1], [7.0] * B)


def test_two_unrolls_are_one_of_twice_the_length():
    first, early, _ = rollout.unroll(
        jax.random.key(1), ENVS, ENV.params, COUNTING, start(counting_memory((B,))), 7
    )
    second, late, _ = rollout.unroll(jax.random.key(2), ENVS, ENV.params, COUNTING, first, 5)
    whole, transitions, _ = unroll_twelve(start(counting_memory((B,))))
    jax.tree.map(np.testing.assert_array_equal, second, whole)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late)
    jax.tree.map(np.testing.assert_array_equal, joined, transitions)


def test_a_policy_without_memory_and_the_state_of_a_start():
    begun = start()
    assert begun.memory == ()
    assert begun.episode_return.dtype == jnp.float32
    assert begun.episode_length.dtype == jnp.int32
    np.testing.assert_array_equal(begun.episode_length, np.zeros(B))
    idle = Policy(lambda params, key, obs, memory: (jnp.zeros(obs.shape[:-1], jnp.int32), memory, ()))
    state, transitions, metrics = rollout.unroll(jax.random.key(0), ENVS, ENV.params, idle, begun, 1)
    assert transitions.extras == ()
    np.testing.assert_array_equal(transitions.reward, [[0.0, 10.0, 20.0]])
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)
    np.testing.assert_array_equal(state.episode_return, [0.0, 10.0, 20.0])


def test_the_environments_parameters_are_those_given():
    idle = Policy(lambda params, key, obs, memory: (jnp.zeros(obs.shape[:-1], jnp.int32), memory, ()))
    _, transitions, _ = rollout.unroll(jax.random.key(0), ENVS, {"scale": -2.0}, idle, start(), 1)
    np.testing.assert_array_equal(transitions.reward, [[0.0, -20.0, -40.0]])


def test_every_step_and_both_consumers_have_a_key_of_their_own():
    def reset(key, params):
        return jnp.float32(0), jnp.zeros((1,))

    def transition(key, state, action, params):
        return state, jax.random.uniform(key, (1,)), 0.0, False, False

    env = vectorize(from_functions(reset, transition, (), Discrete(2)), 2)
    noisy = Policy(
        lambda params, key, obs, memory: (
            jnp.zeros(obs.shape[:-1], jnp.int32),
            memory,
            jax.random.uniform(key),
        )
    )
    state = rollout.start(jax.random.key(0), env, (), 2)
    after, transitions, _ = rollout.unroll(jax.random.key(0), env, (), noisy, state, 16)
    drawn = np.concatenate([np.ravel(transitions.next_obs), np.ravel(transitions.extras)])
    assert len(np.unique(drawn)) == len(drawn) == 48
    other = rollout.unroll(jax.random.key(1), env, (), noisy, state, 16)[1]
    assert not np.isin(np.ravel(other.next_obs), drawn).any()
    again = rollout.unroll(jax.random.key(0), env, (), noisy, state, 16)
    jax.tree.map(np.testing.assert_array_equal, again[:2], (after, transitions))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_episode_metrics_look_only_at_ends(sign):
    ended = jnp.array([[False, True], [True, False], [False, True]])
    episode_return = sign * jnp.array([[100.0, 2.0], [5.0, 99.0], [98.0, 3.0]])
    length = jnp.array([[9, 1], [2, 9], [9, 3]])
    metrics = rollout.episode_metrics(ended, episode_return, length)
    expected = {
        "num_episodes": 3.0,
        "episode_return": sign * 10.0 / 3.0,
        "episode_length": 2.0,
        "episode_return_min": min(sign * 2.0, sign * 5.0),
        "episode_return_max": max(sign * 2.0, sign * 5.0),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
        assert metrics[name].dtype == jnp.float32
        assert metrics[name].shape == ()


def test_a_time_limit_of_a_real_environment():
    env = jrl.make("Pendulum-v1", params={"max_steps_in_episode": 4})
    envs = vectorize(env, 2)
    still = Policy(lambda params, key, obs, memory: (jnp.zeros((*obs.shape[:-1], 1)), memory, ()))
    state = rollout.start(jax.random.key(0), envs, env.params, 2)
    state, transitions, metrics = jax.jit(
        lambda state: rollout.unroll(jax.random.key(1), envs, env.params, still, state, 9)
    )(state)
    np.testing.assert_array_equal(transitions.truncated.all(1), [False, False, False, True] * 2 + [False])
    assert not transitions.terminated.any()
    np.testing.assert_array_equal(state.episode_length, [1, 1])
    assert float(metrics["episode_length"]) == 4.0
    returns = np.asarray(transitions.reward)[:8].reshape(2, 4, 2).sum(1)
    np.testing.assert_allclose(metrics["episode_return"], returns.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["episode_return_min"], returns.min(), rtol=1e-5)
    np.testing.assert_allclose(metrics["episode_return_max"], returns.max(), rtol=1e-5)


@pytest.mark.parametrize("length", [12, 7])
def test_an_unroll_that_packs_its_outputs_is_the_same(length, monkeypatch):
    """Every number of every dtype, with a memory; lengths that the steps of an iteration divide and do not."""

    def run():
        return rollout.unroll(
            jax.random.key(1), ENVS, ENV.params, COUNTING, start(counting_memory((B,))), length
        )

    plain = run()
    monkeypatch.setattr(rollout, "PACK_ON", jax.default_backend())
    stored = []
    monkeypatch.setattr(
        rollout.packing.Layout,
        "pack",
        lambda layout, tree, pack=rollout.packing.Layout.pack: stored.append(len(tree)) or pack(layout, tree),
    )
    packed = run()
    assert min(stored, default=0) >= 5
    assert jax.tree.structure(packed) == jax.tree.structure(plain)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), packed, plain)
