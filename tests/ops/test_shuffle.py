import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.ops.shuffle import shuffled_indices


def draws(n: int, num: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(7), num)
    return np.asarray(jax.jit(jax.vmap(lambda key: shuffled_indices(key, n)))(keys))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 97, 100, 128, 640, 1000, 2047, 8192, 3 * 4096])
def test_is_a_permutation(n):
    for row in draws(n, 3):
        np.testing.assert_array_equal(np.sort(row), np.arange(n))


@pytest.mark.parametrize("n", [64, 640, 1024])
def test_every_position_is_uniform(n):
    """Chi-square of where index i lands, against the mean n-1 and standard deviation √(2(n-1)) of a fair one."""
    num = 20_000
    rows = draws(n, num)
    for position in (0, 1, n // 2, n - 1):
        counts = np.bincount(rows[:, position], minlength=n)
        chi_square = ((counts - num / n) ** 2 / (num / n)).sum()
        assert abs(chi_square - (n - 1)) < 5 * np.sqrt(2 * (n - 1))


@pytest.mark.parametrize("n", [64, 640, 1024])
def test_pairs_share_a_minibatch_as_often_as_by_chance(n):
    """Neighbours in time and in environment must not travel together, or minibatches would be correlated."""
    num, minibatches = 20_000, 4
    rows = draws(n, num)
    minibatch_of = np.empty_like(rows)
    np.put_along_axis(
        minibatch_of, rows, np.arange(n)[None] // (n // minibatches) * np.ones_like(rows), axis=1
    )
    chance = (n / minibatches - 1) / (n - 1)
    sigma = np.sqrt(chance * (1 - chance) / num)
    for distance in (1, 2, 8, 16, 32, n // 2, n - 1):
        together = (minibatch_of[:, 0] == minibatch_of[:, distance]).mean()
        assert abs(together - chance) < 5 * sigma, distance


def test_displacements_of_neighbours_are_spread_as_in_a_fair_permutation():
    n, num = 1024, 4000
    rows = draws(n, num)
    steps = (rows[:, 1:] - rows[:, :-1]) % n
    counts = np.bincount(steps.ravel(), minlength=n)[1:]
    expected = steps.size / (n - 1)
    # Neighbouring steps depend on each other a little, so allow ten standard deviations of the fair spread.
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (n - 2)) < 10 * np.sqrt(2 * (n - 2))


def test_different_keys_give_different_orders():
    rows = draws(256, 50)
    assert len({row.tobytes() for row in rows}) == 50
    # Two fair permutations agree in one place on average.
    agreements = [(rows[i] == rows[j]).sum() for i in range(50) for j in range(i)]
    assert 0.8 < np.mean(agreements) < 1.2


def test_rejects_an_empty_range():
    with pytest.raises(ValueError, match=r"shuffled_indices\(n=0\): n must be at least 1"):
        shuffled_indices(jax.random.key(0), 0)


def test_dtype_is_int32():
    assert shuffled_indices(jax.random.key(0), 128).dtype == jnp.int32


@pytest.mark.parametrize("n", [97, 640])  # by a sort, and by the network
def test_several_at_once_are_permutations_as_different_as_those_of_several_keys(n):
    rows = np.asarray(shuffled_indices(jax.random.key(3), n, 50))
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.broadcast_to(np.arange(n), (50, n)))
    agreements = [(rows[i] == rows[j]).sum() for i in range(50) for j in range(i)]
    assert 0.8 < np.mean(agreements) < 1.2
    with pytest.raises(ValueError, match=r"shuffled_indices\(num=0\): num must be at least 1"):
        shuffled_indices(jax.random.key(0), n, 0)
