"""The adapter against gymnax itself, step by step, for every environment that needs no download.

jrl's own versions of some of them are compared in test_fast.py.
"""

import functools
import sys

import gymnax
import gymnax.wrappers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import environment, spaces

import jrl
from jrl.envs import DOWNLOADS
from jrl.envs.gymnax import _Later

IDS = [i for i in gymnax.registered_envs if i not in DOWNLOADS]
STEPS = 150


def strong(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@functools.cache
def both(env_id):
    """Run jrl's step, and gymnax's from the same states with the same keys, for two time limits."""
    env = jrl.make(env_id, raw=True, fast=False)
    reference, _ = gymnax.make(env_id)

    # run for 300 steps only: what counts is the time to compile
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(key, params):
        reset_key, steps_key = jax.random.split(key)
        env_state, obs = env.reset(reset_key, params)
        their_obs, their_state = reference.reset(reset_key, params)

        def step(env_state, key):
            action_key, key = jax.random.split(key)
            action = env.action.sample(action_key)
            theirs = reference.step(key, env_state, action, params)
            env_state, ours = env.step(key, env_state, action, params)
            return env_state, (ours, env_state, theirs)

        _, out = jax.lax.scan(step, env_state, jax.random.split(steps_key, STEPS))
        return (obs, env_state), (their_obs, their_state), out

    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.result_type(p)), env.params)
    short = params.replace(max_steps_in_episode=jnp.asarray(6, params.max_steps_in_episode.dtype))
    results = [run(jax.random.key(i), p) for i, p in enumerate((params, short))]
    assert run._cache_size() == 1  # new values of the parameters do not retrace
    return env, jax.device_get(results)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_module_for_later_is_the_real_one_once_something_of_it_is_asked_for(monkeypatch):
    """Also while the import that it waits for is under way, when imports find it in the real one's place."""
    name = "colorsys"
    monkeypatch.delitem(sys.modules, name, raising=False)
    later = _Later(name)
    monkeypatch.setitem(sys.modules, name, later)
    with pytest.raises(AttributeError):
        later.__path__  # noqa: B018
    assert sys.modules[name] is later
    assert later.rgb_to_hsv(1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)
    assert sys.modules[name] is not later
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        later.nothing  # noqa: B018


def test_there_are_25():
    assert len(IDS) == 25


@pytest.mark.parametrize("env_id", IDS)
def test_agrees_with_gymnax(env_id):
    _, results = both(env_id)
    for ours, theirs, (out, env_state, (obs, their_state, reward, terminated, truncated, info)) in results:
        assert_same(ours[0], theirs[0])
        assert_same(ours[1], theirs[1])
        assert_same(out.obs, obs)
        assert_same(env_state, their_state)
        np.testing.assert_array_equal(out.reward, reward.astype(np.float32))
        np.testing.assert_array_equal(out.terminated, terminated)
        np.testing.assert_array_equal(out.truncated, truncated)
        assert_same(out.next_obs, info["final_observation"])


@pytest.mark.parametrize("env_id", IDS)
def test_types(env_id):
    env, results = both(env_id)
    key = jax.random.key(0)
    env_state, obs = jax.eval_shape(env.reset, key, env.params)
    action = jax.eval_shape(env.action.sample, key)
    next_state, out = jax.eval_shape(env.step, key, env_state, action, env.params)
    assert strong(env_state) == strong(next_state)
    assert strong(obs) == strong(out.obs) == strong(out.next_obs)
    assert not any(weak for _, _, weak in strong((env_state, obs)))
    assert strong(env.observation) == strong(obs)
    assert strong(out[1:4]) == [((), jnp.float32, False), ((), jnp.bool_, False), ((), jnp.bool_, False)]
    for _, _, (out, *_) in results:
        assert np.isfinite(out.reward).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(out.obs))


@pytest.mark.parametrize("env_id", IDS)
def test_the_limit_truncates_and_does_not_terminate(env_id):
    _, results = both(env_id)
    out = results[1][2][0]
    assert out.truncated.any() or out.terminated.all()  # a bandit ends before any limit
    ended = out.terminated | out.truncated
    times = np.diff(np.flatnonzero(ended), prepend=-1)
    assert times.max() <= 6
    # where an episode goes on, the next observation is the successor
    for obs, next_obs in zip(jax.tree.leaves(out.obs), jax.tree.leaves(out.next_obs), strict=True):
        np.testing.assert_array_equal(obs[~ended], next_obs[~ended])


def test_both_flags_on_one_step():
    _, results = both("DeepSea-bsuite")  # its limit is the step in which it terminates
    out = results[0][2][0]
    assert out.terminated.any()
    np.testing.assert_array_equal(out.terminated, out.truncated)


def test_resets_are_independent():
    env = jrl.envs.vectorize(jrl.make("CartPole-v1", params={"max_steps_in_episode": 1}), 4)
    env_state, _ = env.reset(jax.random.key(0), env.params)
    step = jax.jit(env.step)
    env_state, first = step(jax.random.key(1), env_state, jnp.zeros(4, jnp.int32), env.params)
    _, second = step(jax.random.key(2), env_state, jnp.zeros(4, jnp.int32), env.params)
    assert first.truncated.all()
    starts = np.concatenate([first.obs, second.obs])
    assert len(np.unique(starts[:, 0])) == 8


def test_integer_rewards_become_float32():
    _, results = both("UmbrellaChain-bsuite")
    assert results[0][2][2][2].dtype == np.int32  # gymnax's
    assert results[0][2][0].reward.dtype == np.float32


def test_declared_dtypes_are_not_believed():
    assert jrl.make("FourRooms-misc").observation.dtype == jnp.int32  # declared float32
    assert jrl.make("Catch-bsuite").observation.dtype == jnp.float32  # declared int32


def test_frozen_lake_is_one_hot_unless_raw():
    env = jrl.make("FrozenLake-misc")
    assert env.observation == jax.ShapeDtypeStruct((16,), jnp.float32)
    assert jrl.make("FrozenLake-misc", raw=True).observation == jax.ShapeDtypeStruct((), jnp.int32)
    env_state, obs = env.reset(jax.random.key(0), env.params)
    np.testing.assert_array_equal(obs, np.eye(16)[0])

    def step(env_state, key):
        env_state, out = env.step(key, env_state, jnp.int32(2), env.params)
        return env_state, out

    _, out = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), 60)))(env_state)
    ended = np.asarray(out.terminated | out.truncated)
    assert ended.any()
    np.testing.assert_array_equal(out.obs[ended], np.tile(np.eye(16)[0], (ended.sum(), 1)))
    np.testing.assert_array_equal(out.next_obs.sum(-1), 1.0)
    assert (out.next_obs[ended][:, 0] == 0).all()  # a hole, not the start


def test_factory_arguments_and_parameters():
    env = jrl.make("FourRooms-misc", use_visual_obs=True, params={"fail_prob": 0.0})
    assert env.observation.shape == (13, 13, 2)
    assert env.params.fail_prob == 0.0
    with pytest.raises(ValueError, match=r"CartPole-v1: params has no field 'gravitas'.*gravity"):
        jrl.make("CartPole-v1", params={"gravitas": 1.0})
    for gravity, message in (
        ("much", "is 'much', which is no number"),
        ([9.8, 10], r"has shape \(2,\), where \(\)"),
    ):
        with pytest.raises(ValueError, match=f"CartPole-v1: params.gravity {message}"):
            jrl.make("CartPole-v1", params={"gravity": gravity})
    kind = r"gymnax\S+cartpole\.EnvParams"
    for params, given in (
        (9, "builtins.int"),
        (jrl.make("Pendulum-v1").params, r"gymnax\S+pendulum\.EnvParams"),
    ):
        with pytest.raises(
            TypeError, match=f"CartPole-v1: params is a {given}: expected a {kind}, .*'gravity'"
        ):
            jrl.make("CartPole-v1", params=params)
    torque = jrl.make("Acrobot-v1", params={"available_torque": [-2, 0, 2]}).params.available_torque
    np.testing.assert_array_equal(torque, np.float32([-2, 0, 2]))


def test_parameters_of_any_number_type_keep_the_types():
    env = jrl.make("CartPole-v1")
    params = env.params.replace(gravity=10, max_steps_in_episode=jnp.float32(3.0))

    @jax.jit
    def run(params):
        env_state, _ = env.reset(jax.random.key(0), params)
        keys = jax.random.split(jax.random.key(1), 3)
        return jax.lax.scan(lambda s, k: env.step(k, s, 0, params), env_state, keys)[1].truncated

    np.testing.assert_array_equal(run(params), [False, False, True])


def test_parameters_of_another_environment_are_refused():
    env = jrl.make("CartPole-v1")
    with pytest.raises(ValueError, match="CartPole-v1: params have the structure"):
        env.reset(jax.random.key(0), jrl.make("Pendulum-v1").params)


def test_action_spaces():
    assert jrl.make("Breakout-MinAtar").action == jrl.Discrete(3)
    assert jrl.make("Pendulum-v1").action == jrl.Box((1,), -2.0, 2.0)
    env = jrl.make("Pendulum-v1")
    env_state, _ = env.reset(jax.random.key(0), env.params)
    with pytest.raises(ValueError, match=r"Pendulum-v1: an action of shape \(\).*shape \(1,\)"):
        env.step(jax.random.key(0), env_state, 0.0, env.params)


def test_a_box_to_the_largest_float_has_no_bounds():
    largest = np.finfo(np.float32).max
    box = jrl.Box((3,), [-largest, -largest, -1.0], [largest, 2.0, largest])
    assert box == jrl.Box((3,), [-np.inf, -np.inf, -1.0], [np.inf, 2.0, np.inf])
    assert np.isfinite(jax.vmap(box.sample)(jax.random.split(jax.random.key(0), 50))).all()


@struct.dataclass
class OwnState(environment.EnvState):
    time: int


class Own(environment.Environment):
    """A user's gymnax environment: Python numbers, an action space without bounds."""

    def __init__(self, space=None):
        self.space = space or spaces.Box(-jnp.finfo(jnp.float32).max, jnp.inf, (2,))

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=3)

    def reset_env(self, key, params):
        return jnp.zeros(2), OwnState(time=0)

    def step_env(self, key, state, action, params):
        return jnp.ones(2) * state.time, OwnState(time=state.time + 1), 1, False, {}

    def action_space(self, params):
        return self.space

    def observation_space(self, params):
        return spaces.Box(-1, 1, (2,))


def test_an_instance():
    env = jrl.make(Own(), params=environment.EnvParams(max_steps_in_episode=2))
    assert env.name == "Own"
    assert env.action == jrl.Box((2,), -np.inf, np.inf)
    env_state, _ = env.reset(jax.random.key(0), env.params)
    action = env.action.sample(jax.random.key(1))

    def step(env_state, key):
        return env.step(key, env_state, action, env.params)

    _, out = jax.lax.scan(step, env_state, jax.random.split(jax.random.key(0), 4))
    np.testing.assert_array_equal(out.truncated, [False, True, False, True])
    np.testing.assert_array_equal(out.next_obs[:, 0], [0.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(out.obs[:, 0], 0.0)
    assert out.reward.dtype == jnp.float32


def test_an_action_space_without_counterpart():
    with pytest.raises(ValueError, match=r"Own: the action space .* has no counterpart"):
        jrl.make(Own(spaces.Tuple([spaces.Discrete(2)])))


def test_wrappers_of_gymnax_are_refused():
    env, _ = gymnax.make("CartPole-v1")
    for wrapper, instead in (
        (gymnax.wrappers.StickyActionWrapper(env, 0.1), "jrl.envs.sticky_actions"),
        (gymnax.wrappers.FlattenObservationWrapper(env), "jrl.envs.flatten_observation"),
        (gymnax.wrappers.LogWrapper(env), "jrl.train"),
        (gymnax.wrappers.LegacyStepAPIWrapper(env), "terminated and truncated"),
        (gymnax.wrappers.LogWrapper(gymnax.wrappers.FlattenObservationWrapper(env)), "jrl.train"),
    ):
        with pytest.raises(TypeError, match=f"{type(wrapper).__name__} is a gymnax wrapper.*{instead}"):
            jrl.make(wrapper)
    with pytest.raises(TypeError, match="int is not a gymnax Environment"):
        jrl.make(3)
