"""Who takes part in a sweep: grids, random draws, seeds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import sweep

HP = jrl.ppo.HParams()


def test_a_grid_is_every_combination_with_the_last_name_innermost():
    hparams = sweep.grid(HP, learning_rate=[1e-4, 1e-3, 1e-2], gamma=[0.9, 0.99])
    assert sweep.size(hparams) == 6
    np.testing.assert_allclose(hparams.learning_rate, [1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2])
    np.testing.assert_allclose(hparams.gamma, [0.9, 0.99] * 3)
    np.testing.assert_allclose(hparams.clip_eps, [HP.clip_eps] * 6)
    assert {leaf.shape for leaf in jax.tree.leaves(hparams)} == {(6,)}
    assert {leaf.dtype for leaf in jax.tree.leaves(hparams)} == {jnp.dtype("float32")}
    assert list(sweep.varying(hparams)) == ["learning_rate", "gamma"]


def test_a_grid_reaches_into_the_parameters_of_the_environment():
    hparams = dataclasses.replace(HP, env={"length": 0.5, "limit": 7})
    hparams = sweep.grid(hparams, **{"env.length": [0.5, 1.0], "env.limit": [7, 9]})
    np.testing.assert_allclose(hparams.env["length"], [0.5, 0.5, 1.0, 1.0])
    assert hparams.env["limit"].tolist() == [7, 9, 7, 9]
    assert hparams.env["limit"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"learnig_rate": [1.0]}, "there is no hyperparameter 'learnig_rate'. Nearest: learning_rate"),
        ({"num_envs": [4, 8]}, r"num_envs is a static choice .* \(--static-grid num_envs"),
        ({"gamma": []}, r"gamma=\[\]: a grid needs one or more values"),
        ({"gamma": ["high"]}, r"gamma=\['high'\]: expected one or more numbers"),
        ({"gamma": [float("nan")]}, "nan is no value to sweep over"),
        ({"gamma": [0.5, float("inf")]}, "inf is no float32; the values must be finite"),
        ({"gamma": [1e50]}, r"gamma=\[1e\+50\]: 1e\+50 is no float32; the values must be finite"),
        ({"gamma": [0.9, 0.1, 0.1]}, "0.1 and 0.1 are the same float32, and would count as two settings"),
        ({"gamma": [0.1, 0.1 + 1e-12]}, "are the same float32"),
        ({"env.length": [1.0]}, r"hparams.env is None.*dataclasses.replace\(hparams, env=env.params\)"),
    ],
)  # fmt: skip
def test_what_a_grid_refuses(values, text):
    with pytest.raises(ValueError, match=text):
        sweep.grid(HP, **values)


def test_a_grid_of_whole_numbers_stays_whole():
    hparams = dataclasses.replace(HP, env={"limit": 7, "pair": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="must be whole numbers, as the default 7 is"):
        sweep.grid(hparams, **{"env.limit": [7.5]})
    with pytest.raises(ValueError, match=r"env.limit=.*: 1e\+12 is no int32; .* that it can hold"):
        sweep.grid(hparams, **{"env.limit": [20, 1e12]})
    with pytest.raises(ValueError, match="is no int32"):
        sweep.random(jax.random.key(0), hparams, 2, **{"env.limit": sweep.uniform(1e11, 1e12)})
    with pytest.raises(ValueError, match=r"env.pair has shape \(2,\)"):
        sweep.grid(hparams, **{"env.pair": [1.0]})


def test_random_draws_follow_their_distributions_and_their_names():
    key, n = jax.random.key(0), 4000
    hparams = sweep.random(
        key, HP, n, learning_rate=sweep.loguniform(1e-5, 1e-1), gamma=sweep.uniform(0.9, 1.0),
        clip_eps=sweep.choice(0.1, 0.3), entropy_coef=sweep.normal(1.0, 0.5),
    )  # fmt: skip
    logs = np.log10(hparams.learning_rate)
    assert logs.min() >= -5
    assert logs.max() <= -1
    np.testing.assert_allclose(np.histogram(logs, 4, (-5, -1))[0] / n, 0.25, atol=0.03)
    np.testing.assert_allclose(np.mean(hparams.gamma), 0.95, atol=0.002)
    assert set(np.asarray(hparams.clip_eps).tolist()) == {np.float32(0.1), np.float32(0.3)}
    np.testing.assert_allclose(
        [np.mean(hparams.entropy_coef), np.std(hparams.entropy_coef)], [1, 0.5], atol=0.05
    )
    assert abs(np.corrcoef(logs, hparams.gamma)[0, 1]) < 0.06
    alone = sweep.random(key, HP, n, gamma=sweep.uniform(0.9, 1.0))
    np.testing.assert_array_equal(alone.gamma, hparams.gamma)  # not by which others are swept


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: sweep.uniform(2.0, 1.0), r"uniform\(low=2, high=1\): low must be below high"),
        (lambda: sweep.loguniform(0.0, 1.0), r"loguniform\(low=0\): must be above 0"),
        (lambda: sweep.loguniform(1.0, float("inf")), "both finite"),
        (lambda: sweep.normal(0.0, 0.0), "std above 0"),
        (lambda: sweep.choice(), "no values to choose from"),
        (lambda: sweep.choice(0.1, float("nan")), r"choice\(nan\): a value to choose must be a finite number"),
        (lambda: sweep.choice("a"), r"choice\('a'\)"),
        (lambda: sweep.parse("loguniform:1:2:3"), "loguniform takes 2 numbers.*got 3"),
        (lambda: sweep.parse("gauss:0:1"), "'gauss:0:1' is no distribution: .*uniform, loguniform, normal, choice"),
        (lambda: sweep.parse("uniform:a:b"), "expected numbers after uniform"),
        (lambda: sweep.random(jax.random.key(0), HP, 0, gamma=sweep.uniform(0, 1)), r"random\(n=0\)"),
        (lambda: sweep.random(jax.random.key(0), HP, 2.5, gamma=sweep.uniform(0, 1)), r"random\(n=2.5\)"),
        (lambda: sweep.seeds(0), r"seeds\(0\): a sweep needs at least one seed"),
        (lambda: sweep.seeds(2.5), r"seeds\(2.5, start=0\): both must be whole numbers"),
        (lambda: sweep.seeds(True), "both must be whole numbers"),
        (lambda: sweep.seeds(3, start=-1), r"start=-1\): seeds are from 0"),
        (lambda: sweep.seeds(2, start=2**32 - 1), "seeds are from 0 to"),
    ],
)  # fmt: skip
def test_what_spaces_refuse(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_space_that_is_none_is_a_type_error():
    with pytest.raises(TypeError, match=r"random\(gamma=0.9\): expected a distribution"):
        sweep.random(jax.random.key(0), HP, 2, gamma=0.9)


def test_spaces_are_read_from_text():
    assert sweep.parse("loguniform:1e-5:1e-2") == sweep.loguniform(1e-5, 1e-2)
    assert sweep.parse("choice:32:64") == sweep.choice(32, 64)


def test_seeds_are_those_of_single_runs_and_all_different():
    keys = sweep.seeds(3, start=5)
    for i in range(3):
        expected = jax.random.fold_in(jax.random.key(5 + i), 0)
        assert (jax.random.key_data(keys[i]) == jax.random.key_data(expected)).all()
    last = jax.random.fold_in(jax.random.key(np.uint32(2**32 - 1)), 0)
    assert (jax.random.key_data(sweep.seeds(1, start=2**32 - 1)[0]) == jax.random.key_data(last)).all()
    many = np.asarray(jax.random.key_data(sweep.seeds(512)))
    assert len({tuple(row) for row in many.tolist()}) == 512


def test_product_pairs_every_seed_with_every_setting():
    keys, hparams = sweep.product(sweep.seeds(3), sweep.grid(HP, gamma=[0.9, 0.99]))
    np.testing.assert_allclose(hparams.gamma, [0.9] * 3 + [0.99] * 3)
    data = np.asarray(jax.random.key_data(keys))
    np.testing.assert_array_equal(data[:3], data[3:])
    both = sweep.concatenate(hparams, hparams)
    assert sweep.size(both) == 12
    with pytest.raises(ValueError, match="members are one leading axis of every leaf"):
        sweep.size(HP)
