"""The parts that algorithms with a replay share, on actions that DQN has not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, replay, rollout
from jrl.algos import off_policy
from jrl.envs import vectorize
from jrl.types import Policy

CONFIG = dqn.Config(num_envs=3, unroll_length=2, batch_size=4, capacity=64, warmup_env_steps=32)


def test_the_warm_up_holds_what_a_policy_with_vector_actions_met():
    """Item by item what the same unrolls give: observations, real-valued actions, what the policy recorded."""
    env = jrl.make("Pendulum-v1")
    envs = vectorize(env, CONFIG.num_envs)

    def act(params, key, obs, memory):
        action = jax.vmap(env.action.sample)(jax.random.split(key, obs.shape[0]))
        return action, memory, {"first": obs[..., 0]}

    policy, key = Policy(act), jax.random.key(1)
    start = rollout.start(jax.random.key(0), envs, env.params, CONFIG.num_envs)
    end, memory = jax.jit(
        lambda key: off_policy.warm_up(key, envs, env.params, policy, start, CONFIG, replay.uniform)
    )(key)
    steps = off_policy.warmup_env_steps(CONFIG)
    assert steps == 36  # 32 rounded up to unrolls of 3 × 2

    state, met = start, []
    for unroll_key in jax.random.split(key, steps // 6):
        state, transitions, _ = rollout.unroll(unroll_key, envs, env.params, policy, state, 2)
        met.append(transitions)
    met = jax.tree.map(lambda *leaves: jnp.concatenate(leaves).reshape(steps, *leaves[0].shape[2:]), *met)
    held = replay.uniform.read(memory, jnp.arange(steps))
    assert held.action.dtype == jnp.float32
    assert held.action.shape == (36, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), held, met)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), end.obs, state.obs)


def test_a_policy_that_is_given_takes_the_warm_up():
    def act(action, key, obs, memory):
        assert memory == ()
        return jnp.full(obs.shape[0], action), memory, {"not": obs}

    config = dataclasses.replace(CONFIG, persistent=True, hidden_sizes=(4,))
    algo = dqn.make(jrl.make("CartPole-v1"), config, warmup_policy=Policy(act, jnp.int32(1)))
    state = jax.jit(algo.init)(jax.random.key(0), dqn.HParams())
    assert (replay.uniform.read(state.replay, jnp.arange(36)).action == 1).all()


@pytest.mark.parametrize(
    ("period", "copied"), [(6.0, [0, 1, 0, 1]), (8.0, [0, 0, 1, 0]), (2.0, [1, 1, 1, 1])]
)
def test_the_target_is_copied_once_the_period_has_gone_by(period, copied):
    """Three steps at a time, whatever the period: at the first time not before it."""
    target, since = {"w": jnp.zeros(2)}, jnp.float32(0)
    for i, copy in enumerate(copied):
        params = {"w": jnp.full(2, i + 1.0)}
        new, since = off_policy.copy_periodically(params, target, since, 3, period)
        assert (new["w"] == (params if copy else target)["w"]).all()
        target = new
