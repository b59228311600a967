"""The C++ kernel of a noisy network's noise draws what JAX would, whatever the vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jrl import networks, ops
from jrl.bench import work
from jrl.native import noise

KEY = jax.random.key(3)


def by_jax(key, shape):
    normal = jax.random.normal(key, shape)
    return jnp.sign(normal) * jnp.sqrt(jnp.abs(normal))


def test_it_is_the_normal_of_jax():
    """In both tails too, of a hundred thousand; XLA's own logarithm there is good to 1e-5."""
    for shape in ((100_000,), (3, 7), (1,), (0,)):
        np.testing.assert_allclose(noise.factors(KEY, shape), by_jax(KEY, shape), rtol=1e-5, atol=1e-6)


def test_its_work_is_counted_as_that_of_xla():
    counted = [work.count(lambda key, f=f: f(key, (3, 7)), KEY) for f in (noise.factors, noise.reference)]
    assert counted[0].random_bits == counted[1].random_bits > 0
    assert counted[0].transcendentals == counted[1].transcendentals > 0


def test_members_have_their_own():
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(lambda key: noise.factors(key, (2, 5)))(keys)
    for key, member in zip(keys, together, strict=True):
        np.testing.assert_array_equal(noise.factors(key, (2, 5)), member)


def test_noisy_networks_draw_it():
    params = networks.noisy.init({"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}})
    for key, exact in ((KEY, 1e-5), (ops.hashed(KEY), 0.0)):
        plain, ours = (networks.noisy.draw(key, params, (2,), kernels=k) for k in ("xla", "native"))
        assert plain.shape == ours.shape == (2, 7)
        np.testing.assert_allclose(ours, plain, rtol=exact, atol=exact)
