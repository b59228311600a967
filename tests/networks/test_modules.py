"""Torsos and heads: shapes for any batch, and the equations they state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jrl import networks, ops
from jrl.networks.mlp import orthogonal
from jrl.types import Box, Discrete, MultiDiscrete

BATCHES = [(), (3,), (2, 3)]
KEY = jax.random.key(0)


def apply_twice(module, *shape):
    """Initialise on one input, apply to batches of any shape, and check that batching changes nothing."""
    params = jax.jit(module.init)(KEY, jnp.zeros(shape))
    apply = jax.jit(module.apply)
    single = apply(params, jax.random.normal(KEY, shape))
    for batch in BATCHES:
        x = jax.random.normal(KEY, (*batch, *shape))
        out = apply(params, x)
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch) :]), out)  # noqa: B023
        one = apply(params, x.reshape(-1, *shape)[-1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[-1], b, rtol=1e-5, atol=1e-5), rows, one)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, batch + b.shape), out, single)  # noqa: B023
    return params, single


@pytest.mark.parametrize("layer_norm", [False, True])
def test_mlp(layer_norm):
    params, out = apply_twice(networks.MLP((7, 5), "relu", layer_norm), 4)
    assert out.shape == (5,)
    assert ("LayerNorm_0" in params["params"]) == layer_norm


def test_mlp_is_orthogonal_with_gain_root_two_and_zero_biases():
    params = networks.MLP((6, 6)).init(KEY, jnp.zeros(6))["params"]
    for layer in params.values():
        np.testing.assert_allclose(layer["kernel"].T @ layer["kernel"], 2.0 * np.eye(6), atol=1e-5)
        np.testing.assert_array_equal(layer["bias"], np.zeros(6))


@pytest.mark.parametrize("shape", [(4, 64), (64, 4), (16, 16), (64, 1), (3, 3, 2, 5)])
def test_orthogonal_weights_are_those_of_flax(shape):
    key = jax.random.key(3)
    ours, theirs = (make(2.0)(key, shape, jnp.float32) for make in (orthogonal, nn.initializers.orthogonal))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
def test_each_activation_is_applied(activation):
    module = networks.MLP((3,), activation)
    params = module.init(KEY, jnp.zeros(2))
    x = jnp.array([0.3, -2.0])
    dense = params["params"]["Dense_0"]
    expected = networks.ACTIVATIONS[activation](x @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(module.apply(params, x), expected, rtol=1e-5)


def test_layer_norm_stands_before_the_activation():
    module = networks.MLP((16,), "relu", layer_norm=True)
    out = module.apply(module.init(KEY, jnp.zeros(4)), jax.random.normal(KEY, (4,)))
    assert (out == 0.0).any()  # normalising after a relu would leave no exact zero


def test_cnn():
    params, out = apply_twice(networks.CNN((2, 3), hidden_sizes=(5,)), 7, 6, 4)
    assert out.shape == (5,)
    # Two 3×3 convolutions leave 3 × 2 pixels of 3 channels.
    assert params["params"]["MLP_0"]["Dense_0"]["kernel"].shape == (3 * 2 * 3, 5)


@pytest.mark.parametrize(("kernel_size", "shape"), [(3, (6, 5, 2)), (2, (4, 5, 3))])
def test_patch_convolution_is_a_convolution(kernel_size, shape):
    ours, theirs = networks.PatchConv(3, kernel_size), nn.Conv(3, (kernel_size,) * 2, padding="VALID")
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    params = jax.jit(ours.init)(KEY, x)
    kernel = params["params"]["Dense_0"]["kernel"]
    bias = jnp.arange(3.0)
    params["params"]["Dense_0"]["bias"] = bias
    reference = {"params": {"kernel": kernel.reshape(kernel_size, kernel_size, shape[-1], 3), "bias": bias}}
    out = ours.apply(params, x)
    assert out.shape == (2, shape[0] - kernel_size + 1, shape[1] - kernel_size + 1, 3)
    np.testing.assert_allclose(out, theirs.apply(reference, x), rtol=1e-5, atol=1e-5)

    def gradient(module, params):
        return jax.jit(jax.grad(lambda x: jnp.sum(module.apply(params, x) ** 2)))(x)

    np.testing.assert_allclose(gradient(ours, params), gradient(theirs, reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("action", "shapes"),
    [(Discrete(4), [(4,)]), (MultiDiscrete((2, 3)), [(5,)]), (Box((2,), -1.0, 1.0), [(2,), (2,)])],
    ids=["discrete", "multi-discrete", "box"],
)
def test_policy_head(action, shapes):
    head = networks.PolicyHead(action)
    params, out = apply_twice(head, 8)
    assert [leaf.shape for leaf in jax.tree.leaves(out)] == shapes
    # Gain 0.01: the first policy is nearly uniform.
    kernel = params["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(kernel.T @ kernel, 1e-4 * np.eye(kernel.shape[1]), atol=1e-8)
    policy = networks.distribution(action)(out)
    sample = policy.sample(KEY)
    example = action.sample(KEY)
    assert (sample.shape, sample.dtype) == (example.shape, example.dtype)
    assert policy.log_prob(sample).shape == ()


def test_the_standard_deviation_of_a_box_policy_does_not_depend_on_the_state():
    head = networks.PolicyHead(Box((2,), -1.0, 1.0))
    params = head.init(KEY, jnp.zeros(3))
    params["params"]["log_std"] = jnp.array([0.5, -1.0])
    _, log_std = head.apply(params, jax.random.normal(KEY, (5, 3)))
    np.testing.assert_array_equal(log_std, np.tile([0.5, -1.0], (5, 1)))


def test_distribution_of_each_space():
    assert networks.distribution(Discrete(3)) is ops.Categorical
    assert networks.distribution(MultiDiscrete((2, 3)))(jnp.zeros(5)).ns == (2, 3)
    assert isinstance(networks.distribution(Box((1,), 0, 1))((jnp.zeros(1), jnp.zeros(1))), ops.Normal)
    with pytest.raises(TypeError, match="no distribution for the action space 3"):
        networks.distribution(3)


@pytest.mark.parametrize("shared", [False, True])
def test_actor_critic(shared):
    module = networks.ActorCritic(lambda: networks.MLP((6,)), Discrete(3), shared)
    params, (logits, value) = apply_twice(module, 4)
    assert logits.shape == (3,)
    assert value.shape == ()
    assert sum(name.startswith("MLP") for name in params["params"]) == (1 if shared else 2)
    gradient = jax.grad(lambda p: module.apply(p, jnp.ones(4))[1])(params)["params"]
    reached = {name for name, leaf in gradient.items() if any(np.any(x) for x in jax.tree.leaves(leaf))}
    assert reached == {"Dense_0", "MLP_0" if shared else "MLP_1"}  # the value moves the policy's torso or not


def test_value_head_has_gain_one():
    module = networks.ActorCritic(lambda: networks.MLP((6,)), Discrete(3))
    kernel = module.init(KEY, jnp.zeros(4))["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel), 1.0, rtol=1e-5)


def test_dueling_advantages_have_mean_zero():
    module = networks.QNetwork(lambda: networks.MLP((6,)), 4, dueling=True)
    params, q = apply_twice(module, 3)
    assert q.shape == (4,)
    x = jax.random.normal(KEY, (10, 3))
    features = networks.MLP((6,)).apply({"params": params["params"]["MLP_0"]}, x)
    advantage, value = params["params"]["Dense_0"], params["params"]["Dense_1"]
    v = features @ value["kernel"] + value["bias"]
    a = features @ advantage["kernel"] + advantage["bias"]
    assert a.shape[-1] == 4
    q = module.apply(params, x)
    np.testing.assert_allclose(q.mean(-1, keepdims=True), v, rtol=1e-4, atol=1e-5)  # mean advantage 0
    np.testing.assert_allclose(q - q.max(-1, keepdims=True), a - a.max(-1, keepdims=True), atol=1e-5)


def test_plain_q_network():
    params, q = apply_twice(networks.QNetwork(lambda: networks.MLP((6,)), 4), 3)
    assert q.shape == (4,)
    assert set(params["params"]) == {"MLP_0", "Dense_0"}
