"""jrl's own environments as gymnax 1.x environments: the same steps, and there and back again."""

import functools

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import environment, spaces
from gymnax.wrappers.gym import GymnaxToGymWrapper

import jrl
from jrl.envs import from_functions, register_with_gymnax
from jrl.envs.gymnax import to_gymnax
from jrl.types import Box, MultiDiscrete

IDS = ["GridWorld-jrl", "TrafficLight-jrl", "Blackjack-jrl", "ProbeContinuous-jrl"]


@pytest.fixture
def registered():
    known = list(gymnax.registered_envs)
    yield register_with_gymnax()
    # The list is gymnax's, and other tests go through all of it.
    for env_id in set(gymnax.registered_envs) - set(known):
        gymnax.registered_envs.remove(env_id)
        del gymnax.registration._registry[env_id]


def test_every_own_id_is_registered_once(registered):
    assert {"GridWorld-jrl", "DeepSea-jrl", "ProbeTruncation-jrl"} <= set(registered)
    assert set(registered) <= set(gymnax.registered_envs)
    assert register_with_gymnax() == registered
    assert len(jrl.envs.ids()) == len(set(jrl.envs.ids()))


@pytest.mark.parametrize("env_id", IDS)
def test_gymnax_makes_it_and_steps_as_jrl_does(registered, env_id):
    theirs, params = gymnax.make(env_id)
    ours = jrl.make(env_id)
    assert isinstance(theirs, environment.Environment)
    assert theirs.name == env_id
    keys = jax.random.split(jax.random.key(0), 20)
    obs, state = jax.jit(theirs.reset)(keys[0], params)
    env_state, our_obs = jax.jit(ours.reset)(keys[0], ours.params)
    their_step, our_step = jax.jit(theirs.step), jax.jit(ours.step)
    np.testing.assert_array_equal(obs, our_obs)
    space = theirs.observation_space(params)
    for key in keys:
        action = theirs.action_space(params).sample(key)
        obs, state, reward, terminated, truncated, info = their_step(key, state, action, params)
        env_state, out = our_step(key, env_state, action, ours.params)
        jax.tree.map(
            np.testing.assert_array_equal,
            (obs, state.env_state, reward, terminated, truncated, info["final_observation"]),
            (out.obs, env_state, out.reward, out.terminated, out.truncated, out.next_obs),
        )
        assert space.contains(obs)
        assert info["discount"] == 1 - terminated


def test_it_runs_vmapped_in_a_scan_with_the_limit_of_its_parameters(registered):
    env, params = gymnax.make("TrafficLight-jrl", raw=True)
    assert isinstance(env.observation_space(params), spaces.Discrete)
    assert env.num_actions == 2
    assert params.max_steps_in_episode == 100

    @functools.partial(jax.jit, static_argnums=0)
    def run(length, params):
        keys = jax.random.split(jax.random.key(0), 4)
        _, state = jax.vmap(env.reset, (0, None))(keys, params)

        def step(state, key):
            keys = jax.random.split(key, 4)
            _, state, _, _, truncated, _ = jax.vmap(env.step, (0, 0, 0, None))(
                keys, state, jnp.zeros(4, int), params
            )
            return state, (truncated, state.time)

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), length))[1]

    truncated, time = run(10, params.replace(max_steps_in_episode=4))
    np.testing.assert_array_equal(truncated[:, 0], [False, False, False, True] * 2 + [False] * 2)
    np.testing.assert_array_equal(time[:, 0], [1, 2, 3, 0, 1, 2, 3, 0, 1, 2])


def test_the_limit_of_parameters_that_have_this_very_field():
    env = to_gymnax(jrl.make("CartPole-v1"))
    params = env.default_params
    assert params.max_steps_in_episode == 500
    step = jax.jit(env.step)
    _, state = env.reset(jax.random.key(0), params)
    ends = []
    for _ in range(6):
        _, state, _, terminated, truncated, _ = step(
            jax.random.key(1), state, 0, params.replace(max_steps_in_episode=3)
        )
        ends.append((bool(terminated), bool(truncated)))
    assert ends == [(False, False), (False, False), (False, True)] * 2


def test_the_limit_of_what_is_wrapped():
    cart_pole = jrl.make("CartPole-v1")
    for wrapped, limit in ((cart_pole, 500), (jrl.envs.time_limit(cart_pole, 7), 7)):
        env = to_gymnax(jrl.envs.scale_reward(jrl.envs.sticky_actions(wrapped, 0.0), 2.0))
        params = env.default_params
        assert params.max_steps_in_episode == limit
        _, state = env.reset(jax.random.key(0), params)
        for expected in (False, True, False):
            _, state, _, _, truncated, _ = env.step(
                jax.random.key(1), state, 0, params.replace(max_steps_in_episode=2)
            )
            assert truncated == expected


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Navigation2D-jrl", "Breakout-MinAtar", "bytes"])
def test_gymnaxs_own_wrapper_for_gymnasium_takes_it(env_id):
    """Its conversion takes float() of the bounds of one component, and gymnasium no infinite ones of bools or bytes."""
    if env_id == "bytes":
        zero = jnp.zeros(3, jnp.uint8)
        ours = from_functions(
            lambda key, params: ((), zero), lambda *args: ((), zero, 0.0, True, False), (), jrl.Discrete(2)
        )
    else:
        ours = jrl.make(env_id)
    wrapped = GymnaxToGymWrapper(to_gymnax(ours))
    for obs in (wrapped.reset(seed=0)[0], wrapped.step(wrapped.action_space.sample())[0]):
        assert wrapped.observation_space.contains(np.asarray(obs))
    if isinstance(ours.action, Box):
        np.testing.assert_array_equal(wrapped.action_space.low, ours.action.low)
        np.testing.assert_array_equal(wrapped.action_space.high, ours.action.high)
    assert jrl.make(to_gymnax(ours)).action == ours.action


def test_there_and_back_again():
    ours = jrl.make("GridWorld-jrl", slip=0.3)
    back = jrl.make(to_gymnax(ours))
    assert back.observation == ours.observation
    assert back.action == ours.action
    env_state, obs = jax.jit(back.reset)(jax.random.key(0), back.params)
    our_state, our_obs = jax.jit(ours.reset)(jax.random.key(0), ours.params)
    back_step, our_step = jax.jit(back.step), jax.jit(ours.step)
    np.testing.assert_array_equal(obs, our_obs)
    for i in range(12):
        env_state, out = back_step(jax.random.key(i), env_state, i % 4, back.params)
        our_state, our_out = our_step(jax.random.key(i), our_state, i % 4, ours.params)
        jax.tree.map(np.testing.assert_array_equal, out, our_out)


def test_step_env_shows_the_true_successor():
    env = to_gymnax(jrl.make("GridWorld-jrl", start=11))
    obs, state = env.reset(jax.random.key(0), env.default_params)
    obs, state, reward, terminated, _ = env.step_env(jax.random.key(1), state, 2, env.default_params)
    assert (obs.argmax(), reward, bool(terminated)) == (15, 1.0, True)
    assert not env.is_truncated(state, env.default_params)


def test_what_has_no_counterpart():
    with pytest.raises(TypeError, match="to_gymnax\\(env='GridWorld-jrl'\\): no jrl Environment"):
        to_gymnax("GridWorld-jrl")
    env = jrl.make("GridWorld-jrl")
    with pytest.raises(ValueError, match=r"no space for actions MultiDiscrete"):
        to_gymnax(env._replace(action=MultiDiscrete((2, 2))))
    pair = from_functions(
        lambda key, params: (0, (0.0, 1.0)),
        lambda key, state, action, params: (state, (0.0, 1.0), 0.0, True, False),
        (), jrl.Discrete(2), "pair",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"pytree of several arrays; wrap .*flatten_observation"):
        to_gymnax(pair)
    with pytest.raises(ValueError, match="have no number"):
        _ = to_gymnax(jrl.make("ProbeContinuous-jrl")).num_actions
