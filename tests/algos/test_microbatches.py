"""A minibatch's gradient in parts: the same step to rounding, in less memory."""

import functools

import jax
import numpy as np
import pytest

import jrl
from jrl import ppo
from jrl.optim import mean_over

SIZES = {"num_envs": 8, "unroll_length": 8, "num_epochs": 2, "num_minibatches": 2, "hidden_sizes": (8,)}
CASES = {
    "plain": ("CartPole-v1", {}),
    "as-they-are": ("CartPole-v1", {"standardize_advantages": False}),
    "adaptive-kl": ("Pendulum-v1", {"objective": "adaptive_kl", "stop_at_target_kl": True}),
    "gru": ("MemoryChain-bsuite", {"memory": "gru", "memory_size": 4}),
}


def step_of(env, **choices):
    """One step's program and its state and metrics, from one key."""
    algo = ppo.make(jrl.make(env), ppo.Config(**SIZES | choices))
    hparams = ppo.HParams()
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    compiled = jax.jit(algo.step).lower(state, hparams).compile()
    return compiled, *compiled(state, hparams)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_minibatch_make_the_same_step(case):
    env, choices = CASES[case]
    _, whole, metrics = step_of(env, **choices)
    _, parts, metrics_of_parts = step_of(env, **choices, num_microbatches=4)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)
    assert metrics.keys() == metrics_of_parts.keys()
    for name in ("loss", "entropy", "grad_norm", "approx_kl"):
        np.testing.assert_allclose(metrics[name], metrics_of_parts[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_parts_take_less_memory():
    def temporaries(**choices):
        sizes = {"num_envs": 64, "num_epochs": 1, "num_minibatches": 1, "hidden_sizes": (64, 64)}
        return step_of("CartPole-v1", **sizes, **choices)[0].memory_analysis().temp_size_in_bytes

    assert temporaries(num_microbatches=8) < temporaries() / 1.5


def test_the_mean_over_parts_is_the_mean():
    parts = {"x": np.arange(12.0, dtype=np.float32).reshape(4, 3)}
    double = functools.partial(jax.tree.map, lambda leaf: 2 * leaf)
    np.testing.assert_allclose(mean_over(double, parts)["x"], [9.0, 11.0, 13.0])
    np.testing.assert_array_equal(mean_over(double, {"x": parts["x"][:1]})["x"], [0.0, 2.0, 4.0])


def test_parts_that_do_not_divide_a_minibatch():
    with pytest.raises(
        ValueError,
        match=r"num_microbatches=3 does not divide a minibatch, 64 / 2 = 32; use for instance 1, 2, 4",
    ):
        ppo.Config(**SIZES, num_microbatches=3)
    with pytest.raises(ValueError, match=r"num_microbatches=0: must be at least 1"):
        ppo.Config(num_microbatches=0)
    with pytest.raises(
        ValueError, match=r"num_microbatches=8 does not divide a minibatch of whole unrolls, 8 / 2 = 4"
    ):
        ppo.make(jrl.make("CartPole-v1"), ppo.Config(**SIZES, num_microbatches=8, memory="gru"))
    with pytest.raises(
        ValueError, match=r"a minibatch of one of 8 shards, 8 / 2 = 4; use for instance 1, 2, 4"
    ):
        ppo.make(
            jrl.make("CartPole-v1"),
            ppo.Config(**SIZES, num_microbatches=8),
            shards=jrl.types.Shards(8, "x"),
        )
