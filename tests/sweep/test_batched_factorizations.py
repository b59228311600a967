"""No network of jrl's is initialised by a batch of factorisations, which XLA's CPU pool may be too small for."""

import dataclasses

import fake_algorithm as fake
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jrl
from jrl import dqn, ppo, r2d2, rainbow, sac, sweep, xla
from jrl.records import RunWarning
from jrl.sweep import batching


class Critic(nn.Module):
    """A user's own network, with flax's orthogonal initialiser."""

    @nn.compact
    def __call__(self, obs):
        return nn.Dense(2, kernel_init=nn.initializers.orthogonal())(obs)


def vmapped(algo, hparams):
    keys, both = jax.random.split(jax.random.key(0), 2), sweep.broadcast(hparams, 2)
    return batching.factorizes_batches(jax.vmap(algo.init), keys, both)


@pytest.mark.parametrize(
    ("module", "env", "choices"),
    [
        (ppo, "CartPole-v1", {}),
        (ppo, "MemoryChain-bsuite", {"memory": "gru"}),
        (ppo, "MemoryChain-bsuite", {"memory": "transformer"}),
        (ppo, "Breakout-MinAtar", {"torso": "cnn"}),
        (rainbow, "CartPole-v1", {"warmup_env_steps": 128}),
        (r2d2, "MemoryChain-bsuite", {}),
        (sac, "Pendulum-v1", {"warmup_env_steps": 128}),
    ],
)
def test_networks_of_jrl_are_initialised_by_one_factorization_at_a_time(module, env, choices):
    algo = module.make(jrl.make(env), module.Config(**choices))
    assert not vmapped(algo, module.HParams(env=jrl.make(env).params))


def test_a_batch_is_found_wherever_the_program_has_it():
    algo = dqn.make(jrl.make("CartPole-v1"), dqn.Config(warmup_env_steps=128), network=Critic())
    assert vmapped(algo, dqn.HParams(env=jrl.make("CartPole-v1").params))

    def inside(x):
        return jax.lax.scan(lambda carry, _: (jnp.linalg.qr(carry)[0], None), x, length=2)[0]

    assert batching.factorizes_batches(jax.jit(inside), jnp.ones((3, 4, 4)))
    assert not batching.factorizes_batches(jax.jit(inside), jnp.ones((4, 4)))


def test_a_sweep_warns_where_its_members_have_such_a_batch_and_the_pool_is_small(monkeypatch):
    env = fake.environment()
    plain = fake.make(env, fake.Config())._replace(env=env)

    def init(key, hparams):
        state = plain.init(key, hparams)
        q, _ = jnp.linalg.qr(jax.random.normal(key, (2, 2)))
        return dataclasses.replace(state, params={"w": state.params["w"] + q.sum()})

    def run(algo, width):
        options = {"seeds": 4, "env_steps": 64, "eval_episodes": 0, "progress": "none", "figures": False}
        sweep.execute(
            algo,
            env=env,
            hparams=fake.HParams(env=env.params),
            width=width,
            devices=jax.devices()[:1],
            **options,
        )

    monkeypatch.setattr(xla, "diagnose", lambda: ["the pool is small"])
    run(plain, 2)  # a warning would be an error
    run(plain._replace(init=init), 1)
    with pytest.warns(RunWarning, match="the pool is small"):
        run(plain._replace(init=init), 2)
