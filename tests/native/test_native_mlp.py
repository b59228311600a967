"""The C++ kernel of a whole network is another way to compute the same function and gradient, whatever the vectors."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import a2c, dqn, networks, ppo, pqn, reinforce, sac, td3
from jrl.bench import work
from jrl.networks import native
from jrl.networks.fused import Layer
from jrl.networks.native import Norm
from jrl.sweep import runner

KEY = jax.random.key(0)


def normal(seed, shape):
    """Drawn by NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layers(sizes, members=()):
    return tuple(
        Layer(normal((0, i), (*members, a, b)) / np.float32(a**0.5), normal((1, i), (*members, b)))
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    )


def norms_of(sizes, members=()):
    return tuple(
        Norm(*(normal((2 + j, i), (*members, size)) for j in range(2))) for i, size in enumerate(sizes[1:-1])
    )


def sparse(x):
    """With one entry in ten left, in whole rows none."""
    kept = np.random.default_rng(3).random(x.shape) < 0.1
    kept[: len(x) // 3] = False
    return jnp.asarray(np.where(kept, x, np.float32(0)))


def both(function, params, x, weight):
    """The value and the gradients, as one program."""
    loss = jax.value_and_grad(lambda p, x, weight: (function(p, x) * weight).sum(), argnums=(0, 1))
    return jax.jit(loss)(params, x, weight)


def assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ((4, 64, 64, 2), 200),
        ((3, 5, 1), 1),  # less than a vector, everywhere
        ((5, 20, 33, 7, 3), 51),  # tails of rows, tiles and panels, and more than one block
        ((17, 24, 40, 8), 49),  # whole vectors, but no whole panel
        ((70, 16, 30), 6),  # few rows; the last layer wider than a vector
        ((2, 8, 16), 0),
    ],
)
def test_it_equals_the_layers_one_by_one(sizes, rows, activation, normed):
    x = normal(1, (rows, sizes[0]))
    compare(layers(sizes), norms_of(sizes) if normed else (), x, activation)


def compare(params, norms, x, activation):
    weight = normal(2, (len(x), params[-1].bias.shape[0]))
    ours = both(lambda p, x: native.mlp(p[0], x, activation, p[1]), (params, norms), x, weight)
    theirs = both(lambda p, x: native.reference(activation, *p, x), (params, norms), x, weight)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ((400, 64, 3), 50),
        ((64, 20, 2), 5),
        ((67, 150, 12), 49),
        ((70, 24, 2), 3),
        ((65, 100, 2), 7),
        ((72, 40, 2), 4),
    ],
)
def test_of_an_input_that_is_nearly_all_zeros_too(sizes, rows):
    x = sparse(normal(1, (rows, sizes[0])))
    compare(layers(sizes), norms_of(sizes) if rows == 49 else (), x, "relu")
    # The zeros give nothing, in whatever way: with one block full and the next one empty.
    compare(
        layers(sizes),
        (),
        jnp.asarray(np.concatenate([np.ones_like(x), x, np.zeros((48, sizes[0]), np.float32)])),
        "tanh",
    )


@pytest.mark.parametrize(("sizes", "rows"), [((5, 20, 33, 3), 51), ((8, 16, 24), 40)])
def test_only_the_gradients_asked_for_are_computed_and_they_are_the_same_bits(sizes, rows):
    params, x = (layers(sizes), norms_of(sizes)), normal(1, (rows, sizes[0]))

    def loss(params, x):
        return (native.mlp(params[0], x, "relu", params[1]) ** 2).sum()

    both = jax.grad(loss, argnums=(0, 1))
    of_params, of_x = both(params, x)
    for i, whole in enumerate((of_params, of_x)):
        one = jax.grad(loss, argnums=i)
        jax.tree.map(np.testing.assert_array_equal, one(params, x), whole)
        assert_equal(
            jax.jit(jax.vmap(one))(*stacked(params, x)), jax.tree.map(lambda leaf: leaf[None], whole)
        )
        num = len(jax.tree.leaves(whole))
        assert backward_outputs(one, params, x) == num < backward_outputs(both, params, x)
    # Through a scan, as a round of updates is, and with the other part a constant of the loss.
    _, one = jax.lax.scan(lambda carry, x: (carry, jax.grad(loss)(carry, x)), params, x[None])
    assert_equal(jax.tree.map(lambda leaf: leaf[0], one), of_params)
    assert backward_outputs(jax.grad(lambda x: loss(jax.lax.stop_gradient(params), x)), x) == 1


def stacked(*trees):
    return jax.tree.map(lambda leaf: leaf[None], trees)


def backward_outputs(function, *args):
    """The arrays that calls of the kernel for the gradient return."""

    def of(jaxpr):
        for equation in jaxpr.eqns:
            if equation.params.get("target_name", "").startswith(native.BACKWARD):
                yield len(equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    yield from of(inner.jaxpr)

    return sum(of(jax.make_jaxpr(function)(*args).jaxpr))


def test_the_norm_is_that_of_flax():
    """Both functions of the last test would share a wrong one."""
    env = jrl.make("CartPole-v1")
    config = {"hidden_sizes": (16, 12), "layer_norm": True}
    plain, ours = (
        networks.actor_critic(env, ppo.Config(**config, kernels=k), shared_torso=True)
        for k in ("xla", "native")
    )
    obs = 3 * normal(4, (6, 4))
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(plain.init)(KEY, obs, ()))
    assert_equal(jax.jit(ours.apply)(params, obs, ()), jax.jit(plain.apply)(params, obs, ()))


def test_a_row_comes_to_the_same_bits_in_every_batch():
    sizes = (80, 20, 33, 3)
    x = normal(4, (101, 80))
    x = x.at[40:70].set(sparse(x[40:70]))
    for norms in ((), norms_of(sizes)):
        mlp = functools.partial(native.mlp, layers(sizes), activation="tanh", norms=norms)
        whole = mlp(x=x)
        for first, rows in ((0, 1), (0, 5), (0, 31), (0, 32), (0, 50), (40, 30), (60, 1)):
            part = slice(first, first + rows)
            np.testing.assert_array_equal(mlp(x=x[part]), whole[part])
        np.testing.assert_array_equal(mlp(x=x[7]), whole[7])


def test_members_side_by_side_are_those_alone_bit_for_bit():
    sizes = (4, 16, 2)
    params = layers(sizes, members=(3,)), norms_of(sizes, members=(3,))
    x = normal(1, (3, 5, 7, 4))
    weight = jnp.ones((5, 7, 2))

    def member(p, x):
        return both(lambda p, x: native.mlp(p[0], x, "relu", p[1]), p, x, weight)[1][0]

    together = jax.jit(jax.vmap(member))(params, x)
    for i in range(3):
        alone = jax.jit(member)(jax.tree.map(lambda leaf, i=i: leaf[i], params), x[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), together, alone)


def test_tanh_is_within_six_units_in_the_last_place():
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)
    one = Layer(jnp.ones((1, 1)), jnp.zeros(1))
    ours = np.asarray(native.mlp((one, one), x[:, None], "tanh")[:, 0])
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(ours - exact) <= 6 * np.spacing(np.abs(exact).astype(np.float32))).all()
    assert np.abs(ours).max() <= 1.0


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_nan_and_infinity_stay(activation):
    """So that a member that diverges is seen to."""
    one = Layer(jnp.ones((1, 1)), jnp.zeros(1))
    x = jnp.array([[jnp.nan], [jnp.inf], [-jnp.inf]])
    expected = native.reference(activation, (one, one), (), x)
    np.testing.assert_allclose(native.mlp((one, one), x, activation), expected, rtol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_the_network_of_ppo_is_the_same_function(name, shared):
    env = jrl.make(name)
    plain, ours = (
        networks.actor_critic(env, ppo.Config(hidden_sizes=(16, 12), kernels=k), shared_torso=shared)
        for k in ("xla", "native")
    )
    obs = normal(4, (6, 5, *env.observation.shape))
    params = jax.jit(plain.init)(KEY, obs, ())
    assert_equal(jax.jit(ours.apply)(params, obs, ()), jax.jit(plain.apply)(params, obs, ()))


@pytest.mark.parametrize(
    "change",
    [
        {"dueling": True},
        {"distribution": "quantile", "num_atoms": 5, "dueling": True},
        {"distribution": "categorical", "num_atoms": 5, "noisy": True, "noise_draws": 2},
    ],
)
def test_a_step_of_dqn_is_the_same(change):
    def steps(kernels):
        config = dqn.Config(
            num_envs=4,
            unroll_length=2,
            batch_size=8,
            capacity=64,
            warmup_env_steps=16,
            hidden_sizes=(16, 12),
            layer_norm=False,
            kernels=kernels,
            **change,
        )
        algo, hparams = dqn.make(jrl.make("CartPole-v1"), config), dqn.HParams()
        state = jax.jit(algo.init)(KEY, hparams)
        state, metrics = jax.jit(algo.step)(state, hparams)
        return state.params, metrics["loss"]

    assert_equal(steps("native"), steps("xla"))


OFF_POLICY = {"num_envs": 4, "batch_size": 8, "capacity": 64, "warmup_env_steps": 16}


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        (sac, "Pendulum-v1", OFF_POLICY),
        (sac, "CartPole-v1", OFF_POLICY | {"layer_norm": True}),
        (td3, "Pendulum-v1", OFF_POLICY),
        (a2c, "CartPole-v1", {"num_envs": 4, "unroll_length": 8}),
        (reinforce, "Pendulum-v1", {"num_envs": 4, "unroll_length": 8}),
    ],
)
def test_a_step_of_other_algorithms_is_the_same(module, name, change):
    def step(kernels):
        algo = module.make(jrl.make(name), module.Config(hidden_sizes=(16, 12), kernels=kernels, **change))
        hparams = module.HParams()
        state, metrics = jax.jit(algo.step)(jax.jit(algo.init)(KEY, hparams), hparams)
        return state.params, metrics["loss"], metrics["grad_norm"]

    assert_equal(step("native"), step("xla"))


def test_a_step_of_pqn_is_the_same():
    """On a board, whose first layer goes by its entries, and with layer norm."""

    def step(kernels):
        config = pqn.Config(
            num_envs=4,
            unroll_length=4,
            num_epochs=1,
            num_minibatches=1,
            torso="mlp",
            hidden_sizes=(16, 12),
            kernels=kernels,
        )
        algo, hparams = pqn.make(jrl.make("Breakout-MinAtar"), config), pqn.HParams()
        state, metrics = jax.jit(algo.step)(jax.jit(algo.init)(KEY, hparams), hparams)
        return state.params, metrics["loss"]

    assert_equal(step("native"), step("xla"))


@pytest.mark.parametrize("normed", [False, True])
def test_its_work_is_counted_as_that_of_the_layers(normed):
    sizes = (5, 20, 33, 3)
    params = layers(sizes, members=(2,)), norms_of(sizes, members=(2,)) if normed else ()
    x = jnp.zeros((2, 51, 5))

    def counted(function):
        grad = jax.grad(lambda p, x: jax.vmap(lambda p, x: function(*p, x))(p, x).sum())
        return work.count(grad, params, x)

    ours = counted(lambda p, norms, x: native.mlp(p, x, "tanh", norms))
    theirs = counted(lambda p, norms, x: native.reference("tanh", p, norms, x))
    assert ours.transcendentals == theirs.transcendentals > 0
    # The last layer's output is computed by it although its sum alone would not need it for a gradient.
    assert ours.flops - theirs.flops == 2 * 2 * 51 * 33 * 3

    def counted_of_x(function):
        return work.count(jax.grad(lambda x: jax.vmap(lambda p, x: function(*p, x))(params, x).sum()), x)

    ours = counted_of_x(lambda p, norms, x: native.mlp(p, x, "tanh", norms))
    theirs = counted_of_x(lambda p, norms, x: native.reference("tanh", p, norms, x))
    assert ours.flops - theirs.flops == 2 * 2 * 51 * 33 * 3


def test_a_run_says_what_computed_it_and_is_resumed_with_it(tmp_path):
    config = {"num_envs": 4, "unroll_length": 8, "hidden_sizes": [8, 8], "kernels": "native"}
    common = {"config": config, "progress": "none", "eval_episodes": 0}
    whole = jrl.run("ppo", "CartPole-v1", env_steps=256, out=tmp_path / "whole", **common)
    jrl.run("ppo", "CartPole-v1", env_steps=128, out=tmp_path / "halves", **common)
    halves = jrl.resume(tmp_path / "halves", env_steps=256, progress="none")
    assert '"kernels": "native"' in (tmp_path / "halves" / "run.json").read_text()
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, halves.state.params)


def test_a_member_of_a_sharded_sweep_is_the_run_alone_bit_for_bit(tmp_path):
    config = {"num_envs": 4, "unroll_length": 8, "hidden_sizes": [8, 8], "kernels": "native"}
    common = {"config": config, "env_steps": 64, "progress": "none", "eval_episodes": 0}
    together = runner.execute("ppo", env="CartPole-v1", seeds=3, out=tmp_path / "sweep", **common)
    alone = jrl.run("ppo", "CartPole-v1", seed=2, out=tmp_path / "run", **common)
    member = jax.tree.map(lambda leaf: leaf[2], together.states.params)
    jax.tree.map(np.testing.assert_array_equal, member, alone.state.params)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"activation": "elu"}, "tanh and relu"),
        ({"memory": "gru"}, "a memory"),
        ({"hidden_sizes": (4,) * 8}, "9 layers"),
        ({"kernels": "cuda"}, "'xla' or 'native'"),
    ],
)
def test_what_it_does_not_compute_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        ppo.make(jrl.make("CartPole-v1"), ppo.Config(**{"kernels": "native", **change}))


def test_images_and_implicit_quantiles_are_refused():
    with pytest.raises(ValueError, match="a cnn"):
        ppo.make(jrl.make("Breakout-MinAtar"), ppo.Config(kernels="native", activation="relu"))
    config = dqn.Config(kernels="native", layer_norm=False, distribution="implicit")
    with pytest.raises(ValueError, match="implicit quantile"):
        dqn.make(jrl.make("CartPole-v1"), config)


def test_other_numbers_are_refused():
    with pytest.raises(TypeError, match="bfloat16"):
        native.mlp(layers((4, 8, 2)), jnp.ones((3, 4), jnp.bfloat16), "tanh")
    with pytest.raises(ValueError, match="1 norms of 3 layers"):
        native.mlp(layers((4, 8, 8, 2)), jnp.ones((3, 4)), "tanh", norms_of((4, 8, 2)))
