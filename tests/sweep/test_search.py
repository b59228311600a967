"""Successive halving and population-based training, as pure functions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jrl import sweep
from jrl.sweep import search


@struct.dataclass
class HParams:
    learning_rate: jax.Array
    gamma: jax.Array


@struct.dataclass
class State:
    weight: jax.Array
    key: jax.Array


def population(n=8):
    hparams = HParams(jnp.linspace(0.1, 0.8, n), jnp.full(n, 0.9))
    return State(jnp.arange(n, dtype=jnp.float32), jax.random.split(jax.random.key(1), n)), hparams


def test_rungs_keep_a_share_at_a_share_of_the_steps():
    assert search.Halving(eta=3).rungs(27, 2700) == [(100, 9), (300, 3), (900, 1)]
    assert search.Halving(eta=2, num_rungs=3).rungs(16, 400) == [(100, 8), (200, 4)]
    assert search.Halving(eta=4).rungs(1, 100) == []
    # the work of 27 settings, four rungs: 100 x 27 + 200 x 9 + 600 x 3 + 1800 x 1, 11 % of all to the end
    rungs = [(0, 27), *search.Halving(eta=3).rungs(27, 2700), (2700, 0)]
    work = sum((later - at) * kept for (at, kept), (later, _) in itertools.pairwise(rungs))
    assert work == 8100


def test_rungs_before_the_first_step_that_may_stop_wait_for_it():
    late = search.Halving(eta=3, min_env_steps=2001)
    assert late.rungs(27, 2700, env_steps_per_step=10) == [(201, 9), (300, 3), (900, 1)]
    # two fall together: the first counts, which keeps more
    assert search.Halving(eta=3, min_env_steps=600).rungs(27, 2700) == [(600, 9), (900, 1)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"eta": 1.0}, "eta=1.0"),
        ({"num_rungs": 1}, "num_rungs=1"),
        ({"num_rungs": 2.5}, "num_rungs=2.5"),
        ({"min_env_steps": -1}, "min_env_steps=-1"),
        ({"min_env_steps": 2.5}, "min_env_steps=2.5"),
    ],
)
def test_what_halving_refuses(changes, text):
    with pytest.raises(ValueError, match=text):
        search.Halving(**changes)


def test_the_best_are_the_highest_and_nan_is_the_lowest():
    assert search.best(np.array([1.0, np.nan, 3.0, 3.0, -5.0]), 4).tolist() == [2, 3, 0, 4]


def test_the_worst_are_replaced_by_copies_of_the_best_that_are_then_changed():
    states, hparams = population()
    score = jnp.array([7.0, 1, 2, jnp.nan, 8, 3, 4, 5])
    step = jax.jit(lambda key: sweep.exploit_and_explore(
        key, states, hparams, score, explore={"learning_rate": (0.0, 0.45)}, share=0.25, factor=2.0,
    ))  # fmt: skip
    new, numbers, source = step(jax.random.key(0))
    stays = [0, 2, 4, 5, 6, 7]
    assert source[jnp.array(stays)].tolist() == stays
    assert set(source[jnp.array([1, 3])].tolist()) <= {0, 4}
    np.testing.assert_array_equal(new.weight, np.asarray(source, np.float32))
    np.testing.assert_array_equal(numbers.gamma, hparams.gamma)
    for i in range(8):
        before = float(hparams.learning_rate[source[i]])
        expected = [before] if i in stays else [min(2 * before, 0.45), before / 2]
        assert any(np.isclose(numbers.learning_rate[i], value) for value in expected)
    data = np.asarray(jax.random.key_data(new.key))
    assert len({tuple(row) for row in data.tolist()}) == 8  # a copy has a stream of its own
    np.testing.assert_array_equal(data[stays], np.asarray(jax.random.key_data(states.key))[stays])


def test_both_directions_and_all_donors_occur():
    states, hparams = population()
    score = jnp.arange(8.0)
    step = jax.jit(jax.vmap(lambda key: sweep.exploit_and_explore(
        key, states, hparams, score, explore={"learning_rate": (0.0, 9.0)}, factor=2.0,
    )))  # fmt: skip
    _, numbers, source = step(jax.random.split(jax.random.key(0), 400))
    assert set(np.asarray(source[:, 0]).tolist()) == {6, 7}
    ratio = np.asarray(numbers.learning_rate[:, 0] / hparams.learning_rate[source[:, 0]])
    np.testing.assert_allclose(np.mean(ratio > 1), 0.5, atol=0.1)
    assert set(np.round(ratio, 3).tolist()) == {0.5, 2.0}


def test_whole_numbers_are_rounded_and_move_by_at_least_one_within_their_bounds():
    def moved(start, low, high, factor=1.25):
        hparams = HParams(jnp.full(64, start, jnp.int32), jnp.full(64, 0.9))
        states = State(jnp.zeros(64), jax.random.split(jax.random.key(1), 64))
        _, numbers, source = sweep.exploit_and_explore(
            jax.random.key(2), states, hparams, jnp.arange(64.0), explore={"learning_rate": (low, high)},
            share=0.5, factor=factor,
        )  # fmt: skip
        assert numbers.learning_rate.dtype == jnp.int32
        return set(np.asarray(numbers.learning_rate)[np.asarray(source) != np.arange(64)].tolist())

    assert moved(3, 1, 100) == {2, 4}
    assert moved(1, 0.5, 3.5) == {1, 2}
    assert moved(10, 1, 100) == {8, 12}
    assert moved(3, 1, 3) == {2, 3}
    assert moved(-3, -9, 9) == {-4, -2}
    assert moved(0, -9, 9) == {-1, 1}
    assert moved(7, 1.5, 8.5, factor=2.0) == {4, 8}
    with pytest.raises(ValueError, match=r"low=1.2, high=1.8.*is a whole number, and none is between"):
        moved(1, 1.2, 1.8)


def test_without_a_score_nothing_happens_and_it_makes_no_donor():
    states, hparams = population()
    step = jax.jit(jax.vmap(lambda key, score: sweep.exploit_and_explore(
        key, states, hparams, score, explore={"learning_rate": (0.0, 9.0)}, share=0.5,
    ), in_axes=(0, None)))  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 50)
    new, numbers, source = step(keys, jnp.full(8, jnp.nan))
    np.testing.assert_array_equal(source, np.tile(np.arange(8), (50, 1)))
    np.testing.assert_array_equal(numbers.learning_rate[0], hparams.learning_rate)
    assert (jax.random.key_data(new.key) == jax.random.key_data(states.key)).all()
    score = jnp.full(8, jnp.nan).at[jnp.array([2, 5])].set(jnp.array([1.0, 2.0]))
    source = np.asarray(step(keys, score)[2])
    assert set(source[:, 7].tolist()) == {2, 5}


def test_rounds_are_at_ends_of_chunks_of_training():
    pbt = search.PBT({"gamma": (0, 1)}, interval=100)
    assert list(pbt.rounds(chunk=2, num_steps=50, env_steps_per_step=10)) == [10, 20, 30, 40]
    assert list(pbt.rounds(chunk=3, num_steps=50, env_steps_per_step=10)) == [12, 24, 36, 48]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"interval": 0}, "interval=0"),
        ({"interval": 2.5}, "interval=2.5"),
        ({"interval": float("nan")}, "interval=nan"),
        ({"explore": {}}, "names no hyperparameter"),
        ({"explore": {"gamma": (1, 0)}}, "gamma: low=1, high=0"),
        ({"share": 0.0}, "share=0.0"),
    ],
)
def test_what_a_population_refuses(changes, text):
    with pytest.raises(ValueError, match=text):
        search.PBT(**{"explore": {"gamma": (0.0, 1.0)}, "interval": 10} | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"share": 0.6}, "share=0.6"),
        ({"factor": 1.0}, "factor=1.0"),
        ({"explore": {"gama": (0, 1)}}, "no hyperparameter 'gama'. Nearest: gamma"),
    ],
)
def test_what_population_based_training_refuses(changes, text):
    states, hparams = population(4)
    arguments = {"explore": {"gamma": (0.0, 1.0)}} | changes
    with pytest.raises(ValueError, match=text):
        sweep.exploit_and_explore(jax.random.key(0), states, hparams, jnp.arange(4.0), **arguments)
