"""The layout for large batches is another way to compute the same function and the same gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import networks, ppo
from jrl.networks import defaults
from jrl.networks.mlp import affine

KEY = jax.random.key(0)
ENVS = {
    "vector": jrl.envs.from_functions(
        lambda key, params: ((), jnp.zeros(3)),
        lambda key, state, action, params: (state, jnp.zeros(3), 0.0, False, False),
        (),
        jrl.types.Discrete(2),
        "vector",
    ),
    "image": jrl.envs.from_functions(
        lambda key, params: ((), jnp.zeros((6, 7, 2))),
        lambda key, state, action, params: (state, jnp.zeros((6, 7, 2)), 0.0, False, False),
        (),
        jrl.types.Box((3,), -1.0, 1.0),
        "image",
    ),
}


def networks_of(name, **choices):
    env = ENVS[name]
    config = ppo.Config(hidden_sizes=(5, 4), channels=(3, 2), **choices)
    build = lambda first: networks.actor_critic(  # noqa: E731
        env, config, shared_torso=choices.get("shared_torso", False), features_first=first
    )
    return build(False), build(True), env


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("vector", {}),
        ("vector", {"layer_norm": True, "shared_torso": True}),
        ("image", {"layer_norm": True}),
        ("image", {"activation": "relu"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [(128,), (2, 3, 25)], ids=str)
def test_outputs_and_gradients_are_the_same(name, choices, batch):
    plain, first, env = networks_of(name, **choices)
    rng = np.random.default_rng(0)
    obs = jnp.asarray(rng.normal(size=(*batch, *env.observation.shape)), jnp.float32)
    params = jax.jit(plain.init)(KEY, obs, ())
    # Biases and log_std off zero, so that a misplaced one shows.
    params = jax.tree.map(lambda leaf: leaf + np.float32(0.1 * rng.normal(size=leaf.shape)), params)

    def run(network):
        def loss(params):
            out = network.apply(params, obs, ())[0]
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    grads, out = run(plain)
    first_grads, first_out = run(first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), first_out, out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), first_grads, grads)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), first_out, out)


@pytest.mark.parametrize(
    ("batch", "device", "taken"), [(128, "cpu", True), (127, "cpu", False), (128, "gpu", False)]
)
def test_it_is_taken_for_large_batches_on_a_cpu_only(monkeypatch, batch, device, taken):
    monkeypatch.setattr(defaults.jax, "default_backend", lambda: device)
    _, first, _ = networks_of("vector")
    obs = jnp.zeros((batch, 3))
    program = jax.make_jaxpr(lambda params: first.apply(params, obs, ()))(jax.jit(first.init)(KEY, obs, ()))
    assert ("optimization_barrier" in str(program)) == taken


def test_affine_works_under_vmap_and_twice_differentiated():
    kernel, bias, x = jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0), jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_allclose(affine(kernel, bias, x), kernel.T @ x + bias[:, None])
    many = jax.vmap(affine, in_axes=(0, None, None))(jnp.stack([kernel, 2 * kernel]), bias, x)
    np.testing.assert_allclose(many[1], 2 * kernel.T @ x + bias[:, None])

    def norm_of_gradient(kernel, function):
        return (jax.grad(lambda k: (function(k, bias, x) ** 3).sum())(kernel) ** 2).sum()

    def plain(kernel, bias, x):
        return kernel.T @ x + bias[:, None]

    expected = jax.grad(norm_of_gradient)(kernel, plain)
    np.testing.assert_allclose(jax.grad(norm_of_gradient)(kernel, affine), expected, rtol=1e-5)


def test_a_network_built_for_other_purposes_has_forward_mode_derivatives():
    plain, _, _ = networks_of("vector")
    obs = jnp.ones((128, 3))
    params = jax.jit(plain.init)(KEY, obs, ())
    _, tangent = jax.jvp(lambda params: plain.apply(params, obs, ())[0][1], (params,), (params,))
    assert np.isfinite(tangent).all()
