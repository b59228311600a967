"""Heads of Q-networks against each other and against loops; what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, ops
from jrl.algos import q_functions
from jrl.types import QuantileQuery

N, A, K = 4, 3, 5
SUPPORT = jnp.linspace(-50.0, 50.0, K)


def rows(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


REWARD, DISCOUNT = rows(0, N), jnp.asarray([0.9, 0.0, 0.81, 0.9])
NEXT_Q, ONLINE_Q = rows(1, N, A), rows(2, N, A)


def certain(q):
    """Distributions that are the value itself: ``(head, output)`` of each kind."""
    quantiles = q_functions.Quantiles(
        jnp.broadcast_to(q[..., None], (*q.shape, K)),
        jnp.broadcast_to(ops.quantile_midpoints(K), (*q.shape[:-1], K)),
    )
    probability = ops.categorical_projection(q[..., None], jnp.ones((*q.shape, 1)), SUPPORT)
    logits = jnp.log(jnp.maximum(probability, 1e-30))
    return [
        (q_functions.expected(None), q),
        (q_functions.categorical(SUPPORT), logits),
        (q_functions.quantile(1.0), quantiles),
    ]


def mean_of(target):
    """The mean of a target, whatever its kind: a value, K probabilities or K quantiles."""
    if target.ndim == 1:
        return target
    return (target * SUPPORT).sum(-1) if np.allclose(target.sum(-1), 1.0, atol=1e-3) else target.mean(-1)


@pytest.mark.parametrize("kind", range(3), ids=["expected", "categorical", "quantile"])
def test_targets_of_every_head_have_the_mean_of_the_scalar_target(kind):
    """No atom is clipped here, so that projecting keeps means."""
    head, output = certain(NEXT_Q)[kind]
    np.testing.assert_allclose(head.mean(output), NEXT_Q, atol=1e-4)
    double = ops.double_q_target(REWARD, DISCOUNT, ONLINE_Q, NEXT_Q)
    for target, expected in (
        (head.target(REWARD, DISCOUNT, output, NEXT_Q), ops.q_target(REWARD, DISCOUNT, NEXT_Q)),
        (head.target(REWARD, DISCOUNT, output, NEXT_Q, ONLINE_Q), double),
        (
            head.soft_target(REWARD, DISCOUNT, output, NEXT_Q, 0.5),
            REWARD + DISCOUNT * ops.soft_value(NEXT_Q, 0.5),
        ),
    ):
        np.testing.assert_allclose(mean_of(target), expected, atol=1e-3)


@pytest.mark.parametrize("kind", range(3), ids=["expected", "categorical", "quantile"])
def test_the_loss_sees_the_action_taken_only_and_the_error_vanishes_at_its_target(kind):
    head, output = certain(NEXT_Q)[kind]
    action = jnp.asarray([0, 2, 1, 0], jnp.uint8)
    own = head.target(jnp.zeros(N), jnp.ones(N), output, NEXT_Q, jax.nn.one_hot(action, A))
    _, error = head.loss(output, action, own)
    np.testing.assert_allclose(error, np.zeros(N), atol=1e-4)
    away = head.target(jnp.full(N, 3.0), jnp.ones(N), output, NEXT_Q, jax.nn.one_hot(action, A))
    grads = jax.grad(lambda output: head.loss(output, action, away)[0].sum(), allow_int=True)(output)
    grad = grads.value if kind == 2 else grads
    touched = np.abs(np.asarray(grad)).reshape(N, A, -1).sum(-1) > 0
    np.testing.assert_array_equal(touched, np.asarray(jax.nn.one_hot(action, A, dtype=bool)))
    assert (head.loss(output, action, away)[1] > 0.1).all()


def test_an_implicit_network_is_asked_for_the_fractions_it_is_given():
    """A custom network whose quantile function is known: uniform on [0, 2] for action 0, half of that for 1."""

    def init(key, query):
        return {"scale": jnp.asarray([2.0, 1.0])}

    def apply(params, query):
        assert isinstance(query, QuantileQuery)
        return query.fraction[..., None, :] * params["scale"][:, None]

    config = dqn.Config(distribution="implicit", num_atoms=64)
    q_function = q_functions.make(jrl.make("CartPole-v1"), config, (init, apply), "dqn")
    obs = jnp.zeros((3, 4))
    params = q_function.init(jax.random.key(0), obs, 0.5)
    fixed = q_function.evaluate(params, obs)
    np.testing.assert_allclose(q_function.mean(fixed, obs, None), [[1.0, 0.5]] * 3, rtol=1e-5)
    two = [
        q_function.evaluate(params, obs, one) for one in q_function.draw(jax.random.key(1), params, 2, (3,))
    ]
    for drawn in two:
        np.testing.assert_allclose(drawn.value[:, 0], 2 * drawn.fraction, rtol=1e-6)
    assert len(np.unique([drawn.fraction for drawn in two])) == 2 * 3 * 64


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"distribution='c51': must be one of none, categorical, quantile, implicit"
    ):
        dqn.Config(distribution="c51")
    with pytest.raises(
        ValueError, match=r"num_atoms=1 with distribution='categorical': there must be at least 2"
    ):
        dqn.Config(distribution="categorical", num_atoms=1)
    with pytest.raises(ValueError, match=r"munchausen=True with n_step=3: .*use n_step=1"):
        dqn.Config(munchausen=True, n_step=3)
    narrow = (lambda key, obs: {}, lambda params, obs: obs[..., :2])
    with pytest.raises(ValueError, match=r"returns \(2,\) for one observation, but .* needs \(2, 51\) atoms"):
        dqn.make(jrl.make("CartPole-v1"), dqn.Config(distribution="quantile"), network=narrow)
