"""What the articles behind this project got wrong about values and policy gradients, done right.

Their grid world and traffic light are in tests/envs/test_finite.py and tests/algos/test_tabular.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, ops
from jrl.language import exact, models, surrogates, tasks


def test_the_maximum_of_q_is_the_best_policys_value_and_not_a_policys_own():
    tree = exact.enumerate_prefixes(tasks.random_rewards(3, 2))
    uniform = [jnp.full(x.shape, -jnp.log(3.0)) for x in tree.reward]
    own = exact.expectation(tree, uniform)
    best = exact.optimal_values(tree)
    assert best[0].max() > own + 0.3
    # The policy's own value is the mean of its own action values.
    following = (jnp.exp(uniform[1]) * tree.reward[1]).sum(-1)
    np.testing.assert_allclose((jnp.exp(uniform[0]) * (tree.reward[0] + following)).sum(), own, rtol=1e-5)


def test_a_q_target_takes_the_best_next_action_stops_at_the_end_and_has_no_gradient():
    next_q = jnp.array([[1.0, 5.0], [1.0, 5.0]])
    discount = 0.9 * (1.0 - jnp.array([0.0, 1.0]))
    target = ops.q_target(jnp.array([1.0, 1.0]), discount, next_q)
    np.testing.assert_allclose(target, [1.0 + 0.9 * 5.0, 1.0])
    gradient = jax.grad(lambda next_q: ops.q_target(jnp.ones(2), discount, next_q).sum())(next_q)
    assert (gradient == 0).all()
    gradient = jax.grad(lambda q: ops.double_q_target(jnp.ones(2), discount, q, q).sum())(next_q)
    assert (gradient == 0).all()


def test_q_learning_refuses_actions_without_a_maximum():
    with pytest.raises(TypeError, match="Q-learning maximises over Discrete actions"):
        dqn.make(jrl.make("Pendulum-v1"))


def test_tokens_are_drawn_from_logits_not_from_probabilities_taken_for_them():
    logits = jnp.array([2.0, 0.0, -2.0])
    policy = models.next_token(jnp.broadcast_to(logits, (20_000, 3)), None)
    frequency = np.bincount(policy.sample(jax.random.key(0)), minlength=3) / 20_000
    right, wrong = jax.nn.softmax(logits), jax.nn.softmax(jax.nn.softmax(logits))
    np.testing.assert_allclose(frequency, right, atol=0.01)
    assert np.abs(frequency - wrong).max() > 0.2


def test_the_ratio_is_of_the_token_taken_weighed_by_an_advantage():
    """At the old policy ρ = 1 and the gradient is A (1[a] − π): nothing of it is left where A is 0."""
    logits = jnp.array([[[0.3, -0.2, 0.1], [1.0, 0.0, 0.0]]])
    action, advantage = jnp.array([[2, 0]]), jnp.array([[1.5, 0.0]])
    old = models.next_token(logits, None).log_prob(action)
    said, choice = jnp.ones((1, 2), bool), surrogates.VARIANTS["ppo"]

    def loss(logits):
        log_prob = models.next_token(logits, None).log_prob(action)
        return surrogates.surrogate_loss(choice, log_prob, old, advantage, said, 0.2, 0.2)

    gradient = jax.grad(loss)(logits)
    expected = -1.5 * (jax.nn.one_hot(2, 3) - jax.nn.softmax(logits[0, 0])) / 2
    np.testing.assert_allclose(gradient[0, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(gradient[0, 1], 0.0)
