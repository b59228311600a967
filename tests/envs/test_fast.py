"""jrl's own versions of gymnax's environments against gymnax, one step at a time from equal states."""

import functools
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import envs
from jrl.envs.batched import OneOf, random_words, settle, uniform
from jrl.envs.gymnax import FAST

B, STEPS = 32, 120
LIMIT = 25  # a time limit that is met within the steps


def cells(board):
    """Columns of bits ``[..., 10]`` to gymnax's map ``[..., 10, 10]``, rows first."""
    return np.moveaxis(board[..., None] >> np.arange(10) & 1, -1, -2).astype(np.float32)


def columns(cells):
    return (cells.astype(np.int32) << np.arange(10)[:, None]).sum(-2).astype(np.int32)


def breakout_to_gymnax(state):
    fields = state._asdict()
    bricks = fields.pop("bricks")[..., None] >> 3 * np.arange(10) & 7
    return fields | {"brick_map": cells(bricks << 1), "terminal": np.zeros(bricks.shape[:-1], bool)}


def space_invaders_to_gymnax(state):
    boards = {name: cells(board) for name, board in state._asdict().items() if name.endswith("_map")}
    return state._asdict() | boards | {"terminal": np.zeros(state.pos.shape, bool)}


def any_breakout(rng, n):
    """States of Breakout whether or not play reaches them: few bricks, a ball anywhere but at the bottom."""
    density = rng.choice([0.0, 0.05, 0.5, 1.0], (n, 1))
    bricks = ((rng.random((n, 30)) < density) << np.arange(30)).sum(1)
    fields = {name: rng.integers(0, 10, n) for name in ("ball_x", "last_x", "last_y", "pos")}
    fields |= {"ball_y": rng.integers(0, 9, n), "ball_dir": rng.integers(0, 4, n), "bricks": bricks}
    return fields | {"strike": rng.random(n) < 0.3, "time": rng.integers(0, 40, n)}


def any_space_invaders(rng, n):
    density = rng.choice([0.0, 0.01, 0.1, 0.4], (n, 1, 1))
    maps = {
        "alien_map": rng.random((n, 10, 10)) < density,
        "f_bullet_map": rng.random((n, 10, 10)) < 0.1,
        "e_bullet_map": rng.random((n, 10, 10)) < 0.1,
    }
    few = {"alien_move_timer": 2, "alien_shot_timer": 2, "shot_timer": 2, "ramp_index": 3, "pos": 10}
    return {
        **{name: columns(board) for name, board in maps.items()},
        **{name: rng.integers(0, most, n) for name, most in few.items()},
        "alien_dir": rng.choice([-1, 1], n),
        "enemy_move_interval": rng.integers(5, 13, n),
        "ramping": rng.random(n) < 0.8,
        "time": rng.integers(0, 40, n),
    }


def any_of(**bounds):
    """Fields drawn evenly within ``±bound``, and a time."""

    def draw(rng, n):
        fields = {name: rng.uniform(-bound, bound, n) for name, bound in bounds.items()}
        return fields | {"time": rng.integers(0, 40, n)}

    return draw


def any_mountain_car(rng, n):
    fields = {"position": rng.uniform(-1.3, 0.7, n), "velocity": rng.uniform(-0.07, 0.07, n)}
    return fields | {"time": rng.integers(0, 40, n)}


def as_they_are(state):
    return state._asdict()


CASES = {
    "CartPole-v1": SimpleNamespace(
        any=any_of(x=3.0, x_dot=3.0, theta=0.3, theta_dot=3.0), to_gymnax=as_they_are
    ),
    "MountainCar-v0": SimpleNamespace(any=any_mountain_car, to_gymnax=as_they_are),
    "MountainCarContinuous-v0": SimpleNamespace(any=any_mountain_car, to_gymnax=as_they_are),
    "Pendulum-v1": SimpleNamespace(any=any_of(theta=7.0, theta_dot=9.0, last_u=2.0), to_gymnax=as_they_are),
    "Acrobot-v1": SimpleNamespace(
        # At the limits of its velocities one Runge-Kutta step makes a hundredfold of a rounding error.
        any=any_of(joint_angle1=3.1, joint_angle2=3.1, velocity_1=3.0, velocity_2=5.0),
        to_gymnax=as_they_are,
    ),
    "Breakout-MinAtar": SimpleNamespace(any=any_breakout, to_gymnax=breakout_to_gymnax),
    "SpaceInvaders-MinAtar": SimpleNamespace(any=any_space_invaders, to_gymnax=space_invaders_to_gymnax),
}


@functools.cache
def fast(env_id):
    env = jrl.make(env_id, params={"max_steps_in_episode": LIMIT})
    batch = envs.vectorize(env, B)
    return env, batch, jax.jit(batch.reset), jax.jit(batch.step)


@functools.cache
def theirs(env_id):
    """gymnax's ``step_env`` and ``is_truncated`` over a batch, and its state from fields."""
    env, params = gymnax.make(env_id)
    params = params.replace(max_steps_in_episode=LIMIT)
    spec = jax.eval_shape(env.reset_env, jax.random.key(0), params)[1]

    @jax.jit
    def step(state, action):
        def one(state, action):
            obs, state, reward, terminated, _ = env.step_env(jax.random.key(0), state, action, params)
            return obs, state, reward, terminated, env.is_truncated(state, params)

        return jax.vmap(one)(state, action)

    def make_state(fields):
        assert fields.keys() == vars(spec).keys()
        return type(spec)(**{k: jnp.asarray(v, getattr(spec, k).dtype) for k, v in fields.items()})

    return step, make_state


@functools.cache
def played(env_id):
    """STEPS of random play: state, action and key of each step, and what it returned."""
    env, _, reset, step = fast(env_id)
    env_state, obs = reset(jax.random.key(0), env.params)
    first, steps = jax.device_get((env_state, obs)), []
    for key in jax.random.split(jax.random.key(1), STEPS):
        action_key, key = jax.random.split(key)
        action = jax.vmap(env.action.sample)(jax.random.split(action_key, B))
        after, out = step(key, env_state, action, env.params)
        steps.append(jax.device_get((env_state, action, after, out)))
        env_state = after
    return first, jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


def assert_a_step_of_gymnax(env_id, env_state, action, after, out):
    """All ``[N, ...]``; ``after`` is compared where no episode ended."""
    step, make_state = theirs(env_id)
    to_gymnax = CASES[env_id].to_gymnax
    obs, state, reward, terminated, truncated = jax.device_get(step(make_state(to_gymnax(env_state)), action))
    np.testing.assert_array_equal(out.terminated, terminated)
    np.testing.assert_array_equal(out.truncated, truncated)
    np.testing.assert_allclose(out.reward, reward, rtol=1e-6)
    np.testing.assert_allclose(out.next_obs.astype(np.float32), obs, rtol=2e-5, atol=2e-6)
    going = ~(terminated | truncated)
    for name, value in to_gymnax(after).items():
        expected = np.asarray(getattr(state, name))
        np.testing.assert_allclose(value[going], expected[going], rtol=2e-5, atol=2e-6, err_msg=name)


def test_every_fast_environment_is_compared():
    assert CASES.keys() == FAST.keys()


@pytest.mark.parametrize("env_id", CASES)
def test_play_is_gymnaxs_step_by_step(env_id):
    _, steps = played(env_id)
    assert_a_step_of_gymnax(env_id, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps))
    assert steps[3].truncated.any()


@pytest.mark.parametrize("env_id", CASES)
def test_any_state_is_stepped_as_gymnax_steps_it(env_id):
    """Also the states that random play hardly reaches: a last alien, a wave at the border, no brick left."""
    n, rng = STEPS * B, np.random.default_rng(0)
    env, _, reset, _ = fast(env_id)
    spec = jax.eval_shape(reset, jax.random.key(0), env.params)[0]
    env_state = type(spec)(
        **{k: np.asarray(v, getattr(spec, k).dtype) for k, v in CASES[env_id].any(rng, n).items()}
    )
    action = jax.vmap(env.action.sample)(jax.random.split(jax.random.key(1), n))
    after, out = jax.device_get(jax.jit(env.step.batched)(jax.random.key(0), env_state, action, env.params))
    assert out.terminated.any() == (env_id != "Pendulum-v1")
    assert not out.terminated.all()
    assert_a_step_of_gymnax(env_id, env_state, action, after, out)


@pytest.mark.parametrize("env_id", CASES)
def test_an_episode_that_ends_is_followed_by_a_reset(env_id):
    env, *_ = fast(env_id)
    first, (_, _, after, out) = played(env_id)
    ended = out.terminated | out.truncated
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[~ended], y[~ended]), out.obs, out.next_obs)
    np.testing.assert_array_equal(after.time[ended], 0)
    assert (after.time[~ended] > 0).all()
    # Every start is one that reset draws, and shows what reset shows for it.
    env_state, obs = jax.device_get(
        jax.jit(env.reset.batched, static_argnums=2)(jax.random.key(3), env.params, 4_000)
    )
    lows, highs = (jax.tree.map(lambda leaf, f=f: f(leaf, axis=0), env_state) for f in (np.min, np.max))
    for low, high, leaf in zip(lows, highs, after, strict=True):
        margin = 0.01 * (np.asarray(high, float) - low) if leaf.dtype == np.float32 else 0
        assert (leaf[ended] >= low - margin).all()
        assert (leaf[ended] <= high + margin).all()
    assert obs.dtype == env.observation.dtype
    assert first[1].shape == (B, *env.observation.shape)


def test_starts_are_drawn_evenly_and_independently():
    env, _, _, _ = fast("CartPole-v1")
    _, (_, _, after, out) = played("CartPole-v1")
    ended = out.terminated | out.truncated
    starts = np.stack([leaf[ended] for leaf in after[:4]])
    assert len(np.unique(starts[0])) == starts.shape[1] > 100  # 23 bits each: equal ones would be reused ones
    many = jax.jit(env.reset.batched, static_argnums=2)(jax.random.key(3), env.params, 10_000)[1]
    many = np.sort(np.asarray(many), axis=0)
    # Kolmogorov-Smirnov against the uniform distribution: 1.95 / sqrt(n) is its 0.1 % point.
    distance = np.abs((many + 0.05) / 0.1 - (np.arange(10_000)[:, None] + 0.5) / 10_000).max(0)
    assert (distance < 1.95 / 100).all()
    assert np.abs(np.corrcoef(starts) - np.eye(4)).max() < 4 / np.sqrt(starts.shape[1])
    sides = jax.jit(fast("Breakout-MinAtar")[0].reset.batched, static_argnums=2)(
        jax.random.key(3), fast("Breakout-MinAtar")[0].params, 10_000
    )[0].ball_x
    assert set(np.unique(sides)) == {0, 9}
    assert abs(np.mean(np.asarray(sides) == 9) - 0.5) < 4 * 0.005


@pytest.mark.parametrize("env_id", CASES)
def test_one_environment_alone(env_id):
    """Reset, step and evaluation of a single environment, and types a scan can carry."""
    env, _, _, _ = fast(env_id)
    key = jax.random.key(0)
    env_state, obs = jax.eval_shape(env.reset, key, env.params)
    action = jax.eval_shape(env.action.sample, key)
    after, out = jax.eval_shape(env.step, key, env_state, action, env.params)
    assert env_state == after
    assert obs == out.obs == out.next_obs == env.observation
    assert obs.dtype == (jnp.bool_ if env_id.endswith("MinAtar") else jnp.float32)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((env_state, obs, out)))
    assert (out.reward.dtype, out.reward.shape) == (jnp.float32, ())
    batch_state, batch_obs = jax.eval_shape(fast(env_id)[2], key, env.params)
    assert jax.tree.map(lambda x: x.dtype, batch_state) == jax.tree.map(lambda x: x.dtype, env_state)
    assert batch_obs.shape == (B, *obs.shape)
    with pytest.raises(ValueError, match=rf"{env_id}: an action of shape \(3,\)"):
        jax.eval_shape(env.step, key, env_state, jnp.zeros(3), env.params)
    with pytest.raises(ValueError, match=rf"{env_id}: actions of shape \(3,\) for {B} environments"):
        jax.eval_shape(fast(env_id)[1].step, key, batch_state, jnp.zeros(3), env.params)
    with pytest.raises(ValueError, match=rf"{env_id}: params have the structure"):
        fast(env_id)[1].reset(key, ())


def test_a_single_step_is_a_batch_of_one():
    env, _, _, _ = fast("CartPole-v1")
    batch = envs.vectorize(env, 1)
    key = jax.random.key(2)
    one, many = env.reset(key, env.params), batch.reset(key, env.params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), one, many)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y[0], rtol=1e-6),
        env.step(key, one[0], 1, env.params),
        batch.step(key, many[0], np.ones(1, np.int32), env.params),
    )


def test_wrappers_are_not_bypassed():
    env = jrl.make("CartPole-v1")
    assert isinstance(env.step, OneOf)
    assert envs.vectorize(env, 2).step is env.step.batched
    wrapped = envs.vectorize(envs.scale_reward(envs.frame_stack(env, 2), 3.0), 2)
    env_state, obs = wrapped.reset(jax.random.key(0), wrapped.params)
    assert obs.shape == (2, 8)
    _, out = wrapped.step(jax.random.key(1), env_state, np.zeros(2, np.int32), wrapped.params)
    np.testing.assert_array_equal(out.reward, [3.0, 3.0])
    # one function replaced, the other kept
    other = env._replace(step=lambda *args: (env.step(*args)[0], env.step(*args)[1]._replace(reward=7.0)))
    env_state, _ = envs.vectorize(other, 2).reset(jax.random.key(0), env.params)
    out = envs.vectorize(other, 2).step(jax.random.key(1), env_state, np.zeros(2, np.int32), env.params)[1]
    np.testing.assert_array_equal(out.reward, [7.0, 7.0])


def test_which_version_make_gives():
    assert isinstance(jrl.make("Breakout-MinAtar").step, OneOf)
    for env in (
        jrl.make("Breakout-MinAtar", fast=False),
        jrl.make("Breakout-MinAtar", use_minimal_action_set=False),
        jrl.make(gymnax.make("Breakout-MinAtar")[0]),
    ):
        assert not isinstance(env.step, OneOf)
        assert env.observation.dtype == jnp.float32
    assert type(jrl.make("CartPole-v1").params) is type(gymnax.make("CartPole-v1")[1])
    assert jrl.make("Catch-bsuite", fast=True).name == "Catch-bsuite"


def test_random_words_and_settle():
    key = jax.random.key(0)
    words = np.asarray(random_words(key, 5, 1_000))
    assert words.shape == (5, 1_000)
    assert words.dtype == np.uint32
    assert len(np.unique(words)) == 5_000
    ones = (words[..., None] >> np.arange(32) & 1).mean((0, 1))
    assert np.abs(ones - 0.5).max() < 4 * 0.5 / np.sqrt(5_000)
    assert random_words(key, 0, 7).shape == (0, 7)
    assert random_words(jax.random.key(0, impl="rbg"), 3, 2).shape == (3, 2)
    bounds = jnp.array([0, 2**32 - 1], jnp.uint32)
    np.testing.assert_allclose(uniform(bounds, -1.0, 3.0), [-1.0, 3.0], atol=1e-6)
    assert uniform(bounds, 0.0, 1.0)[1] < 1.0
    tree = (jnp.array([-1.5, np.inf]), jnp.array([-3, 7]), jnp.array([True, False]), jnp.uint8(200))
    jax.tree.map(np.testing.assert_array_equal, settle(tree), tree)
    assert [x.dtype for x in settle(tree)] == [x.dtype for x in tree]
