"""Exploration: the frequencies the equations ask for, masks, ties and the extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

ROWS = 20_000
Q = jnp.array([0.5, 2.0, -1.0, 2.5, 0.0])
MASK = jnp.array([True, True, False, False, True])


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def repeated(x, *batch):
    return jnp.broadcast_to(x, (*batch, *x.shape))


def frequencies_match(action, probability):
    counts, expected = np.bincount(action, minlength=len(probability)), ROWS * np.asarray(probability)
    possible = expected > 0
    assert np.all(counts[~possible] == 0)
    statistic = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    degrees = max(possible.sum() - 1, 1)
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_frequencies(epsilon, mask):
    rows = None if mask is None else repeated(mask, ROWS)
    action = jax.jit(ops.epsilon_greedy)(jax.random.key(0), repeated(Q, ROWS), epsilon, rows)
    assert action.shape == (ROWS,)
    assert action.dtype == jnp.int32
    allowed = np.ones(5, bool) if mask is None else np.asarray(mask)
    probability = epsilon * allowed / allowed.sum()
    probability[3 if mask is None else 1] += 1 - epsilon
    frequencies_match(action, probability)


def test_epsilon_per_row_and_any_batch_shape():
    q, epsilon = repeated(Q, 2, 500), jnp.stack([jnp.zeros(500), jnp.ones(500)])
    explore = jax.jit(ops.epsilon_greedy)
    action = explore(jax.random.key(0), q, epsilon)
    np.testing.assert_array_equal(action[0], 3)
    assert set(np.unique(action[1])) == set(range(5))
    assert explore(jax.random.key(0), Q, 0.0).shape == ()


def test_ties_take_the_first_and_a_row_that_allows_nothing_allows_everything():
    explore, key, q = jax.jit(ops.epsilon_greedy), jax.random.key(0), jnp.array([1.0, 3.0, 3.0])
    assert explore(key, q, 0.0) == 1
    rows, nothing = repeated(q, 500), jnp.zeros((500, 3), bool)
    np.testing.assert_array_equal(explore(key, rows, 0.0, nothing), 1)
    assert set(np.unique(explore(key, rows, 1.0, nothing))) == {0, 1, 2}


@pytest.mark.parametrize("mask", [None, MASK])
def test_boltzmann_frequencies(mask):
    rows = None if mask is None else repeated(mask, ROWS)
    action = jax.jit(ops.boltzmann)(jax.random.key(1), repeated(Q, ROWS), 0.7, rows)
    assert action.dtype == jnp.int32
    weight = np.exp(np.asarray(Q, np.float64) / 0.7) * (1 if mask is None else np.asarray(mask))
    frequencies_match(action, weight / weight.sum())


def test_boltzmann_at_the_extremes():
    q = repeated(jnp.array([1.0, 3.0, 3.0]), ROWS)
    for cold in (0.0, 1e-30):
        frequencies_match(ops.boltzmann(jax.random.key(2), q, cold), [0.0, 0.5, 0.5])
    frequencies_match(ops.boltzmann(jax.random.key(2), q, 1e9), [1 / 3] * 3)
    masked = ops.boltzmann(jax.random.key(2), q, 0.0, jnp.zeros(q.shape, bool).at[:, 0].set(True))
    np.testing.assert_array_equal(masked, 0)


@pytest.mark.parametrize("hot", [1e37, jnp.inf])
def test_a_mask_holds_at_any_temperature(hot):
    allowed = jnp.array([True, False, True])
    probability = ops.boltzmann_policy(jnp.array([1.0, 3.0, 2.0]), hot, allowed)
    np.testing.assert_allclose(probability, [0.5, 0.0, 0.5], rtol=1e-6)
    drawn = ops.boltzmann(jax.random.key(2), jnp.zeros((ROWS, 3)), hot, jnp.tile(allowed, (ROWS, 1)))
    frequencies_match(drawn, [0.5, 0.0, 0.5])


@pytest.mark.parametrize("explore", [ops.epsilon_greedy, ops.boltzmann])
def test_vmapped_equals_looped(explore):
    q, keys = repeated(Q, 3, 50), jax.random.split(jax.random.key(3), 3)
    numbers = jnp.array([0.1, 0.5, 0.9])
    explore = jax.jit(explore)
    together = jax.jit(jax.vmap(explore))(keys, q, numbers)
    for i in range(3):
        np.testing.assert_array_equal(together[i], explore(keys[i], q[i], numbers[i]))


def test_errors_name_the_argument():
    with pytest.raises(AssertionError, match="mask must be bool"):
        ops.epsilon_greedy(jax.random.key(0), Q, 0.1, jnp.ones(5))
    with pytest.raises(AssertionError, match=r"q \[5\], mask \[4\]"):
        ops.epsilon_greedy(jax.random.key(0), Q, 0.1, jnp.ones(4, bool))
    with pytest.raises(AssertionError, match="q must be floating"):
        ops.epsilon_greedy(jax.random.key(0), jnp.arange(3), 0.1)


@pytest.mark.parametrize("mask", [None, MASK])
def test_policies_are_what_the_draws_follow(mask):
    """The drawing functions and the probabilities agree where there are no equals."""
    allowed = jnp.ones(5, bool) if mask is None else mask
    best = jnp.argmax(jnp.where(allowed, Q, -jnp.inf))
    expected = 0.3 * allowed / allowed.sum() + 0.7 * (jnp.arange(5) == best)
    np.testing.assert_allclose(ops.epsilon_greedy_policy(Q, 0.3, mask), expected, rtol=1e-6)
    weights = np.where(allowed, np.exp(np.asarray(Q, float) / 0.5), 0.0)
    np.testing.assert_allclose(
        ops.boltzmann_policy(Q, 0.5, mask), weights / weights.sum(), rtol=1e-5, atol=1e-12
    )
    probability = ops.boltzmann_policy(Q, 0.5, mask)
    frequencies_match(ops.draw_action(jax.random.key(3), repeated(probability, ROWS)), probability)


def test_equals_share():
    q = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(ops.epsilon_greedy_policy(q, 0.0), [[0.5, 0.5, 0.0], [1 / 3] * 3])
    np.testing.assert_allclose(ops.boltzmann_policy(q, 0.0), [[0.5, 0.5, 0.0], [1 / 3] * 3], rtol=1e-6)
    per_row = ops.epsilon_greedy_policy(q, jnp.array([0.0, 0.3]))
    np.testing.assert_allclose(per_row, [[0.5, 0.5, 0.0], [1 / 3] * 3], rtol=1e-6)


def test_ucb():
    q, count = jnp.array([0.5, 0.4, 0.0]), jnp.array([50, 10, 40])
    score = np.array([0.5, 0.4, 0.0]) + np.sqrt(np.log(100) / np.array([50, 10, 40]))
    np.testing.assert_array_equal(ops.ucb_policy(q, count, 1.0), np.eye(3)[score.argmax()])
    assert score.argmax() == 1
    np.testing.assert_array_equal(ops.ucb_policy(q, count, 0.0), [1, 0, 0])
    # What was never tried comes first, and among several of that kind each is as likely.
    np.testing.assert_array_equal(ops.ucb_policy(q, jnp.array([5, 0, 0]), 1.0), [0, 0.5, 0.5])
    np.testing.assert_allclose(ops.ucb_policy(q, jnp.zeros(3, int), 0.0), [1 / 3] * 3, rtol=1e-6)
    masked = jnp.array([True, False, True])
    np.testing.assert_array_equal(ops.ucb_policy(q, jnp.array([5, 0, 3]), 0.0, masked), [1, 0, 0])


def held_for(exponent, steps=4_000, longest=10_000):
    """Actions [steps, 64] of a policy that always explores, and what was still held after each."""
    q, start = jnp.zeros((64, 3)), ops.HeldAction(jnp.zeros(64, jnp.int32), jnp.zeros(64, jnp.int32))

    def step(held, key):
        action, held = ops.persistent_epsilon_greedy(key, q, held, 1.0, exponent, longest=longest)
        return held, (action, held.left)

    _, (action, left) = jax.jit(lambda keys: jax.lax.scan(step, start, keys))(
        jax.random.split(jax.random.key(0), steps)
    )
    return np.asarray(action), np.asarray(left)


def test_exploratory_actions_persist_for_as_long_as_the_power_law_says():
    action, left = held_for(3.0)
    began = np.vstack([np.ones((1, 64), bool), left[:-1] == 0])
    # A hold of n steps leaves n − 1 after its first: P(n ≥ k) = k^-2.
    durations = left[began] + 1
    for k in (1, 2, 3, 5, 10):
        np.testing.assert_allclose((durations >= k).mean(), k**-2.0, atol=0.006)
    assert (action[1:] == action[:-1])[~began[1:]].all()  # held
    np.testing.assert_allclose(np.bincount(action[began]) / began.sum(), [1 / 3] * 3, atol=0.01)
    assert held_for(1.01, steps=50, longest=7)[1].max() == 6


def test_persistent_exploration_with_an_infinite_exponent_is_epsilon_greedy_and_keeps_to_the_mask():
    q = jnp.asarray([0.0, 2.0, 1.0])
    start = ops.HeldAction(jnp.full(20_000, 2, jnp.int32), jnp.zeros(20_000, jnp.int32))
    batch = jnp.broadcast_to(q, (20_000, 3))
    action, held = ops.persistent_epsilon_greedy(jax.random.key(0), batch, start, 0.3, jnp.inf)
    np.testing.assert_allclose(np.bincount(action) / 20_000, [0.1, 0.8, 0.1], atol=0.01)
    assert (held.left == 0).all()
    # Held, but no longer allowed: let go.
    mask = jnp.broadcast_to(jnp.asarray([True, True, False]), (20_000, 3))
    holding = start._replace(left=jnp.full(20_000, 5, jnp.int32))
    action, _ = ops.persistent_epsilon_greedy(jax.random.key(0), batch, holding, 0.0, 2.0, mask)
    assert (action == 1).all()
    action, held = ops.persistent_epsilon_greedy(jax.random.key(0), batch, holding, 0.0, 2.0)
    assert (action == 2).all()
    assert (held.left == 4).all()
