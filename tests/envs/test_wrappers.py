"""Wrappers of time, actions, rewards and observations, at the ends of episodes above all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import envs
from jrl.types import Box, Discrete, MaskedObservation, MultiDiscrete


def counting(shape=(1,), dtype=jnp.float32, end=100, limit=100, action=None):
    """Observation: ``10 * episode start + time`` everywhere; reward: the action plus 1."""

    def obs(state):
        start, time = state
        return jnp.full(shape, 10 * start + time, dtype)

    def reset(key, params):
        state = (jax.random.randint(key, (), 1, 100), 0)
        return state, obs(state)

    def transition(key, state, action, params):
        start, time = state
        state = (start, time + 1)
        terminated, truncated = time + 1 >= params["end"], time + 1 >= params["limit"]
        return state, obs(state), jnp.sum(action) + 1, terminated, truncated

    return envs.from_functions(
        reset, transition, {"end": end, "limit": limit}, action or Discrete(3), "Counting"
    )


def run(env, steps, action=1, params=None, key=0):
    """First observation, the steps with one action, and the environment states after each."""
    params = env.params if params is None else params
    actions = (
        jnp.broadcast_to(jnp.asarray(action), (steps, *np.shape(action)[1:]))
        if np.ndim(action) == 0
        else action
    )

    @jax.jit
    def go(key, params, actions):
        reset_key, key = jax.random.split(key)
        env_state, obs = env.reset(reset_key, params)

        def step(env_state, x):
            key, action = x
            env_state, out = env.step(key, env_state, action, params)
            return env_state, (out, env_state)

        _, (out, states) = jax.lax.scan(step, env_state, (jax.random.split(key, steps), actions))
        return obs, out, states

    return jax.device_get(go(jax.random.key(key), params, actions))


def check_spec(env, obs, out):
    assert jax.tree.structure(obs) == jax.tree.structure(env.observation)
    for spec, first, later, successor in zip(
        *(jax.tree.leaves(t) for t in (env.observation, obs, out.obs, out.next_obs)), strict=True
    ):
        assert first.shape == spec.shape
        assert later.shape[1:] == successor.shape[1:] == spec.shape
        assert first.dtype == later.dtype == successor.dtype == spec.dtype


# ---------------------------------------------------------------------------------------- observations


def test_flatten():
    env = envs.transform_observation(
        counting((2, 3), end=2), lambda o: {"b": o.astype(jnp.int32), "a": o[0, 0]}
    )
    env = envs.flatten_observation(env)
    obs, out, _ = run(env, 4)
    check_spec(env, obs, out)
    assert env.observation == jax.ShapeDtypeStruct((7,), jnp.float32)
    assert (out.next_obs[1] == obs[0] + 2).all()
    np.testing.assert_array_equal(out.obs[1] % 10, 0)


def test_flatten_keeps_bool():
    odd = envs.transform_observation(counting((2, 3), end=2), lambda o: o.astype(jnp.int32) % 2 == 1)
    obs, out, _ = run(envs.flatten_observation(odd), 4)
    check_spec(envs.flatten_observation(odd), obs, out)
    assert out.obs.dtype == jnp.bool_
    np.testing.assert_array_equal(out.next_obs, run(odd, 4)[1].next_obs.reshape(4, 6))


def test_one_hot():
    env = envs.transform_observation(counting((), jnp.int32, end=2), lambda o: o % 10)
    env = envs.one_hot_observation(env, 4)
    obs, out, _ = run(env, 4)
    check_spec(env, obs, out)
    np.testing.assert_array_equal(out.obs.argmax(-1), [1, 0, 1, 0])
    np.testing.assert_array_equal(out.next_obs.argmax(-1), [1, 2, 1, 2])
    np.testing.assert_array_equal(out.next_obs.sum(-1), 1)
    with pytest.raises(ValueError, match=r"one_hot_observation\(Counting\): needs an integer scalar"):
        envs.one_hot_observation(counting(), 4)


@pytest.mark.parametrize(
    ("shape", "stacked"), [((), (3,)), ((2,), (6,)), ((4, 5), (4, 5, 3)), ((4, 5, 2), (4, 5, 6))]
)
def test_frame_stack(shape, stacked):
    env = envs.frame_stack(counting(shape, end=4), 3)
    obs, out, _ = run(env, 6)
    check_spec(env, obs, out)
    assert env.observation.shape == stacked

    def frames(x):  # [..., 3] frames, one number each, oldest first
        x = x.reshape(
            *x.shape[: x.ndim - len(stacked)], -1, 3, max(1, shape[-1]) if len(shape) in (1, 3) else 1
        )
        return x[..., 0, :, 0]

    first, later, successor = frames(obs), frames(out.obs), frames(out.next_obs)
    start = first[0]
    np.testing.assert_array_equal(first, start)
    np.testing.assert_array_equal(later[0], [start, start, start + 1])
    np.testing.assert_array_equal(later[2], start + np.array([1, 2, 3]))
    np.testing.assert_array_equal(successor[3], start + np.array([2, 3, 4]))  # the true successor
    assert (later[3] == later[3][0]).all()  # the next episode's first frame, repeated
    assert later[3][0] % 10 == 0
    np.testing.assert_array_equal(successor[4], later[3][0] + np.array([0, 0, 1]))  # nothing of the old one


def test_whole_numbers_and_an_action_for_each_environment():
    env = jrl.make("CartPole-v1")
    for num_envs in (2.0, "2"):
        with pytest.raises(ValueError, match=rf"vectorize: num_envs={num_envs!r}: must be a whole number"):
            envs.vectorize(env, num_envs)
    with pytest.raises(ValueError, match=r"frame_stack: n=2.5: must be a whole number"):
        envs.frame_stack(env, 2.5)
    key = jax.random.key(0)
    twice = envs.vectorize(envs.vectorize(env, 3), 2)  # a batch of batches, [2, 3, ...]
    env_state, obs = twice.reset(key, env.params)
    assert obs.shape == (2, 3, 4)
    assert twice.step(key, env_state, jnp.zeros((2, 3), int), env.params)[1].reward.shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"CartPole-v1: actions of shape \(6,\) for 2 environments, expected \(2, "
    ):
        twice.step(key, env_state, jnp.zeros(6, int), env.params)


def test_frame_stack_needs_a_frame():
    with pytest.raises(ValueError, match=r"frame_stack\(n=0\)"):
        envs.frame_stack(counting(), 0)


@pytest.mark.parametrize(
    "wrap",
    [
        envs.flatten_observation,
        functools.partial(envs.frame_stack, n=2),
        functools.partial(envs.time_limit, max_steps=2),  # one clock for all, were it let through
        functools.partial(envs.sticky_actions, probability=0.5),  # and one draw for all
    ],
)
def test_single_environment_wrappers_refuse_a_vectorised_one(wrap):
    env = wrap(envs.vectorize(counting((2,)), 3))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) where \(2,\) is expected. Apply"):
        env.reset(jax.random.key(0), env.params)


def test_action_mask():
    def odd_forbids_zero(obs, params):
        time = obs[0].astype(jnp.int32) % 10
        return jnp.array([True, True, False]).at[0].set((time % 2 == 0) | (params["end"] > 50))

    env = envs.action_mask(counting(end=3), odd_forbids_zero)
    obs, out, _ = run(env, 4)
    assert isinstance(obs, MaskedObservation)
    check_spec(env, obs, out)
    # times shown: 1, 2, 0 (reset), 1; true successors: 1, 2, 3, 1
    np.testing.assert_array_equal(out.obs.action_mask[:, 0], [False, True, True, False])
    np.testing.assert_array_equal(out.next_obs.action_mask[:, 0], [False, True, False, False])
    _, out, _ = run(env, 2, params={"end": 60, "limit": 100})
    assert out.obs.action_mask[:, 0].all()


def test_masks_pass_through_wrappers_of_observations():
    env = envs.action_mask(counting((2, 2), end=2), lambda obs, params: jnp.array([True, False, True]))
    for wrapped, shape in ((envs.flatten_observation(env), (4,)), (envs.frame_stack(env, 3), (2, 2, 3))):
        obs, out, _ = run(wrapped, 3)
        check_spec(wrapped, obs, out)
        assert wrapped.observation.obs.shape == shape
        assert wrapped.observation.action_mask.shape == (3,)


def test_action_mask_refusals():
    with pytest.raises(ValueError, match=r"mask_fn returns float32\[3\], expected bool\[3\]"):
        envs.action_mask(counting(), lambda obs, params: jnp.ones(3))
    with pytest.raises(ValueError, match="needs a Discrete action space"):
        envs.action_mask(counting(action=Box((1,), -1, 1)), lambda obs, params: jnp.ones(1, bool))
    masked = envs.action_mask(counting(), lambda obs, params: jnp.ones(3, bool))
    with pytest.raises(ValueError, match="already has a mask"):
        envs.action_mask(masked, lambda obs, params: jnp.ones(3, bool))


# ------------------------------------------------------------------------------------------------ time


def test_time_limit_truncates_and_resets():
    env = envs.time_limit(counting(), 3)
    _, out, states = run(env, 7)
    np.testing.assert_array_equal(out.truncated, [False, False, True] * 2 + [False])
    assert not out.terminated.any()
    np.testing.assert_array_equal(out.next_obs[:, 0] % 10, [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(out.obs[:, 0] % 10, [1, 2, 0, 1, 2, 0, 1])
    np.testing.assert_array_equal(states.time, [1, 2, 0, 1, 2, 0, 1])
    starts = out.obs[[1, 2, 5], 0] // 10
    assert len(set(starts)) == 3  # each episode starts with its own draw
    # the inner environment goes on from where the new observation says
    np.testing.assert_array_equal(states.env_state[0], out.obs[:, 0] // 10)


def test_time_limit_and_termination_on_one_step():
    env = envs.time_limit(counting(end=3), 3)
    _, out, states = run(env, 4)
    np.testing.assert_array_equal(out.terminated, [False, False, True, False])
    np.testing.assert_array_equal(out.truncated, [False, False, True, False])
    np.testing.assert_array_equal(states.env_state[0], out.obs[:, 0] // 10)


def test_an_earlier_end_inside_restarts_the_clock():
    for inner in (counting(end=2), counting(limit=2)):
        _, out, states = run(envs.time_limit(inner, 3), 6)
        np.testing.assert_array_equal(out.terminated | out.truncated, [False, True] * 3)
        np.testing.assert_array_equal(states.time, [1, 0] * 3)


def test_time_limit_is_traced():
    env = envs.time_limit(counting(), 3)
    _, out, _ = run(env, 6, params=env.params._replace(max_steps=2))
    np.testing.assert_array_equal(out.truncated, [False, True] * 3)
    for zero in (0, np.int64(0), jnp.int32(0)):
        with pytest.raises(ValueError, match=r"time_limit\(max_steps=0\)"):
            envs.time_limit(counting(), zero)


# --------------------------------------------------------------------------------------------- actions


def test_sticky_actions():
    env = envs.sticky_actions(counting(end=4), 1.0)
    actions = jnp.array([2, 0, 1, 0, 1, 2, 0, 2])
    _, out, states = run(env, 8, actions)
    # always the first action of the episode again; none is carried into the next episode
    np.testing.assert_array_equal(out.reward - 1, [2, 2, 2, 2, 1, 1, 1, 1])
    np.testing.assert_array_equal(states.first, [False, False, False, True] * 2)
    _, out, _ = run(env, 8, actions, params=env.params._replace(probability=0.0))
    np.testing.assert_array_equal(out.reward - 1, actions)
    with pytest.raises(ValueError, match=r"sticky_actions\(probability=1.5\)"):
        envs.sticky_actions(counting(), 1.5)


def test_sticky_actions_repeat_what_was_executed():
    env = envs.sticky_actions(counting(), 0.3)
    actions = jax.random.randint(jax.random.key(5), (500,), 0, 3)
    _, out, _ = run(env, 500, actions)
    executed, asked = out.reward - 1, np.asarray(actions)
    repeated = executed[1:] != asked[1:]
    assert (executed[1:][repeated] == executed[:-1][repeated]).all()
    # a repeat shows only where the last action executed differs from the one asked for: 2 in 3
    assert abs(repeated.mean() - 0.2) < 0.06


def test_sticky_actions_of_a_box():
    env = envs.sticky_actions(counting(end=3, action=Box((2,), -1, 1)), 1.0)
    actions = jnp.arange(8, dtype=jnp.float32).reshape(4, 2)
    _, out, _ = run(env, 4, actions)
    np.testing.assert_array_equal(out.reward - 1, [1, 1, 1, 13])


def test_discretize_one_component():
    env = envs.discretize_actions(counting(action=Box((1,), -2.0, 2.0)), 5)
    assert env.action == Discrete(5)
    _, out, _ = run(env, 5, jnp.arange(5))
    np.testing.assert_allclose(out.reward - 1, [-2, -1, 0, 1, 2])


def test_discretize_several_components():
    env = envs.discretize_actions(counting(action=Box((2,), [-1.0, 0.0], [1.0, 10.0])), [3, 11])
    assert env.action == MultiDiscrete((3, 11))
    _, out, _ = run(env, 3, jnp.array([[0, 0], [2, 10], [1, 4]]))
    np.testing.assert_allclose(out.reward - 1, [-1, 11, 4])


@pytest.mark.parametrize("bins", [5, np.int64(5), np.array(5), np.array([5])])
def test_discretize_takes_any_whole_number(bins):
    assert envs.discretize_actions(counting(action=Box((1,), -2.0, 2.0)), bins).action == Discrete(5)


def test_the_outermost_actions_are_the_bounds_themselves():
    """By ``low + a width`` some would be a rounding beyond them, which an environment that checks refuses."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=64).astype(np.float32)
    box = Box((64,), low, low + rng.uniform(0.1, 3.0, 64).astype(np.float32))
    env = counting(action=box)._replace(step=lambda key, env_state, action, params: action)
    for bins in (3, 4, 8):
        step = jax.jit(envs.discretize_actions(env, bins).step)
        np.testing.assert_array_equal(step(None, None, jnp.zeros(64, jnp.int32), None), box.low)
        np.testing.assert_array_equal(step(None, None, jnp.full(64, bins - 1), None), box.high)
    step = jax.jit(envs.rescale_action(env).step)
    np.testing.assert_array_equal(step(None, None, jnp.full(64, -1.0), None), box.low)
    np.testing.assert_array_equal(step(None, None, jnp.full(64, 1.0), None), box.high)


def test_discretize_refusals():
    box = counting(action=Box((2,), -1, 1))
    for bins in (1, [3], [3, 1], 2.7, [2.7, 3], [], "33", True):
        with pytest.raises(ValueError, match="each at least 2"):
            envs.discretize_actions(box, bins)
    with pytest.raises(ValueError, match="needs a Box action space with finite bounds"):
        envs.discretize_actions(counting(action=Box((1,), -np.inf, 1)), 3)
    with pytest.raises(ValueError, match=r"discretize_actions\(Counting\): needs a Box"):
        envs.discretize_actions(counting(), 3)


def test_clip_and_rescale_action():
    box = Box((1,), [0.0], [4.0])
    _, out, _ = run(envs.clip_action(counting(action=box)), 3, jnp.array([[-1.0], [2.0], [5.0]]))
    np.testing.assert_allclose(out.reward - 1, [0, 2, 4])
    env = envs.rescale_action(counting(action=box))
    assert env.action == Box((1,), -1.0, 1.0)
    _, out, _ = run(env, 3, jnp.array([[-1.0], [0.0], [1.0]]))
    np.testing.assert_allclose(out.reward - 1, [0, 2, 4])
    with pytest.raises(ValueError, match=r"clip_action\(Counting\): needs a Box"):
        envs.clip_action(counting())


# --------------------------------------------------------------------------------------------- rewards


def test_scale_and_clip_reward():
    env = envs.clip_reward(envs.scale_reward(counting(end=2), 2.0), -1.0, 5.0)
    _, out, _ = run(env, 3, jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(out.reward, [2, 4, 5])
    np.testing.assert_array_equal(out.terminated, [False, True, False])
    assert out.reward.dtype == np.float32
    changed = env.params._replace(high=100.0, env=env.params.env._replace(scale=3.0))
    _, out, _ = run(env, 3, jnp.array([0, 1, 2]), params=changed)
    np.testing.assert_array_equal(out.reward, [3, 6, 9])
    with pytest.raises(ValueError, match=r"clip_reward\(low=1.0, high=0.0\)"):
        envs.clip_reward(counting(), 1.0, 0.0)


def test_all_together_vectorised_and_swept():
    """A tower of wrappers is still an environment: it scans, keeps its types, and its parameters sweep."""
    env = envs.time_limit(counting((4, 4), end=7), 5)
    env = envs.scale_reward(envs.sticky_actions(env, 0.25), 0.5)
    env = envs.vectorize(envs.action_mask(envs.frame_stack(env, 2), lambda o, p: jnp.ones(3, bool)), 2)

    def go(limit):
        inner = env.params.env
        params = env.params._replace(env=inner._replace(env=inner.env._replace(max_steps=limit)))
        env_state, _ = env.reset(jax.random.key(0), params)

        def step(env_state, key):
            return env.step(key, env_state, jnp.ones(2, jnp.int32), params)

        return jax.lax.scan(step, env_state, jax.random.split(jax.random.key(1), 12))[1]

    out = jax.jit(jax.vmap(go))(jnp.array([2, 100]))
    assert out.obs.obs.shape == (2, 12, 2, 4, 4, 2)
    np.testing.assert_array_equal(out.truncated.sum(1), [[6, 6], [0, 0]])
    np.testing.assert_array_equal(out.terminated.sum(1), [[0, 0], [1, 1]])


def test_on_gymnax():
    env = envs.frame_stack(envs.sticky_actions(jrl.make("Breakout-MinAtar"), 0.1), 2)
    assert env.observation.shape == (10, 10, 8)
    env = envs.discretize_actions(jrl.make("Pendulum-v1"), 3)
    env_state, _ = env.reset(jax.random.key(0), env.params)
    _, out = env.step(jax.random.key(0), env_state, jnp.int32(2), env.params)
    assert out.reward.shape == ()
