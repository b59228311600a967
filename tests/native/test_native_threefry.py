"""The C++ kernels draw the words of JAX's default generator, whatever the shapes, under vmap too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import ops
from jrl.algos import a2c, dqn, ppo, pqn, reinforce, sac, td3
from jrl.bench import work
from jrl.native import threefry

KEY = jax.random.key(7)


def native(key):
    """The same key, drawn from by the kernels."""
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=threefry.NATIVE)


def assert_equal(ours, theirs):
    def words(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(words(a), words(b)), ours, theirs)


def draw(key, shape):
    """All that a key is used for."""
    return (
        [jax.random.bits(key, shape, dtype) for dtype in ("uint8", "uint16", "uint32")],
        jax.random.normal(key, shape),
        jax.random.split(key, shape),
        jax.random.fold_in(key, 3),
        jax.random.bits(jax.random.split(key, 3)[2], shape),
    )


@pytest.mark.parametrize("shape", [(), (1,), (5,), (16,), (17,), (3, 50), (0,), (40_000,)])
def test_words_are_those_of_jax(shape):
    assert_equal(draw(native(KEY), shape), draw(KEY, shape))


@pytest.mark.parametrize("num", [1, 3, 16, 33])
def test_keys_side_by_side_have_their_own(num):
    """Where a key has fewer words than a vector has lanes, several share one."""
    for n in (1, 2, 7, 16, 33):
        keys = jax.random.split(KEY, (num, 2))
        twice = jax.jit(jax.vmap(jax.vmap(lambda key, n=n: draw(key, (n,)))))
        assert_equal(twice(native(keys)), twice(keys))


def test_words_of_64_bits():
    with jax.enable_x64(True):
        assert_equal(jax.random.bits(native(KEY), (5,), "uint64"), jax.random.bits(KEY, (5,), "uint64"))


def test_a_seed_makes_the_key_of_jax():
    assert_equal(
        jax.random.key_data(jax.random.key(9, impl=threefry.NATIVE)), jax.random.key_data(jax.random.key(9))
    )


def test_what_a_state_keeps_is_a_key_as_before():
    shapes = (), (5, 2), ()
    theirs = ops.split_keys(KEY, *shapes)
    for kernels in ("xla", "native"):
        ours = threefry.split_keys(KEY, *shapes, kernels=kernels)
        assert_equal(ours, theirs)
        assert ours[0].dtype == KEY.dtype
        assert (ours[1].dtype == KEY.dtype) == (kernels == "xla")


def test_a_generator_that_it_has_not_is_left_to_jax():
    assert threefry.draws(KEY)
    assert threefry.draws(native(KEY))
    assert jax.jit(threefry.draws)(KEY)
    others = ops.hashed(KEY), jax.random.key(3, impl="rbg")
    for key in others:
        assert not threefry.draws(key)
        _, part = threefry.split_keys(key, (), (2,), kernels="native")
        assert part.dtype == key.dtype
    with jax.threefry_partitionable(False):
        assert not threefry.draws(KEY)


def test_its_work_is_counted_as_that_of_jax():
    counted = [work.count(lambda key: draw(key, (3, 7)), key) for key in (native(KEY), KEY)]
    assert counted[0].random_bits == counted[1].random_bits > 0


SMALL = {"num_envs": 4, "hidden_sizes": (8,)}
REPLAY = {"batch_size": 8, "capacity": 100, "warmup_env_steps": 40}


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        (a2c, SMALL),
        (dqn, SMALL | REPLAY | {"unroll_length": 4}),
        (ppo, SMALL | {"unroll_length": 4, "num_minibatches": 2}),
        (pqn, SMALL | {"unroll_length": 4, "num_minibatches": 2}),
        (reinforce, SMALL),
        (sac, SMALL | REPLAY),
        (td3, SMALL | REPLAY),
    ],
)
def test_algorithms_draw_by_it_what_they_would_without(algorithm, config, monkeypatch):
    """The same network and optimiser: only what draws differs, and nothing comes out otherwise."""
    env = jrl.make("Pendulum-v1" if algorithm is td3 else "CartPole-v1")
    algo = algorithm.make(env, algorithm.Config(**config, kernels="native"))

    def run(by_kernel):
        start = jax.jit(algo.init)(KEY, algorithm.HParams())
        step = jax.jit(lambda state: algo.step(state, algorithm.HParams())).lower(start)
        assert (threefry.BITS in step.as_text() or threefry.SPLIT in step.as_text()) == by_kernel
        return step.compile()(start)

    drawn = run(by_kernel=True)
    monkeypatch.setattr(threefry, "draws", lambda key: False)
    assert_equal(drawn, run(by_kernel=False))
