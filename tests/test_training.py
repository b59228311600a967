"""The runners: training is the step repeated, evaluation is exactly N episodes without favour."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import envs, loop, ppo, rollout, training
from jrl.envs import from_functions
from jrl.types import Algorithm, Box, Discrete, Policy

KEY = jax.random.key(0)


# --------------------------------------------------------------------------------------------------- train


def toy(traces=None):
    """An algorithm of one number, chaotic enough to show any difference in its arithmetic."""

    def step(state, hparams):
        if traces is not None:
            traces.append(1)
        key, noise_key = jax.random.split(state["key"])
        x = hparams["r"] * state["x"] * (1.0 - state["x"]) + 1e-3 * jax.random.uniform(noise_key)
        count = jnp.floor(3.0 * x)
        metrics = {"num_episodes": count, "episode_return": 10.0 * x, "loss": x}
        return {"key": key, "x": x}, metrics

    return Algorithm(lambda key, hparams: {"key": key, "x": jnp.float32(0.3)}, step, lambda state: None, 1)


def test_train_is_the_jitted_step_repeated():
    # Bit for bit: the body is the same elementwise program, whether looped in XLA or from Python.
    algo, hparams = toy(), {"r": 3.7}
    state = looped = algo.init(KEY, hparams)
    state, metrics = jrl.train(algo, state, hparams, num_steps=20)
    step, rows = jax.jit(algo.step), []
    for _ in range(20):
        looped, row = step(looped, hparams)
        rows.append(row)
    np.testing.assert_array_equal(jax.random.key_data(state["key"]), jax.random.key_data(looped["key"]))
    np.testing.assert_array_equal(state["x"], looped["x"])
    for name, values in metrics.items():
        assert values.shape == (20,)
        np.testing.assert_array_equal(values, [row[name] for row in rows], err_msg=name)


PPO = {"num_envs": 2, "unroll_length": 8, "num_epochs": 1, "num_minibatches": 2, "hidden_sizes": (4,)}


def test_training_ppo_is_its_step_repeated_and_two_runs_are_one():
    # To rounding: XLA may fuse sums differently within a scan. (Of equal compiled bodies, 2 + 2 is 4, bit for bit.)
    algo, hparams = ppo.make(jrl.make("ProbeDiscount-jrl"), ppo.Config(**PPO)), ppo.HParams()
    start = jax.jit(algo.init)(KEY, hparams)
    whole, metrics = jrl.train(algo, start, hparams, num_steps=2)
    step = jax.jit(algo.step)
    looped, _ = step(start, hparams)
    looped, last = step(looped, hparams)
    np.testing.assert_array_equal(jax.random.key_data(whole.key), jax.random.key_data(looped.key))
    np.testing.assert_array_equal(whole.env_steps, looped.env_steps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole.params, looped.params
    )
    np.testing.assert_allclose(metrics["loss"][-1], last["loss"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_fewer_than_one_step_is_an_error(num_steps):
    with pytest.raises(ValueError, match=rf"train\(num_steps={num_steps}\): must be at least 1\."):
        jrl.train(toy(), None, None, num_steps=num_steps)


def test_a_second_call_does_not_trace_again():
    traces = []
    algo = toy(traces)
    state = algo.init(KEY, None)
    for r, times in ((3.7, 3), (3.5, 3), (0.1, 3), (0.1, 4)):
        state, _ = jrl.train(algo, state, {"r": r}, num_steps=times)
    assert len(traces) == 2  # one for each number of steps


def test_train_works_inside_jit_and_vmap():
    algo = toy()
    keys, rates = jax.random.split(KEY, 3), jnp.array([3.5, 3.6, 3.7])

    def run(key, r):
        return jrl.train(algo, algo.init(key, None), {"r": r}, num_steps=5)[1]["loss"]

    batch = jax.jit(jax.vmap(run))(keys, rates)
    assert batch.shape == (3, 5)
    for i in range(3):
        np.testing.assert_allclose(batch[i], run(keys[i], rates[i]), rtol=1e-5)


# ----------------------------------------------------------------------------------------------- summarize


def test_episode_statistics_are_weighed_by_their_episodes():
    metrics = {
        "num_episodes": jnp.array([1.0, 0.0, 3.0]),
        "episode_return": jnp.array([10.0, 0.0, 2.0]),
        "episode_length": jnp.array([7.0, 0.0, 3.0]),
        "episode_return_min": jnp.array([10.0, 0.0, 1.0]),
        "episode_return_max": jnp.array([10.0, 0.0, 4.0]),
        "loss": jnp.array([1.0, 2.0, 6.0]),
    }
    expected = {
        "num_episodes": 4.0,
        "episode_return": (10.0 + 3 * 2.0) / 4,
        "episode_length": (7.0 + 3 * 3.0) / 4,
        "episode_return_min": 1.0,  # not the 0 of the step in which none ended
        "episode_return_max": 10.0,
        "loss": 3.0,
    }
    summary = training.summarize(metrics)
    assert {name: float(value) for name, value in summary.items()} == expected
    negative = training.summarize(
        {"num_episodes": metrics["num_episodes"], "episode_x_max": -metrics["episode_return_min"]}
    )
    assert float(negative["episode_x_max"]) == -1.0


def test_a_metric_of_ones_own_is_averaged_whatever_its_name_ends_with():
    own = {"q_max": jnp.array([1.0, 2.0, 6.0]), "log_std_min": jnp.array([-1.0, -2.0, -3.0])}
    summary = training.summarize(own | {"num_episodes": jnp.zeros(3)})
    row = loop.reduce_rows(jax.tree.map(np.asarray, own | {"num_episodes": jnp.zeros(3)}))
    assert {name: float(value) for name, value in summary.items()} == row
    assert row == {"q_max": 3.0, "log_std_min": -2.0, "num_episodes": 0.0}
    with pytest.raises(ValueError, match="num_episodes is missing among q_max, log_std_min"):
        training.summarize(own)


def test_where_no_episode_ended_all_episode_statistics_are_zero():
    names = ("episode_return", "episode_return_min", "episode_return_max", "episode_length")
    summary = training.summarize({"num_episodes": jnp.zeros(3)} | {name: jnp.zeros(3) for name in names})
    assert {float(value) for value in summary.values()} == {0.0}


def test_a_summary_of_members_is_one_for_each():
    metrics = {
        "num_episodes": jnp.array([[1.0, 1.0], [0.0, 4.0]]),
        "episode_return": jnp.array([[1.0, 3.0], [0.0, 5.0]]),
    }
    summary = jax.vmap(training.summarize)(metrics)
    np.testing.assert_array_equal(summary["episode_return"], [2.0, 5.0])


# ------------------------------------------------------------------------------------------------ evaluate


def lengths(short=1, long=50):
    """Each episode is ``short`` or ``long`` steps, with equal chance; rewards are 1, or 1 + action."""

    def reset(key, params):
        length = jnp.where(jax.random.bernoulli(key), params["long"], params["short"])
        return (length, jnp.int32(0)), jnp.zeros((1,))

    def transition(key, state, action, params):
        length, time = state
        over = time + 1 >= length
        return (length, time + 1), jnp.ones((1,)) * (time + 1), 1.0 + action, over & (length == 1), over

    return from_functions(reset, transition, {"short": short, "long": long}, Discrete(3), "lengths")


ENV = lengths()


def idle(key, obs, memory):
    return jnp.zeros(obs.shape[:-1], jnp.int32), memory, ()


@pytest.mark.parametrize(("num_episodes", "num_envs"), [(1, 8), (5, None), (7, 3), (8, 4), (3, 1)])
def test_exactly_n_episodes_whatever_the_number_of_environments(num_episodes, num_envs):
    stats = jrl.evaluate(KEY, lengths(2, 3), idle, num_episodes=num_episodes, num_envs=num_envs)
    for field, dtype in zip(stats, (jnp.float32, jnp.int32, jnp.bool_), strict=True):
        assert field.shape == (num_episodes,)
        assert field.dtype == dtype
    assert stats.completed.all()
    assert set(np.asarray(stats.episode_length).tolist()) <= {2, 3}
    np.testing.assert_array_equal(stats.episode_return, stats.episode_length)


def test_short_episodes_are_not_favoured():
    # The first 600 to finish would have a mean length near 13; the true one is 25.5, ± 1 with 600 episodes.
    stats = jrl.evaluate(KEY, ENV, idle, num_episodes=600, num_envs=50)
    assert stats.completed.all()
    assert abs(stats.episode_length.mean() - 25.5) < 4 * 24.5 / np.sqrt(600)
    assert set(np.asarray(stats.episode_length).tolist()) == {1, 50}
    # One episode an environment: the same, and each from a reset of its own.
    stats = jrl.evaluate(jax.random.key(1), ENV, idle, num_episodes=600)
    assert abs(stats.episode_length.mean() - 25.5) < 4 * 24.5 / np.sqrt(600)


def test_a_cap_is_reported_and_bounds_the_steps():
    stats = jrl.evaluate(KEY, lengths(1, 50), idle, num_episodes=40, num_envs=10, max_steps=10)
    done = np.asarray(stats.completed)
    assert 0 < done.sum() < 40
    np.testing.assert_array_equal(np.asarray(stats.episode_length)[done], 1)
    assert np.asarray(stats.episode_length)[~done].max() <= 10
    by_env = np.asarray(stats.episode_length).reshape(4, 10).sum(0)
    assert (by_env <= 10).all()
    unstarted = np.asarray(stats.episode_length) == 0
    assert not done[unstarted].any()
    enough = jrl.evaluate(KEY, lengths(7, 7), idle, num_episodes=6, num_envs=3, max_steps=14)
    assert enough.completed.all()
    short = jrl.evaluate(KEY, lengths(7, 7), idle, num_episodes=6, num_envs=3, max_steps=13)
    np.testing.assert_array_equal(short.completed, [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(short.episode_length, [7] * 3 + [6] * 3)


def test_the_parameters_are_those_given():
    stats = jrl.evaluate(KEY, ENV, idle, num_episodes=4, params={"short": 3, "long": 3})
    np.testing.assert_array_equal(stats.episode_length, [3] * 4)
    sweep = jax.vmap(
        lambda n: jrl.evaluate(KEY, ENV, idle, num_episodes=5, num_envs=2, params={"short": n, "long": n})
    )
    np.testing.assert_array_equal(sweep(jnp.array([1, 4, 2])).episode_length, [[1] * 5, [4] * 5, [2] * 5])


def test_the_same_key_gives_the_same_episodes_and_another_key_others():
    one, same, other = (
        jrl.evaluate(jax.random.key(seed), ENV, idle, num_episodes=30, num_envs=10) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.episode_length != other.episode_length).any()


def test_the_memory_starts_anew_with_each_episode():
    def act(params, key, obs, memory):
        # The reward shows, by the action, whether the memory is the time the environment shows.
        return (memory["steps"] != obs[..., 0]).astype(jnp.int32), {"steps": memory["steps"] + 1}, ()

    counting = Policy(act, (), lambda batch_shape: {"steps": jnp.zeros(batch_shape)})
    stats = jrl.evaluate(KEY, lengths(2, 5), counting, num_episodes=20, num_envs=4)
    np.testing.assert_array_equal(stats.episode_return, stats.episode_length)


def test_new_parameters_of_a_policy_do_not_recompile_and_reach_it():
    traces = []

    def act(params, key, obs, memory):
        traces.append(1)
        return jnp.full(obs.shape[:-1], params, jnp.int32), memory, ()

    env = lengths(2, 2)
    returns = [
        jrl.evaluate(KEY, env, Policy(act, jnp.int32(a)), num_episodes=3).episode_return for a in (0, 1, 2)
    ]
    np.testing.assert_array_equal(returns, [[2.0] * 3, [4.0] * 3, [6.0] * 3])
    first = len(traces)
    jrl.evaluate(KEY, env, Policy(act, jnp.int32(1)), num_episodes=3)
    assert len(traces) == first <= 2

    seen = []

    def plain(key, obs, memory):
        seen.append(1)
        return jnp.zeros(obs.shape[:-1], jnp.int32), memory, ()

    for seed in (0, 1):
        jrl.evaluate(jax.random.key(seed), env, plain, num_episodes=3)
    assert len(seen) <= 2


def test_greedy_against_sampled():
    env = jrl.make("ProbeAction-jrl")  # action 1 gives 1, action 0 gives -1
    algo = ppo.make(env, ppo.Config(**PPO))
    state = jax.jit(algo.init)(KEY, ppo.HParams())
    greedy, sampled = (
        jrl.evaluate(KEY, env, algo.policy(state, greedy=greedy), num_episodes=64).episode_return
        for greedy in (True, False)
    )
    assert len(set(np.asarray(greedy).tolist())) == 1
    assert set(np.asarray(sampled).tolist()) == {-1.0, 1.0}  # nearly uniform at the start
    jax.tree.map(
        np.testing.assert_array_equal,
        jrl.evaluate(KEY, env, algo.policy(state), num_episodes=64).episode_return, greedy
    )  # fmt: skip


@pytest.mark.parametrize(("num_envs", "num_episodes"), [(1, 1), (3, 3), (3, 4)])
def test_a_vectorised_environment_is_named(num_envs, num_episodes):
    many = jrl.envs.vectorize(ENV, num_envs)
    with pytest.raises(ValueError, match=r"takes a single environment .*: leave out jrl\.envs\.vectorize"):
        jrl.evaluate(KEY, many, idle, num_episodes=num_episodes, max_steps=5)


@pytest.mark.parametrize("name", ["num_episodes", "num_envs", "max_steps"])
def test_a_number_below_one_is_an_error(name):
    with pytest.raises(ValueError, match=rf"evaluate\({name}=0\): must be at least 1\."):
        jrl.evaluate(KEY, ENV, idle, **({"num_episodes": 1} | {name: 0}))
    with pytest.raises(ValueError, match=rf"evaluate\({name}=2147483648\): must be below 2\*\*31"):
        jrl.evaluate(KEY, ENV, idle, **({"num_episodes": 1} | {name: 2**31}))


# ------------------------------------------------------------------------------- PPO starts at a ratio of 1


def masked_probe():
    return envs.action_mask(
        jrl.make("ProbePolicy-jrl"), lambda obs, params: jnp.stack([obs[0] > 0.0, jnp.bool_(True)])
    )


RATIO_CASES = {
    "discrete, masked, normalised": (masked_probe, {"normalize_observations": True}),
    "continuous, clipped, normalised": (
        lambda: jrl.make("Pendulum-v1"),
        {"normalize_observations": True, "normalize_rewards": True, "shared_torso": True},
    ),
}


@pytest.mark.parametrize("case", RATIO_CASES)
def test_ratios_start_at_one(case):
    """With a learning rate of 0 every ratio is the one before the first gradient step, in every update."""
    env, choices = RATIO_CASES[case]
    algo = ppo.make(env(), ppo.Config(**PPO | choices))
    hparams = ppo.HParams(learning_rate=0.0)
    state = jax.jit(algo.init)(KEY, hparams)
    if "continuous" in case:  # a wide policy: most of its actions lie beyond the bounds
        widened = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + 2.0 if "log_std" in jax.tree_util.keystr(path) else leaf, state.params
        )
        state = state.replace(params=widened)
    state, metrics = jrl.train(algo, state, hparams, num_steps=4)
    assert float(state.observation_statistics.count) == 4 * 2 * 8  # and yet they do move on
    np.testing.assert_allclose(metrics["approx_kl"], 0.0, atol=1e-10)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0.0)
    assert (metrics["entropy"] > 0.1).all()


def test_the_environment_gets_the_clipped_action_and_the_loss_the_one_drawn(monkeypatch):
    def transition(key, state, action, params):
        return state, action, 0.0, False, False  # shows the action it was given

    env = from_functions(
        lambda key, params: ((), jnp.zeros((1,))), transition, (), Box((1,), -0.5, 0.5), "mirror"
    )
    recorded = []

    def recording(*arguments):
        out = unroll(*arguments)
        recorded.append(out[1])
        return out

    unroll = rollout.unroll
    monkeypatch.setattr(rollout, "unroll", recording)
    algo, hparams = ppo.make(env, ppo.Config(**PPO)), ppo.HParams()
    algo.step(algo.init(KEY, hparams), hparams)  # not jitted, so that what is recorded has values
    (transitions,) = recorded
    drawn = np.asarray(transitions.action)
    assert np.abs(drawn).max() > 0.5
    np.testing.assert_array_equal(transitions.next_obs, np.clip(drawn, -0.5, 0.5))
