"""The same numbers as rlax, where it has the formula. rlax knows no truncation: episodes here only terminate.

Importing rlax needs a tensorflow-probability that knows the JAX at hand: for 0.10, a nightly build.
Its return formulas do not need that package, so they are compared wherever rlax's files are installed.
"""

import importlib
import importlib.util
import sys
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

GAMMA, LAMBDA, T = 0.95, 0.8, 11
SPEC = importlib.util.find_spec("rlax")
pytestmark = pytest.mark.skipif(SPEC is None, reason="rlax is not installed")


def rlax_module(name):
    """A module of rlax, by way of an empty package where the real one cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("rlax")
        except Exception:  # whatever tensorflow-probability raises under a JAX it does not know
            for loaded in [m for m in sys.modules if m.split(".")[0] == "rlax"]:
                del sys.modules[loaded]
            package = types.ModuleType("rlax")
            package.__path__ = list(SPEC.submodule_search_locations)
            sys.modules["rlax"] = package
        try:
            return importlib.import_module(f"rlax._src.{name}")
        except Exception as error:
            pytest.skip(f"rlax._src.{name} cannot be imported here: {error!r}")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    terminated = jnp.asarray(rng.random(T) < 0.3).at[4].set(True)
    values = jnp.asarray(rng.normal(size=T + 1), jnp.float32)
    return types.SimpleNamespace(
        reward=jnp.asarray(rng.normal(size=T), jnp.float32),
        values=values,
        value=values[:-1],
        next_value=values[1:],
        terminated=terminated,
        truncated=jnp.zeros(T, bool),
        discount=GAMMA * (1.0 - terminated),
        log_rho=jnp.asarray(rng.normal(size=T), jnp.float32),
    )


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-5)


def test_returns(data):
    rlax = rlax_module("multistep")
    args = (data.reward, data.next_value, data.terminated, data.truncated)
    theirs = (data.reward, data.discount, data.next_value)
    close(ops.lambda_returns(*args, gamma=GAMMA, lambda_=LAMBDA), rlax.lambda_returns(*theirs, LAMBDA))
    close(ops.discounted_returns(*args, gamma=GAMMA), rlax.discounted_returns(*theirs))
    for n in (1, 3):
        close(
            ops.n_step_returns(*args, gamma=GAMMA, n=n),
            rlax.n_step_bootstrapped_returns(*theirs, n),
        )


def test_gae(data):
    rlax = rlax_module("multistep")
    args = (data.reward, data.value, data.next_value, data.terminated, data.truncated)
    theirs = rlax.truncated_generalized_advantage_estimation(data.reward, data.discount, LAMBDA, data.values)
    close(ops.gae(*args, gamma=GAMMA, gae_lambda=LAMBDA)[0], theirs)


def test_vtrace(data):
    rlax = rlax_module("vtrace")
    args = (data.reward, data.value, data.next_value, data.terminated, data.truncated, data.log_rho)
    theirs = (data.value, data.next_value, data.reward, data.discount, jnp.exp(data.log_rho))
    decayed = ops.vtrace(*args, gamma=GAMMA, lambda_=LAMBDA, clip_rho=1.2)[0]
    close(decayed - data.value, rlax.vtrace(*theirs, LAMBDA, 1.2))
    # Only with λ = 1: below it rlax mixes values into the advantage's bootstrap, the paper does not.
    target, advantage = ops.vtrace(*args, gamma=GAMMA, clip_rho=1.2, clip_pg_rho=1.1)
    output = rlax.vtrace_td_error_and_advantage(*theirs, clip_rho_threshold=1.2, clip_pg_rho_threshold=1.1)
    close(advantage, output.pg_advantage)
    close(target - data.value, output.errors)


def test_retrace(data):
    rlax = rlax_module("multistep")
    q, c = data.value, LAMBDA * jnp.minimum(1.0, jnp.exp(data.log_rho))
    next_value = data.next_value + 0.5
    theirs = rlax.general_off_policy_returns_from_q_and_v(
        q[1:], next_value, data.reward, data.discount, c[1:]
    )
    args = (data.reward, q, next_value, data.terminated, data.truncated, data.log_rho)
    close(ops.retrace(*args, gamma=GAMMA, lambda_=LAMBDA), theirs)


def test_losses(data):
    clipping, gradients, learning = map(rlax_module, ("clipping", "policy_gradients", "value_learning"))
    close(ops.huber(3 * data.reward, 1.5), clipping.huber_loss(3 * data.reward, 1.5))
    ratio, advantage = jnp.exp(0.3 * data.log_rho), data.reward
    close(
        ops.ppo_clip_loss(0.3 * data.log_rho, jnp.zeros(T), advantage, 0.2),
        gradients.clipped_surrogate_pg_loss(ratio, advantage, 0.2),
    )
    q = jnp.asarray(np.random.default_rng(1).normal(size=(3, T, 4)), jnp.float32)
    action = jnp.arange(T) % 4
    for t in range(3):
        row = (q[0, t], action[t], data.reward[t], data.discount[t])
        target = ops.q_target(data.reward, data.discount, q[1])
        close(ops.td_error(q[0], action, target)[t], learning.q_learning(*row, q[1, t]))
        target = ops.double_q_target(data.reward, data.discount, q[2], q[1])
        close(ops.td_error(q[0], action, target)[t], learning.double_q_learning(*row, q[1, t], q[2, t]))
