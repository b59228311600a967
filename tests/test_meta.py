"""Meta-learning: the outer gradient against its closed form, sinusoids, and policies that learn to navigate."""

import functools

import jax
import jax.numpy as jnp
import meta_learning
import numpy as np
import pytest

import jrl
from jrl import maml, meta

A = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], np.float32)
THETA = np.array([0.5, -1.0, 2.0], np.float32)
TRAIN, TEST = (
    np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
)  # a minimum for each of 4 tasks


def quadratic(theta, minimum):
    return 0.5 * (theta - minimum) @ A @ (theta - minimum)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_the_outer_gradient_of_quadratic_tasks_is_its_closed_form(num_steps, first_order):
    """θ_K − c = (I − αA)^K (θ − c), and its derivative (I − αA)^K is what the first order takes for 1."""
    whole = functools.partial(
        meta.objective,
        quadratic,
        quadratic,
        learning_rate=0.1,
        num_steps=num_steps,
        first_order=first_order,
    )
    value, grad = jax.value_and_grad(whole)(THETA, (TRAIN, TEST))
    contraction = np.linalg.matrix_power(np.eye(3) - 0.1 * A, num_steps)
    adapted = TRAIN + (THETA - TRAIN) @ contraction
    expected = (adapted - TEST) @ A
    np.testing.assert_allclose(
        value, np.mean([quadratic(a, m) for a, m in zip(adapted, TEST, strict=True)]), rtol=1e-5
    )
    np.testing.assert_allclose(
        grad, (expected if first_order else expected @ contraction).mean(0), rtol=1e-4, atol=1e-5
    )


def test_adapting_many_tasks_at_once_is_a_loop_of_gradient_steps():
    def loss(params, batch):
        x, y = batch
        return jnp.square(jnp.tanh(x @ params["w"]) @ params["v"] - y).mean(), x.sum()

    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (2, 3)), "v": jnp.ones(3)}
    x = jax.random.normal(jax.random.key(1), (5, 4, 6, 2))  # tasks, steps, rows
    y = x.prod(-1)
    adapted, (losses, sums) = jax.vmap(lambda batches: meta.adapt(loss, params, batches, 0.05, has_aux=True))(
        (x, y)
    )
    for i in range(5):
        now = params
        for k in range(4):
            (value, total), grads = jax.value_and_grad(loss, has_aux=True)(now, (x[i, k], y[i, k]))
            np.testing.assert_allclose((losses[i, k], sums[i, k]), (value, total), rtol=1e-5)
            now = jax.tree.map(lambda p, g: p - 0.05 * g, now, grads)
        for name in params:
            np.testing.assert_allclose(adapted[name][i], now[name], rtol=1e-5)


def test_sinusoids_are_fitted_in_one_step_after_meta_learning_but_not_after_pretraining():
    test_tasks = meta_learning.sinusoids(jax.random.key(1), 500)
    errors = {}
    for num_steps in (1, 0):
        params = meta_learning.train_sinusoids(jax.random.key(0), num_steps=num_steps, updates=2_500)
        errors[num_steps] = meta_learning.errors(params, test_tasks, (0, 1))
    untrained, after = errors[1]
    assert after < 0.5 * untrained
    assert after < 0.5 * min(errors[0])


def test_a_policy_learns_to_learn_where_the_goal_is():
    env, config = jrl.make("Navigation2D-jrl"), maml.Config(num_tasks=10, num_envs=10, hidden_sizes=(32,))
    algo, hparams = maml.make(env, config), maml.HParams(inner_learning_rate=0.3)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    state, metrics = jrl.train(algo, state, hparams, num_steps=80)
    before, after = (np.mean(metrics[name][-10:]) for name in ("initial_episode_return", "episode_return"))
    assert metrics["episode_return"][0] < -30.0
    assert after > -25.0
    assert after > before + 10.0
    # And so on a goal of its own, by a function of its own.
    adapt = jax.jit(maml.adaptation(env, config), static_argnums=3)
    far = hparams.replace(env=env.params._replace(goal=jnp.array([-0.4, 0.4])))
    _, returns = adapt(jax.random.key(1), state.params, far, 1)
    assert returns.shape == (2,)
    assert returns[1] > returns[0] + 10.0


def test_returns_are_those_of_first_episodes_as_far_as_they_go():
    """Two steps of CartPole end no episode, and are worth 2."""
    env = jrl.make("CartPole-v1")
    config = maml.Config(
        num_tasks=2, num_envs=3, unroll_length=2, hidden_sizes=(4,), task_parameter="gravity"
    )
    algo, hparams = maml.make(env, config), maml.HParams(task_low=9.0, task_high=10.0)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    adapt = jax.jit(maml.adaptation(env, config), static_argnums=3)
    _, returns = adapt(jax.random.key(1), state.params, hparams, 1)
    np.testing.assert_array_equal(returns, [2.0, 2.0])
    _, metrics = jax.jit(algo.step)(state, hparams)
    assert (metrics["num_episodes"], metrics["initial_episode_return"], metrics["episode_return"]) == (
        0,
        2.0,
        2.0,
    )


def test_what_cannot_be_meta_learned_says_so():
    with pytest.raises(
        ValueError, match=r"task_parameter='goal': Pendulum-v1 has no such parameter .*; it has "
    ):
        maml.make(jrl.make("Pendulum-v1"))
    with pytest.raises(
        ValueError, match=r"task_parameter='max_steps': Navigation2D-jrl has no such parameter"
    ):
        maml.make(jrl.make("Navigation2D-jrl"), maml.Config(task_parameter="max_steps"))
    with pytest.raises(ValueError, match=r"num_envs=1: the baseline compares 2 or more"):
        maml.Config(num_envs=1)
    with pytest.raises(ValueError, match=r"inner_steps=-1: must be an integer of at least 0"):
        maml.Config(inner_steps=-1)
