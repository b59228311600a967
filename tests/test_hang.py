"""XLA's small CPU pool must not hang on vmapped programs: the settings of jrl.xla, put to work.

A hang shows as this test's time limit, with the stacks of all threads. ``benchmarks/hang.py`` tells how often
the default settings hang.
"""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jrl
from jrl import ppo

pytestmark = pytest.mark.optimized  # what a user runs must not hang


@pytest.fixture(scope="module")
def member():
    algo = ppo.make(jrl.make("CartPole-v1"), ppo.Config(num_envs=4, unroll_length=32, num_epochs=1))
    hparams = ppo.HParams()
    return lambda key: jrl.train(algo, algo.init(key, hparams), hparams, num_steps=2)[1]["loss"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_eight_vmapped_members_run_a_hundred_times(member, num_devices):
    run = jax.vmap(member)
    if num_devices > 1:
        mesh, members = Mesh(np.array(jax.devices()[:num_devices]), ("members",)), PartitionSpec("members")
        run = jax.shard_map(run, mesh=mesh, in_specs=members, out_specs=members, check_vma=False)
    run = jax.jit(run)
    for seed in range(100):
        loss = run(jax.random.split(jax.random.key(seed), 8)).block_until_ready()
        assert np.isfinite(loss).all()
