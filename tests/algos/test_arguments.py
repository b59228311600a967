"""Arguments in the wrong place, and numbers of the wrong shape: one message with the name, the rule, the fix."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jrl
from jrl import a2c, dqn, ppo
from jrl.envs import vectorize

ENV = cases.environment("CartPole-v1")
MODULES = pytest.mark.parametrize("module", [ppo, dqn])


@MODULES
def test_the_environment(module):
    with pytest.raises(TypeError, match=r"env='CartPole-v1' is no jrl Environment: build it with jrl.make"):
        module.make("CartPole-v1")
    with pytest.raises(
        ValueError, match=r"shapes \[\(3, 4\)\], env.observation says \[\(4,\)\].*leave out .*vectorize"
    ):
        module.make(vectorize(ENV, 3))


@MODULES
def test_config_and_hparams_in_each_others_place(module):
    with pytest.raises(
        TypeError, match=r"config is a jrl.algos.\w+.HParams: make takes a jrl.algos.\w+.Config"
    ):
        module.make(ENV, module.HParams())
    algo = module.make(ENV)
    other = dqn if module is ppo else ppo
    with pytest.raises(
        TypeError, match=r"hparams is a jrl.algos.\w+.HParams: init and step take a jrl.algos"
    ):
        jax.eval_shape(algo.init, jax.random.key(0), other.HParams())
    with pytest.raises(TypeError, match=r"hparams is a jrl.algos.\w+.Config: init and step take a jrl.algos"):
        algo.init(jax.random.key(0), module.Config())


def test_the_config_of_another_algorithm():
    with pytest.raises(
        TypeError, match=r"config is a jrl.algos.dqn.Config: make takes a jrl.algos.ppo.Config"
    ):
        ppo.make(ENV, dqn.Config())


@MODULES
def test_a_swept_number_without_vmap(module):
    """As many γ as environments would broadcast in silence: one γ an environment."""
    algo = module.make(ENV, module.Config(num_envs=4))
    swept = module.HParams(gamma=jnp.array([0.9, 0.95, 0.99, 1.0]))
    state = jax.eval_shape(algo.init, jax.random.key(0), module.HParams())
    for call in (lambda: algo.init(jax.random.key(0), swept), lambda: algo.step(state, swept)):
        with pytest.raises(
            ValueError, match=r"hparams.gamma has shape \(4,\): one run takes scalars.*jax.vmap"
        ):
            jax.eval_shape(call)


@MODULES
def test_a_swept_number_with_vmap(module):
    algo = cases.CASES[0].make() if module is ppo else cases._dqn("swept").make()
    swept = module.HParams(gamma=jnp.array([0.0, 0.99]))
    axes = module.HParams(gamma=0, **{name: None for name in vars(swept) if name != "gamma"})
    keys = jnp.stack([jax.random.key(0)] * 2)
    states = jax.jit(jax.vmap(algo.init, (0, axes)))(keys, swept)
    states, _ = jax.jit(jax.vmap(algo.step, (0, axes)))(states, swept)
    # Adam's first step is the gradient's sign, which may be the same; its moments are the gradient itself
    assert any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(states.opt_state))


@MODULES
def test_sizes(module):
    assert module.Config(hidden_sizes=[8, 8]) == module.Config(hidden_sizes=(8, 8))
    assert hash(module.Config(hidden_sizes=[8, 8])) == hash(module.Config(hidden_sizes=(8, 8)))
    with pytest.raises(TypeError, match=r"hidden_sizes=8: must be a tuple of integers"):
        module.Config(hidden_sizes=8)
    with pytest.raises(ValueError, match=r"hidden_sizes=\(8, 0\): needs one or more layers"):
        module.Config(hidden_sizes=(8, 0))
    with pytest.raises(ValueError, match=r"activation='swish': must be one of tanh, relu"):
        module.Config(activation="swish")
    with pytest.raises(ValueError, match=r"num_envs=0: must be at least 1"):
        module.Config(num_envs=0)
    with pytest.raises(TypeError, match=r"num_envs=4.0: must be an integer"):
        module.Config(num_envs=4.0)


def test_sizes_that_do_not_fit_each_other():
    with pytest.raises(
        ValueError, match=r"num_minibatches=7 does not divide .* 16 × 128 = 2048; use for instance 2, 4, 8"
    ):
        ppo.Config(num_minibatches=7)
    with pytest.raises(
        ValueError, match=r"num_minibatches=3 .* num_envs=4 environments: with a memory .* instance 1, 2, 4"
    ):
        ppo.make(ENV, ppo.Config(num_envs=4, unroll_length=6, num_minibatches=3, memory="gru"))
    with pytest.raises(ValueError, match=r"memory='lstm': must be one of none, gru, transformer"):
        ppo.Config(memory="lstm")
    with pytest.raises(ValueError, match="num_minibatches=4 leaves one transition a minibatch"):
        ppo.Config(num_envs=4, unroll_length=1, num_minibatches=4)
    with pytest.raises(ValueError, match=r"capacity=100 is smaller than batch_size=128: .* raise capacity"):
        dqn.Config(capacity=100)
    with pytest.raises(ValueError, match="warmup_env_steps=10000 exceeds capacity=5000"):
        dqn.Config(capacity=5000)
    with pytest.raises(ValueError, match="replay_dtype='half': must be one of same, float16, bfloat16"):
        dqn.Config(replay_dtype="half")


def test_tokens_are_not_normalised():
    with pytest.raises(
        ValueError, match="normalize_observations=True on RandomWalks-jrl: its observations are tokens"
    ):
        ppo.make(jrl.make("RandomWalks-jrl"), ppo.Config(normalize_observations=True))


def test_one_transition_is_not_standardised():
    with pytest.raises(ValueError, match="num_envs=1 with unroll_length=1 leaves one transition an update"):
        a2c.Config(num_envs=1, unroll_length=1, standardize_advantages=True)


def test_a_masked_environment_and_a_network_of_the_wrong_width():
    with pytest.raises(ValueError, match=r"needs \(2,\) action values: change the width of its last layer"):
        dqn.make(cases.environment("masked"), network=nn.Dense(3))


def test_a_matrix_of_actions_is_refused():
    env = jrl.make("Pendulum-v1")._replace(action=jrl.Box((2, 2), -1.0, 1.0))
    with pytest.raises(ValueError, match=r"Box\(shape=\(2, 2\)\): policy heads need a vector"):
        ppo.make(env, network=nn.Dense(4))


def test_evaluate():
    with pytest.raises(TypeError, match="no jrl Environment"):
        jrl.evaluate(jax.random.key(0), "CartPole-v1", lambda *_: None, num_episodes=1)
    with pytest.raises(TypeError, match=r"policy=<dict>\): give algo.policy\(state\)"):
        jrl.evaluate(jax.random.key(0), ENV, {"params": 1}, num_episodes=1)


def test_an_eager_init_can_be_donated():
    """Where reset returns one array as state and as observation, two leaves would share a buffer."""
    algo = next(case for case in cases.CASES if case.name == "ppo-multi-discrete").make()
    hparams = ppo.HParams()
    state, _ = jax.jit(algo.step, donate_argnums=0)(algo.init(jax.random.key(0), hparams), hparams)
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()
