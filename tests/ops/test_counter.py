import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.ops import counter


def at(value):
    return jnp.array([value % 2**32, value // 2**32], jnp.uint32)


def test_zero():
    assert counter.to_int(counter.zero()) == 0
    assert counter.zero().dtype == jnp.uint32
    assert counter.zero().shape == (2,)


@pytest.mark.parametrize("start", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 2**32 - 7, 2**60])
@pytest.mark.parametrize("amount", [0, 1, 7, 2**31, 2**32 - 1])
def test_add_carries(start, amount):
    total = counter.add(at(start), amount)
    assert counter.to_int(total) == start + amount
    assert total.dtype == jnp.uint32
    assert not total.aval.weak_type


def test_many_adds_in_a_scan_pass_two_to_the_32():
    amount, times = 2**31 - 5, 9
    total, _ = jax.lax.scan(lambda c, _: (counter.add(c, amount), None), counter.zero(), length=times)
    assert counter.to_int(total) == amount * times > 2**33


def test_a_batch_of_counters_under_vmap_and_without():
    starts = [3, 2**32 - 1, 2**40]
    batch = jnp.stack([at(s) for s in starts])
    for total in (jax.jit(jax.vmap(lambda c: counter.add(c, 2)))(batch), counter.add(batch, 2)):
        assert [counter.to_int(c) for c in total] == [s + 2 for s in starts]
    np.testing.assert_allclose(counter.to_float(batch), starts, rtol=2e-7)


@pytest.mark.parametrize(
    "value", [0, 1, 2**24, 2**24 + 1, 2**31 + 12345, 2**32 - 1, 2**32 + 7, 2**45 + 3, 2**62]
)
def test_to_float_is_close_and_grows(value):
    result = counter.to_float(at(value))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(float(result), value, rtol=2**-23)
    assert counter.to_float(at(2 * value + 1)) > result


@pytest.mark.parametrize("amount", [-1, 1.5, 2**32, 2**40])
def test_an_amount_beyond_one_word_is_an_error(amount):
    with pytest.raises(
        ValueError, match=rf"counter\.add\(amount={amount}\): must be an integer of at most 32 bits"
    ):
        counter.add(counter.zero(), amount)
