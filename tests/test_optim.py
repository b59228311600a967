import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrl import dqn, optim, ppo
from jrl.ops import counter

GRADS = {"policy": jnp.array([3.0, 0.0]), "value": jnp.array([[0.0], [4.0]])}  # global norm 5
PARAMS = jax.tree.map(jnp.zeros_like, GRADS)


def test_the_gradient_is_clipped_by_the_norm_over_all_leaves():
    # The first moment after one step is (1 - b1) times the gradient that Adam was given.
    def seen(max_grad_norm):
        optimizer = optim.adam(1e-3, max_grad_norm=max_grad_norm)
        _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
        unravel = jax.flatten_util.ravel_pytree(PARAMS)[1]
        return jax.tree.map(lambda m: m / 0.1, unravel(optax.tree.get(state, "mu")))

    clipped, whole = seen(0.5), seen(50.0)
    np.testing.assert_allclose(clipped["policy"], [0.3, 0.0], rtol=1e-5)
    np.testing.assert_allclose(clipped["value"], [[0.0], [0.4]], rtol=1e-5)
    np.testing.assert_allclose(optax.global_norm(clipped), 0.5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, GRADS)


def test_first_step_is_adams_with_its_epsilon():
    grads = {"x": jnp.array([2e-5, -3.0])}
    optimizer = optim.adam(0.1, max_grad_norm=100.0)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    expected = -0.1 * grads["x"] / (jnp.abs(grads["x"]) + 1e-5)  # both moments corrected for their bias
    np.testing.assert_allclose(updates["x"], expected, rtol=1e-4)


def test_traced_numbers_do_not_retrace_and_give_what_constants_give():
    traces = []

    @jax.jit
    def update(learning_rate, max_grad_norm):
        traces.append(1)
        optimizer = optim.adam(learning_rate, max_grad_norm=max_grad_norm)
        return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]

    for learning_rate, norm in ((0.1, 0.5), (0.3, 9.0), (0.0, 0.1)):
        optimizer = optim.adam(learning_rate, max_grad_norm=norm)
        expected, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), update(learning_rate, norm), expected
        )
    assert len(traces) == 1


def test_the_state_does_not_depend_on_the_numbers():
    states = [optim.adam(lr, max_grad_norm=norm).init(PARAMS) for lr, norm in ((0.1, 1.0), (9.0, 7.0))]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_vector_gives_what_a_tree_gives(monkeypatch):
    def steps():
        optimizer = optim.adam(0.1, max_grad_norm=1.0)
        params, state = PARAMS, optimizer.init(PARAMS)
        for scale in (1.0, -0.3, 0.01):
            updates, state = optimizer.update(
                jax.tree.map(lambda g, scale=scale: scale * g, GRADS), state, params
            )
            params = optax.apply_updates(params, updates)
        return params, optim.global_norm(GRADS), state

    joined, norm, state = steps()
    assert optax.tree.get(state, "mu").shape == (4,)
    monkeypatch.setattr(optim, "FLAT_UP_TO", 3)  # as for a large model
    leaf_by_leaf, expected_norm, state = steps()
    assert jax.tree.structure(optax.tree.get(state, "mu")) == jax.tree.structure(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), joined, leaf_by_leaf)
    np.testing.assert_allclose([norm, expected_norm], 5.0, rtol=1e-6)


def test_without_a_norm_nothing_is_clipped():
    optimizer = optim.adam(1e-3, max_grad_norm=None)
    _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.global_norm(optax.tree.get(state, "mu")), 0.1 * 5.0, rtol=1e-5)


def test_parameters_of_two_precisions_keep_them():
    params = {"low": jnp.ones(3, jnp.bfloat16), "high": jnp.ones(2)}
    optimizer = optim.adam(0.1, max_grad_norm=1.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates["low"].dtype, updates["high"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("module", [ppo, dqn])
def test_default_optimizer_reads_max_grad_norm_of_the_hparams(module):
    hparams = module.HParams(max_grad_norm=0.25)
    optimizer = optim.default_optimizer(hparams, 1.0)
    _, state = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.global_norm(optax.tree.get(state, "mu")), 0.1 * 0.25, rtol=1e-5)


@pytest.mark.parametrize("module", [ppo, dqn])
@pytest.mark.parametrize(
    ("env_steps", "expected"),
    [(0, 0.4), (250, 0.325), (500, 0.25), (1000, 0.1), (1001, 0.1), (10**12, 0.1)],
)
def test_annealing_end_points(module, env_steps, expected):
    hparams = module.HParams(learning_rate=0.4, learning_rate_end=0.1, anneal_env_steps=1000.0)
    count = jnp.array([env_steps % 2**32, env_steps // 2**32], jnp.uint32)
    rate = optim.annealed_learning_rate(hparams, counter.to_float(count))
    assert rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "hparams", [ppo.HParams(learning_rate=0.4), dqn.HParams(learning_rate=0.4, anneal_env_steps=0.0)]
)
def test_no_annealing_over_no_steps_which_is_the_default_of_ppo(hparams):
    for env_steps in (0.0, 1.0, 1e9):
        assert optim.annealed_learning_rate(hparams, jnp.float32(env_steps)) == jnp.float32(0.4)


def test_a_sweep_over_the_schedule_is_a_batch_of_rates():
    hparams = ppo.HParams(
        learning_rate=jnp.array([1.0, 2.0]), learning_rate_end=0.0, anneal_env_steps=jnp.array([10.0, 0.0])
    )
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, hparams)
    rates = jax.vmap(optim.annealed_learning_rate, (axes, None))(hparams, jnp.float32(5.0))
    np.testing.assert_allclose(rates, [0.5, 2.0])
