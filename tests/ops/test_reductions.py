"""Reductions that are written out give what the others give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops
from jrl.ops import reductions


@pytest.mark.parametrize("size", [1, 3, 9])
def test_written_out_or_not_they_are_equal(size, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (5, size))
    plain = reductions.total(x), reductions.largest(x)
    monkeypatch.setattr(reductions, "UNROLLED_ON", jax.default_backend())
    np.testing.assert_allclose(reductions.total(x), plain[0], rtol=1e-6)
    np.testing.assert_array_equal(reductions.largest(x), plain[1])
    reduces = "reduce_sum" in str(jax.make_jaxpr(reductions.total)(x))
    assert reduces == (size > reductions.MAX_UNROLLED)


def test_a_categorical_is_the_same_either_way(monkeypatch):
    logits = jnp.array([[0.3, -1.0, 2.0], [jnp.finfo(jnp.float32).min, 0.0, 1.0]])
    other = ops.Categorical(logits + jnp.array([0.1, 0.2, 0.3]))

    def numbers():
        policy = ops.Categorical(logits)
        return (
            policy.log_prob(jnp.array([2, 1])),
            policy.entropy(),
            policy.kl(other),
            policy.sample(jax.random.key(1)),
            jax.grad(lambda logits: ops.Categorical(logits).entropy().sum())(logits),
        )

    plain = numbers()
    monkeypatch.setattr(reductions, "UNROLLED_ON", jax.default_backend())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), numbers(), plain)
