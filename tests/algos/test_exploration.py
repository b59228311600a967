"""What explores by action values: schedules with their ends, policies by what they do with known values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, ops
from jrl.algos import exploration, q_functions
from jrl.types import MaskedObservation, Policy

N, A = 64, 4
KEYS = jax.random.split(jax.random.key(0), 20)
Q = jnp.tile(jnp.asarray([0.0, 3.0, 1.0, 2.0]), (N, 1))
ONLY_LAST_TWO = jnp.tile(jnp.asarray([False, False, True, True]), (N, 1))


def evaluate(params, obs, memory, drawn=0.0):
    """Values that count the steps in the memory: ``obs`` times ``params``, and what was drawn on top."""
    q = obs.obs if isinstance(obs, MaskedObservation) else obs
    return params * q + drawn, jax.tree.map(lambda leaf: leaf + 1, memory)


@pytest.mark.parametrize(
    ("env_steps", "duration", "expected"),
    [(0.0, 100.0, 0.8), (25.0, 100.0, 0.65), (100.0, 100.0, 0.2), (9e9, 100.0, 0.2), (50.0, 0.0, 0.8)],
)
def test_epsilon_goes_linearly_from_start_to_end(env_steps, duration, expected):
    hparams = dqn.HParams(epsilon_start=0.8, epsilon_end=0.2, epsilon_env_steps=duration)
    epsilon = exploration.annealed_epsilon(hparams, jnp.float32(env_steps))
    np.testing.assert_allclose(epsilon, expected, rtol=1e-6)


def test_epsilon_greedy_takes_the_best_or_any_and_hands_on_memory_and_values():
    act = exploration.epsilon_greedy(evaluate)
    action, memory, extras = act((jnp.float32(2.0), 0.0), KEYS[0], Q, jnp.int32(4))
    np.testing.assert_array_equal(action, np.full(N, 1))
    assert int(memory) == 5
    np.testing.assert_array_equal(extras["q"], 2.0 * Q)
    worst, _, _ = act((jnp.float32(-1.0), 0.0), KEYS[0], Q, ())
    np.testing.assert_array_equal(worst, np.zeros(N))
    at_random, _, _ = act((jnp.float32(2.0), 1.0), KEYS[0], Q, ())
    assert set(at_random.tolist()) == set(range(A))


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
@pytest.mark.parametrize("persists", [False, True])
def test_a_mask_holds_for_greedy_and_for_random_actions(epsilon, persists):
    act, acting, memory = exploration.epsilon_greedy(evaluate), (jnp.float32(1.0), epsilon), ()
    if persists:
        act, acting = exploration.persistent(act), (acting, 2.0)
        memory = ops.HeldAction(jnp.zeros(N, jnp.int32), jnp.full(N, 9))  # one that is not allowed is let go
    action, _, _ = act(acting, KEYS[0], MaskedObservation(Q, ONLY_LAST_TWO), memory)
    assert set(action.tolist()) == ({3} if epsilon == 0.0 else {2, 3})


def test_what_is_drawn_moves_the_values_acted_on_and_has_a_key_of_its_own():
    def draw(key, params, obs):
        assert obs.shape == (N, A)
        return params * jax.random.normal(key, (A,))

    act = exploration.epsilon_greedy(evaluate, draw)
    chosen, rolled = [], []
    for key in KEYS:
        action, _, extras = act((jnp.float32(5.0), 0.0), key, Q, ())
        np.testing.assert_array_equal(action, extras["q"].argmax(-1))
        np.testing.assert_allclose(extras["q"] - extras["q"][:1], np.zeros((N, A)))  # one draw for all rows
        chosen.append(int(action[0]))
        rolled.append(np.asarray(act((jnp.float32(5.0), 0.5), key, Q, ())[2]["q"]))
        np.testing.assert_array_equal(rolled[-1], extras["q"])  # the draw does not depend on ε
    assert len(set(chosen)) > 1
    with jax.debug_key_reuse(True):
        jax.jit(act)((jnp.float32(5.0), 0.5), jax.random.key(1), Q, ())


def test_a_persistent_action_is_held_while_greedy_ones_follow_the_values():
    act = exploration.persistent(exploration.epsilon_greedy(evaluate))
    held = exploration.nothing_held((N,))
    greedy, after, extras = act(((jnp.float32(1.0), 0.0), 2.0), KEYS[0], Q, held)
    np.testing.assert_array_equal(greedy, np.full(N, 1))
    np.testing.assert_array_equal(after.left, np.zeros(N))
    np.testing.assert_array_equal(extras["q"], Q)
    # With a μ just above 1 nearly all last longer than this test.
    taken = []
    for key in KEYS:
        action, held, _ = act(((jnp.float32(1.0), 1.0), 1.01), key, Q, held)
        taken.append(np.asarray(action))
    same = (np.stack(taken) == taken[0]).all(0)
    assert same.mean() > 0.9
    assert set(taken[0].tolist()) == set(range(A))


def test_nothing_is_held_at_first_in_two_arrays():
    held = exploration.nothing_held((3, 2))
    assert held.action.shape == held.left.shape == (3, 2)
    assert not np.asarray(held.action).any()
    assert not np.asarray(held.left).any()
    jax.jit(lambda held: jax.tree.map(jnp.negative, held), donate_argnums=0)(held)  # one buffer could not be


def test_the_actions_of_another_policy_leave_the_memory_of_the_one_that_follows():
    def act(params, key, obs, memory):
        assert memory == ()
        return jnp.full(obs.shape[0], params), (), {"q": obs}

    policy = exploration.actions_of(Policy(act, jnp.int32(2)), exploration.nothing_held)
    memory = policy.init_memory((N,))
    action, after, extras = policy(KEYS[0], Q, memory)
    np.testing.assert_array_equal(action, np.full(N, 2))
    assert after is memory
    assert extras == ()


@pytest.mark.parametrize(("batch", "draws"), [((8,), 4), ((6,), 2), ((3,), 1), ((), 1)])
def test_noise_to_act_with_is_of_as_many_draws_as_share_the_environments_evenly(batch, draws):
    env = jrl.make("CartPole-v1")
    config = dqn.Config(num_envs=8, noisy=True, noise_draws=4, hidden_sizes=(4,))
    q_function = q_functions.make(env, config, None, "dqn")
    obs = jnp.ones((*batch, *env.observation.shape))
    params = q_function.init(jax.random.key(0), obs, 0.5)
    drawn = q_function.noise(jax.random.key(1), (params, ()), obs)
    q, _ = q_function.values((params, ()), obs, (), drawn)
    assert drawn.fraction is None
    assert q.shape == (*batch, 2)
    assert len(np.unique(np.asarray(q).reshape(-1, 2), axis=0)) == draws
