"""Gradient estimators against exact gradients, and V-trace against what it is on-policy."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrl
from jrl import a2c, ppo, reinforce
from jrl.envs import from_functions
from jrl.ops import mdp
from jrl.types import Discrete, Network

GAMMA, NUM_ENVS, NUM_ESTIMATES = 0.9, 4, 20_000
# Three states, two actions; what a row lacks to 1 ends the episode, at least 0.3, so that 48 steps are all of it.
P = np.array(
    [
        [[0.1, 0.3, 0.2], [0.4, 0.2, 0.0]],
        [[0.0, 0.3, 0.4], [0.2, 0.0, 0.1]],
        [[0.3, 0.0, 0.0], [0.1, 0.2, 0.4]],
    ],
    np.float32,
)
R = np.array([[1.0, -0.5], [0.0, 2.0], [-1.0, 0.3]], np.float32)
THETA = jnp.array([[0.3, -0.2], [0.0, 0.5], [-0.4, 0.1]])
VALUE = jnp.array([0.4, 1.0, -0.3])  # of a critic that has learned little


class Numbers(NamedTuple):
    P: jax.Array
    R: jax.Array


def three_states():
    def reset(key, params):
        return jnp.int32(0), jnp.int32(0)

    def transition(key, state, action, params):
        going_on = params.P[state, action]
        after = jax.random.categorical(key, jnp.log(jnp.append(going_on, 1.0 - going_on.sum())))
        following = jnp.minimum(after, 2).astype(jnp.int32)
        return following, following, params.R[state, action], after == 3, False

    return from_functions(
        reset, transition, Numbers(jnp.asarray(P), jnp.asarray(R)), Discrete(2), "three states"
    )


def exact_gradient():
    def objective(theta):
        process = mdp.TabularMDP(jnp.asarray(P), jnp.asarray(R), GAMMA)
        return mdp.evaluate_policy(process, jax.nn.softmax(theta))[0]

    return np.asarray(jax.grad(objective)(THETA))


@functools.cache
def estimates(baseline):
    """Steps of plain gradient ascent are estimates of the gradient, ``[estimates, S, A]``."""
    table = Network(
        init=lambda key, obs, memory: {"theta": THETA, "value": VALUE},
        apply=lambda params, obs, memory: ((params["theta"][obs], params["value"][obs]), memory),
    )
    config = reinforce.Config(num_envs=NUM_ENVS, unroll_length=48, baseline=baseline, discount_gradient=True)
    algo = reinforce.make(
        three_states(), config, network=table, optimizer=lambda hparams, learning_rate: optax.sgd(1.0)
    )
    hparams = reinforce.HParams(gamma=GAMMA)

    def estimate(key):
        state, _ = algo.step(algo.init(key, hparams), hparams)
        return state.params["theta"] - THETA

    return np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), NUM_ESTIMATES)))


@pytest.mark.parametrize("baseline", reinforce.BASELINES)
def test_the_mean_estimate_is_the_exact_gradient(baseline):
    sample = estimates(baseline)
    # The mean over all episodes has the episode itself in it, which takes a share of the gradient away.
    share = 1.0 - 1.0 / NUM_ENVS if baseline == "mean" else 1.0
    standard_error = sample.std(0) / np.sqrt(NUM_ESTIMATES)
    error = np.abs(sample.mean(0) - share * exact_gradient())
    assert (error <= 3.0 * standard_error).all(), error / standard_error
    # The comparison would notice an error of a tenth of the gradient.
    assert standard_error.max() < 0.03 * np.abs(exact_gradient()).max()


def a2c_after_a_step(**choices):
    config = a2c.Config(num_envs=8, unroll_length=32, hidden_sizes=(16,), **choices)
    algo = a2c.make(jrl.make("CartPole-v1"), config)
    hparams = a2c.HParams(gamma=GAMMA)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    # Episodes end within the window.
    state, metrics = jax.jit(algo.step)(state, hparams)
    assert metrics["num_episodes"] > 0
    return state.params, metrics


def test_vtrace_on_policy_is_the_n_step_return():
    plain, plain_metrics = a2c_after_a_step()
    corrected, metrics = a2c_after_a_step(vtrace=True)
    for name in plain_metrics:
        np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    # Adam's first step divides each gradient by its size: all but those near 0 must agree.
    for a, b in zip(jax.tree.leaves(corrected), jax.tree.leaves(plain), strict=True):
        assert np.mean(np.abs(a - b) < 1e-6) > 0.99


def test_only_vtrace_takes_several_steps_on_an_unroll():
    with pytest.raises(ValueError, match=r"num_updates=2 with vtrace=False: .* use vtrace=True, or jrl.ppo"):
        a2c.Config(num_updates=2)
    _, metrics = a2c_after_a_step(vtrace=True, num_updates=3)
    assert metrics["approx_kl"] > 0.0


def test_a_baseline_of_others_needs_others():
    with pytest.raises(ValueError, match=r"baseline='leave_one_out' with num_envs=1: it compares 2 or more"):
        reinforce.Config(num_envs=1, baseline="leave_one_out")


@pytest.mark.parametrize("memory", ["gru", "transformer"])
def test_ppo_sees_in_the_loss_what_it_saw_while_acting(memory):
    """The first gradient of an unroll is taken where nothing has moved: every probability ratio is 1."""
    config = ppo.Config(
        num_envs=8, unroll_length=16, num_epochs=1, num_minibatches=1, memory=memory, memory_window=2
    )
    algo = ppo.make(jrl.make("ProbeMemory-jrl"), config)
    hparams = ppo.HParams(learning_rate=0.1)
    state, step = jax.jit(algo.init)(jax.random.key(0), hparams), jax.jit(algo.step)
    # Episodes of three steps begin and end within an unroll and across its end.
    for _ in range(3):
        state, metrics = step(state, hparams)
        assert metrics["num_episodes"] > 0
        assert metrics["clip_fraction"] == 0.0
        np.testing.assert_allclose(metrics["approx_kl"], 0.0, atol=1e-9)


@pytest.mark.parametrize("remembers", [False, True])
def test_a_log_std_that_all_states_share_is_as_one_for_each(remembers):
    """Of the policy that acted a KL penalty keeps both parameters, and cuts them into minibatches."""

    def network(shared):
        def init(key, obs, memory):
            return {"weights": jax.random.normal(key, (3,)), "log_std": jnp.zeros(1)}

        def apply(params, obs, memory):
            mean = (obs @ params["weights"])[..., None]
            log_std = params["log_std"] if shared else jnp.broadcast_to(params["log_std"], mean.shape)
            return ((mean, log_std), mean[..., 0]), memory

        return Network(init, apply, lambda batch: jnp.zeros((*batch, 1)) if remembers else ())

    config = ppo.Config(num_envs=4, unroll_length=4, num_minibatches=2, objective="kl")

    def learned(shared):
        algo, hparams = ppo.make(jrl.make("Pendulum-v1"), config, network=network(shared)), ppo.HParams()
        state, metrics = jax.jit(lambda key: algo.step(algo.init(key, hparams), hparams))(jax.random.key(0))
        return state.params, metrics

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), learned(True), learned(False))
