"""Exact solutions against a slow loop written from the Bellman equation, against each other, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.ops import mdp

S, A = 50, 5


@functools.cache
def thousand():
    """1,000 random processes, each solved twice."""
    keys = jax.random.split(jax.random.key(0), 1000)
    processes = jax.vmap(lambda key: mdp.random_mdp(key, S, A, 0.9))(keys)
    by_value = jax.jit(jax.vmap(mdp.value_iteration))(processes)
    by_policy = jax.jit(jax.vmap(mdp.policy_iteration))(processes)
    return processes, by_value, by_policy


def slow_value(P, R, gamma, policy=None, sweeps=2000):
    """Sweeps in float64, one state and action at a time; states ``[S]``."""
    P, R = np.float64(P), np.float64(R)
    value = np.zeros(len(R))
    for _ in range(sweeps):
        q = np.array([[R[s, a] + gamma * P[s, a] @ value for a in range(R.shape[1])] for s in range(len(R))])
        new = q.max(1) if policy is None else (policy * q).sum(1)
        if np.abs(new - value).max() < 1e-13:
            break
        value = new
    return value, q


def small(seed=1, gamma=0.9, **choices):
    return mdp.random_mdp(jax.random.key(seed), 6, 3, gamma, **choices)


def test_policy_iteration_equals_value_iteration_on_a_thousand_processes():
    _, by_value, by_policy = thousand()
    scale = np.abs(by_policy.value).max()
    # A residual of 1e-6 allows an error ten times as large.
    np.testing.assert_allclose(by_value.value, by_policy.value, atol=1e-6 * scale / (1 - 0.9), rtol=0)
    np.testing.assert_allclose(by_value.q, by_policy.q, atol=1e-6 * scale / (1 - 0.9), rtol=0)
    # Where the two policies differ the two actions are worth the same.
    differ = (by_value.policy != by_policy.policy).any(-1)
    lost = by_policy.q.max(-1) - (by_value.policy * by_policy.q).sum(-1)
    assert np.abs(lost[differ]).max(initial=0.0) < 1e-5 * scale
    assert differ.mean() < 1e-3


def test_the_bellman_residual_is_at_most_a_millionth():
    """Of the largest value, which float32 knows to a ten-millionth; recomputed in float64."""
    processes, by_value, by_policy = jax.device_get(thousand())
    for solution in (by_value, by_policy):
        value = np.float64(solution.value)
        q = np.float64(processes.R) + 0.9 * np.einsum("nsat,nt->nsa", np.float64(processes.P), value)
        residual = np.abs(q.max(-1) - value).max(-1)
        assert (residual / np.abs(value).max(-1)).max() <= 1e-6
        assert np.abs(solution.residual - residual).max() < 1e-5
    assert by_value.iterations.max() < 1000
    assert by_policy.iterations.max() < 20


def test_in_float64_the_residual_is_absolutely_small():
    with jax.enable_x64(True):
        process = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), small(gamma=0.99))
        for solution in (mdp.value_iteration(process), mdp.policy_iteration(process)):
            assert solution.value.dtype == jnp.float64
            assert solution.residual <= 1e-6


@pytest.mark.parametrize("solve", [mdp.value_iteration, mdp.policy_iteration])
def test_arrays_of_numpy_are_taken_as_they_come(solve):
    """Without a warning, which is an error here; in float64 only where JAX computes in it."""
    process = mdp.random_mdp(jax.random.key(1), 4, 2, 0.9)
    given = mdp.TabularMDP(np.asarray(process.P, np.float64), np.asarray(process.R, np.float64), 0.9)
    found = solve(given)
    assert found.value.dtype == found.policy.dtype == jnp.float32
    np.testing.assert_array_equal(found.value, solve(process._replace(gamma=0.9)).value)
    with jax.enable_x64(True):
        assert solve(given).value.dtype == jnp.float64


def test_against_a_slow_loop():
    process = small()
    value, q = slow_value(*process)
    for solution in (mdp.value_iteration(process), mdp.policy_iteration(process)):
        np.testing.assert_allclose(solution.value, value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(solution.q, q, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(solution.policy.argmax(1), q.argmax(1))
    np.testing.assert_allclose(mdp.v_from_q(jnp.float32(q)), q.max(1), rtol=1e-6)


def test_a_policy_is_evaluated_exactly():
    process = small()
    policy = jax.random.dirichlet(jax.random.key(5), jnp.ones(3), (6,))
    value, q = slow_value(*process, policy=np.float64(policy))
    np.testing.assert_allclose(mdp.evaluate_policy(process, policy), value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mdp.v_from_q(jnp.float32(q), policy), value, rtol=1e-5, atol=1e-5)
    assert mdp.bellman_residual(process, jnp.float32(value), policy) < 1e-5
    assert mdp.bellman_residual(process, jnp.float32(value)) > 0.1  # it is no optimal one


def test_no_policy_is_better_than_the_optimal_one():
    process = small(2)
    best = mdp.policy_iteration(process).value
    policies = jax.random.dirichlet(jax.random.key(6), jnp.ones(3), (64, 6))
    others = jax.vmap(lambda policy: mdp.evaluate_policy(process, policy))(policies)
    assert (others <= best + 1e-5).all()


def test_termination_is_what_the_rows_lack():
    """One state, reward 1, going on with probability 0.5: V = 1 / (1 − γ/2), also for γ = 1."""
    process = mdp.TabularMDP(jnp.full((1, 1, 1), 0.5), jnp.ones((1, 1)), 0.9)
    np.testing.assert_allclose(mdp.value_iteration(process).value, 1 / 0.55, rtol=1e-6)
    np.testing.assert_allclose(mdp.policy_iteration(process._replace(gamma=1.0)).value, 2.0, rtol=1e-6)


def test_equal_actions_do_not_cycle():
    process = mdp.TabularMDP(jnp.full((4, 3, 4), 0.25), jnp.ones((4, 3)), 0.99)
    solution = mdp.policy_iteration(process)
    assert solution.iterations == 1
    np.testing.assert_allclose(solution.value, 100.0, rtol=1e-5)


def test_value_iteration_gives_up_and_says_how_far_it_came():
    solution = mdp.value_iteration(small(), max_iterations=3)
    assert solution.iterations == 3
    assert solution.residual > 0.01


def test_gamma_is_traced():
    process = small()
    solve = jax.jit(jax.vmap(lambda gamma: mdp.value_iteration(process._replace(gamma=gamma)).value))
    for gamma, value in zip((0.0, 0.5, 0.95), solve(jnp.array([0.0, 0.5, 0.95])), strict=True):
        np.testing.assert_allclose(value, slow_value(process.P, process.R, gamma)[0], rtol=1e-4, atol=1e-4)


def test_random_processes():
    process = small(branching=2)
    np.testing.assert_allclose(process.P.sum(-1), 1.0, rtol=1e-6)
    assert ((process.P > 0).sum(-1) == 2).all()
    assert (small().P > 0).all()
    with pytest.raises(ValueError, match=r"branching=7\): a state has between 1 and num_states=6 successors"):
        small(branching=7)


def test_shapes():
    process = small()
    with pytest.raises(AssertionError, match=r"value must have shape \[6\], got \[5\]"):
        mdp.q_from_v(process, jnp.zeros(5))
    with pytest.raises(AssertionError, match=r"policy must have shape \[6, 3\], got \[6\]"):
        mdp.evaluate_policy(process, jnp.zeros(6))
    with pytest.raises(AssertionError, match=r"P must have shape \[6, 3, 6\], got \[6, 3, 5\]"):
        mdp.value_iteration(process._replace(P=process.P[..., :5]))
    with pytest.raises(AssertionError, match=r"R must be floating, got int32"):
        mdp.value_iteration(process._replace(R=process.R.astype(int)))
    with pytest.raises(AssertionError, match=r"gamma must have shape \[\], got \[2\]"):
        mdp.value_iteration(process._replace(gamma=jnp.ones(2)))
