"""A sweep of each algorithm through the runner: its members are runs alone, share no stream, and are one compilation.

What PPO and DQN promise in detail is in ``test_guarantees``; the contract of every case in ``tests/algos``.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import checkpoint, configuration, sweep
from jrl.ops import counter
from jrl.sweep import members

sys.path.insert(0, str(Path(__file__).parent.parent / "algos"))

from cases import CASES, environment

pytestmark = pytest.mark.optimized  # bits of different programs

# The first case of each module, but of the two that test_guarantees has. Compiling each three times over takes minutes:
# most are slow tests.
QUICK = (jrl.reinforce, jrl.tabular, jrl.linear)
FIRST = {case.module: case for case in reversed(CASES) if case.module not in (jrl.ppo, jrl.dqn)}


def arrays(state):
    return {path: array.tobytes() for path, array in checkpoint.snapshot(state).arrays.items()}


def of_member(states, i):
    return jax.tree.map(lambda leaf: leaf[i], states)


def of_two_values(leaf):
    """The value of a number, and one beside it."""
    value = np.asarray(leaf)
    beside = value + 1 if value.dtype.kind in "iu" else value * 0.97
    return np.stack([value, beside if value.dtype.kind in "iuf" else value]).astype(value.dtype)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if module in QUICK else pytest.mark.slow, id=case.name)
        for module, case in FIRST.items()
    ],
)
def test_members_are_runs_alone_of_any_values_in_one_compilation(case):
    env, algo = environment(case.env), case.make()
    single = configuration.build(algo, env, hparams=case.module.HParams(**dict(case.hparams))).hparams
    hparams = jax.tree.map(of_two_values, single)
    traced = {"init": 0, "step": 0}

    def counted(name):
        def call(*arguments):
            traced[name] += 1
            return getattr(algo, name)(*arguments)

        return call

    init, step = jax.jit(algo.init), jax.jit(algo.step)
    numbers = of_member(hparams, 1)
    solo = init(members.key_of(jnp.uint32(5), members.INIT), numbers)
    warmup = counter.to_int(solo.env_steps)
    finished = sweep.execute(
        algo._replace(init=counted("init"), step=counted("step")),
        hparams, env=env, seeds=[3, 5], devices=jax.devices()[:1], eval_episodes=0, progress="none",
        env_steps=warmup + 3 * algo.env_steps_per_step,
    )  # fmt: skip
    # each once for the shapes and once in its program, whose loop over members and values it is
    assert traced == {"init": 2, "step": 2}
    assert finished.table.columns["status"] == ["ok"] * 4
    for _ in range(3):
        solo, _ = step(solo, numbers)
    assert arrays(of_member(finished.states, 3)) == arrays(solo)
    for leaves in (finished.states.key, finished.states.params):  # of two seeds
        assert arrays(of_member(leaves, 0)) != arrays(of_member(leaves, 1))
