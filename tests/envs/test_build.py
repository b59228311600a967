"""A new environment of plain functions, through scan and vectorize; what strict mends and what it refuses."""

import textwrap

import fake_algorithm as fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import configuration
from jrl.envs import from_functions, strict, vectorize
from jrl.types import Discrete, Environment, TimeStep


def reset(key, params):
    position = jax.random.uniform(key, minval=-1.0, maxval=1.0)
    return (position, 0), position[None]


def transition(key, state, action, params):
    position, time = state
    position, time = position + params["speed"] * (2 * action - 1), time + 1
    return (position, time), position[None], 1, jnp.abs(position) > 2.0, time >= params["limit"]


def walk():
    return from_functions(reset, transition, {"speed": 0.5, "limit": 8}, Discrete(2), "Walk")


def rollout(env, key, steps, num_envs):
    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key, env.params)

    def step(env_state, key):
        action_key, key = jax.random.split(key)
        action = jax.vmap(env.action.sample)(jax.random.split(action_key, num_envs))
        return env.step(key, env_state, action, env.params)

    return obs, jax.lax.scan(step, env_state, jax.random.split(key, steps))[1]


def jitted_rollout(env, key, steps, num_envs):
    return jax.jit(lambda key: rollout(env, key, steps, num_envs))(key)


def test_through_vectorize_and_scan():
    env = vectorize(jrl.make(walk()), 3)
    obs, out = jitted_rollout(env, jax.random.key(0), 40, 3)
    assert env.observation == jax.ShapeDtypeStruct((1,), jnp.float32)
    assert obs.shape == (3, 1)
    assert out.obs.shape == (40, 3, 1)
    assert out.reward.dtype == jnp.float32
    out = jax.device_get(out)
    assert out.terminated.any()
    assert out.truncated.any()
    ended = out.terminated | out.truncated
    before = np.concatenate([np.asarray(obs)[None], out.obs[:-1]])
    np.testing.assert_allclose(
        np.abs(out.next_obs - before), 0.5, rtol=1e-5
    )  # the successor, also at the end
    np.testing.assert_array_equal(out.obs[~ended], out.next_obs[~ended])
    assert (np.abs(out.obs[ended]) <= 1.0).all()  # a first observation
    np.testing.assert_array_equal(out.terminated, np.abs(out.next_obs[..., 0]) > 2.0)
    firsts = np.concatenate([np.asarray(obs), out.obs[ended]])
    assert len(np.unique(firsts)) == len(firsts)  # each episode, its own draw


def test_the_example_of_the_docstring():
    example = from_functions.__doc__.partition("::\n\n")[2].partition("    Args:")[0]
    names = {"jax": jax, "jnp": jnp, "from_functions": from_functions, "Discrete": Discrete}
    exec(textwrap.dedent(example), names)
    _, out = jitted_rollout(vectorize(names["env"], 2), jax.random.key(0), 25, 2)
    assert out.truncated.any()
    assert out.reward.dtype == jnp.float32


def test_a_record_written_by_hand():
    """Plain functions are an Environment as they are, if they return arrays of fixed types."""

    def reset(key, params):
        time = jnp.int32(0)
        return time, jnp.float32(time)[None]

    def step(key, time, action, params):
        next_obs = jnp.float32(time + 1)[None]
        limit = time + 1 >= params
        time = jnp.where(limit, 0, time + 1)
        obs = jnp.float32(time)[None]
        return time, TimeStep(obs, jnp.float32(action), jnp.bool_(False), limit, next_obs)

    env = Environment(reset, step, 3, jax.ShapeDtypeStruct((1,), jnp.float32), Discrete(2))
    _, out = jitted_rollout(vectorize(env, 2), jax.random.key(0), 6, 2)
    np.testing.assert_array_equal(out.obs[:, 0, 0], [1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(out.next_obs[:, 0, 0], [1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(out.truncated[:, 1], [False, False, True] * 2)


def test_strict_makes_types_stable():
    """Reset gives Python numbers and integers, step gives floats and arrays, and a key is among the state."""

    def reset(key, params):
        return {"time": 0, "total": 0, "key": key, "flag": False}, {"a": 0, "b": jnp.zeros(2, jnp.int8)}

    def step(key, state, action, params):
        state = {**state, "time": state["time"] + 1, "total": state["total"] + params[0], "flag": 1}
        obs = {"a": state["total"], "b": jnp.ones(2, jnp.int32)}
        return state, TimeStep(obs, jnp.ones((1,), jnp.int32), 0, np.bool_(True), obs)

    env = strict(Environment(reset, step, (0.5,), None, Discrete(2)))
    assert env.observation["a"] == jax.ShapeDtypeStruct((), jnp.float32)
    assert env.observation["b"] == jax.ShapeDtypeStruct((2,), jnp.int32)
    env_state, _ = env.reset(jax.random.key(0), env.params)
    env_state, out = jax.lax.scan(
        lambda s, k: env.step(k, s, 1, env.params), env_state, jax.random.split(jax.random.key(1), 3)
    )
    assert float(env_state["total"]) == 1.5
    assert env_state["flag"].dtype == jnp.int32
    assert out.reward.shape == (3,)
    assert out.terminated.dtype == out.truncated.dtype == jnp.bool_
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((env_state | {"key": out.reward}, out)))


def test_new_parameters_do_not_retrace():
    env = walk()
    traces = []

    @jax.jit
    def run(params):
        traces.append(1)
        env_state, _ = env.reset(jax.random.key(0), params)
        return env.step(jax.random.key(1), env_state, 1, params)[1].next_obs

    obs = [run({"speed": speed, "limit": limit})[0] for speed, limit in ((0.5, 8), (1.0, 3))]
    assert len(traces) == 1
    assert float(obs[1] - obs[0]) == pytest.approx(0.5)
    swept = jax.vmap(run)({"speed": jnp.asarray([0.5, 1.0]), "limit": jnp.asarray([8, 3])})
    np.testing.assert_allclose(swept[:, 0], np.asarray(obs).ravel())


def test_a_number_that_the_default_does_not_hold_is_refused_where_it_is_known():
    def reset(key, params):
        return 0, jnp.zeros(1)

    def transition(key, time, action, params):
        return time + 1, jnp.zeros(1), params["gain"][0], False, time >= params["limit"]

    env = from_functions(reset, transition, {"gain": [1], "limit": 5}, Discrete(2), "Whole")
    for change, message in (
        ({"gain": [0.5]}, r"Whole: params\['gain'\]\[0\] is 0.5, which is no int32.*1.0 for 1"),
        ({"limit": np.inf}, r"params\['limit'\] is inf, which is no int32"),
    ):
        params = {"gain": [1], "limit": 5} | change
        with pytest.raises(ValueError, match=message):
            env.reset(jax.random.key(0), params)
        with pytest.raises(ValueError, match=message):
            configuration.build(fake, env, hparams={"env": params})
    assert env.step(jax.random.key(0), 0, 1, {"gain": [2.0], "limit": np.int64(5)})[1].reward == 2.0
    with pytest.raises(
        ValueError, match=r"params\['gain'\]\[0\] is a Python float, and int32 by its default"
    ):
        jax.jit(env.reset)(jax.random.key(0), {"gain": [0.5], "limit": 5})


def test_refusals():
    def more(key, state, action, params):
        (position, time), obs, reward, terminated, truncated = transition(key, state, action, params)
        return (position, time, 0), obs, reward, terminated, truncated

    def longer(key, state, action, params):
        state, obs, reward, terminated, truncated = transition(key, state, action, params)
        return state, jnp.concatenate([obs, obs]), reward, terminated, truncated

    def vector(key, state, action, params):
        state, obs, _, terminated, truncated = transition(key, state, action, params)
        return state, obs, jnp.ones(2), terminated, truncated

    params = walk().params
    with pytest.raises(ValueError, match=r"Odd: what reset returns against .* the structures differ"):
        from_functions(reset, more, params, Discrete(2), "Odd")
    with pytest.raises(ValueError, match=r"Odd: .* leaf \[1\] has shape \(1,\) against \(2,\)"):
        from_functions(reset, longer, params, Discrete(2), "Odd")
    with pytest.raises(TypeError, match="action=2: expected"):
        from_functions(reset, transition, params, 2, "Odd")
    env = from_functions(reset, vector, params, Discrete(2), "Odd")
    with pytest.raises(ValueError, match=r"Odd: reward has shape \(2,\), expected a scalar"):
        env.step(jax.random.key(0), env.reset(jax.random.key(0), params)[0], 0, params)
    with pytest.raises(ValueError, match=r"vectorize\(num_envs=0\)"):
        vectorize(walk(), 0)


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (
            lambda key, params: jnp.zeros(2),
            "Odd: reset returns (ShapeDtypeStruct|.*Array|.*Tracer): expected",
        ),
        (
            lambda key, params: (0, jnp.zeros(2), {}),
            r"Odd: reset returns a tuple of 3: expected \(env_state, obs\)",
        ),
    ],
    ids=["obs", "three"],
)
def test_what_a_reset_must_return(reset, message):
    def transition(key, state, action, params):
        return state, jnp.zeros(2), 1.0, False, False

    with pytest.raises(ValueError, match=message):
        from_functions(reset, transition, (), Discrete(2), "Odd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out: out[:4],
            r"Odd: transition returns a tuple of 4: expected \(env_state, obs, reward, term",
        ),
        (lambda out: list(out), r"Odd: transition returns list: expected"),
        (
            lambda out: (*out[:3], out[3][None].repeat(2), out[4]),
            r"Odd: terminated has shape \(2,\), expected a scalar",
        ),
        (lambda out: (*out[:4], 0.1), r"Odd: truncated is float32, in which 0.1 would be True"),
        (lambda out: (*out[:2], None, *out[3:]), r"Odd: reward is None, expected a number"),
    ],
    ids=["four", "list", "two flags", "fraction", "none"],
)
def test_what_a_transition_must_return(change, message):
    def reset(key, params):
        return jnp.float32(0.0), jnp.zeros(1)

    def transition(key, state, action, params):
        return change((state, jnp.zeros(1), 1.0, jnp.bool_(True), False))

    def made_and_stepped():
        env = from_functions(reset, transition, (), Discrete(2), "Odd")
        jax.eval_shape(env.step, jax.random.key(0), jnp.float32(0.0), 0, ())

    with pytest.raises(ValueError, match=message):
        made_and_stepped()
