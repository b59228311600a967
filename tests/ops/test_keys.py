"""The cheap generator: what a user of jax.random relies on, and statistics that a bad one fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

KEY = ops.hashed(jax.random.key(0))
N = 1 << 20


@pytest.fixture(scope="module")
def words():
    """Streams of different kinds, each as one row of words: what a chain of draws would see."""
    # Neighbouring seeds, children of one key and numbers folded in: where weak mixing shows first.
    row = jax.jit(lambda key: jax.random.bits(key, (N,), jnp.uint32))
    first = jax.jit(jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32)))
    seeds = jax.vmap(jax.random.key)(jnp.arange(N))
    folded = jax.jit(jax.vmap(lambda i: jax.random.fold_in(KEY, i)))(jnp.arange(N))
    return {
        "one key": np.asarray(row(KEY)),
        "children": np.asarray(first(jax.random.split(KEY, N))),
        "seeds": np.asarray(first(ops.hashed(seeds))),
        "folded": np.asarray(first(folded)),
        "grandchildren": np.asarray(
            first(jax.vmap(lambda key: jax.random.split(key, 4)[3])(jax.random.split(KEY, N)))
        ),
    }


STREAMS = ("one key", "children", "seeds", "folded", "grandchildren")


def chi_squared(counts):
    """Standardised: about N(0, 1) where all cells are equally likely."""
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum() / np.sqrt(2 * counts.size) - np.sqrt(counts.size / 2)


@pytest.mark.parametrize("stream", STREAMS)
def test_every_byte_is_uniform_and_independent_of_the_one_before(words, stream):
    for shift in (0, 8, 16, 24):
        byte = (words[stream] >> shift) & 0xFF
        assert abs(chi_squared(np.bincount(byte, minlength=256))) < 5
        pairs = np.bincount((byte[:-1] >> 2) * 64 + (byte[1:] >> 2), minlength=4096)
        assert abs(chi_squared(pairs)) < 5


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_bits_of_words_apart_differ_half_of_the_time(words, stream, lag):
    differ = words[stream][:-lag] ^ words[stream][lag:]
    for bit in range(32):
        ones = ((differ >> bit) & 1).mean()
        assert abs(ones - 0.5) * 2 * np.sqrt(differ.size) < 5


def test_words_repeat_across_keys_as_often_as_chance_has_it(words):
    # 2²⁰ words of 2³² have about 128 coincidences. A word is one to one in the counter, and in a seed, which is all
    # that the keys of seeds differ by: there it has none.
    for stream in ("children", "folded", "grandchildren"):
        repeats = N - len(np.unique(words[stream]))
        assert abs(repeats - N * N / 2**33) < 5 * np.sqrt(128)
    assert len(np.unique(words["one key"])) == len(np.unique(words["seeds"])) == N


def test_one_flipped_bit_of_a_key_flips_half_of_the_words_bits():
    data = jax.random.key_data(jax.random.split(KEY, 256))

    def draw(data):
        return jax.vmap(lambda d: jax.random.bits(jax.random.wrap_key_data(d, impl=ops.keys.HASHED), (64,)))(
            data
        )

    before = np.asarray(draw(data))
    for word in (0, 1):
        for bit in range(32):
            after = np.asarray(draw(data.at[:, word].set(data[:, word] ^ jnp.uint32(1 << bit))))
            flipped = np.unpackbits((before ^ after).view(np.uint8)).mean()
            assert abs(flipped - 0.5) < 0.005, (word, bit)


def test_children_folded_keys_and_draws_of_one_key_have_nothing_in_common():
    drawn = np.asarray(jax.random.bits(KEY, (4096,)))
    children = np.asarray(jax.random.key_data(jax.random.split(KEY, 2048))).reshape(-1)
    folded = jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(2048)))
    rows = [set(drawn.tolist()), set(children.tolist()), set(np.asarray(folded).reshape(-1).tolist())]
    assert len(rows[0] & rows[1]) + len(rows[0] & rows[2]) + len(rows[1] & rows[2]) <= 1


def test_normals_have_the_moments_of_a_gaussian():
    x = np.asarray(jax.random.normal(KEY, (N,)), np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * np.sqrt(variance / N)


def test_draws_do_not_depend_on_the_shape_of_what_is_drawn_or_on_vmap():
    keys = jax.random.split(KEY, 3)
    np.testing.assert_array_equal(jax.random.bits(KEY, (4, 6)).reshape(-1), jax.random.bits(KEY, (24,)))
    together = jax.vmap(lambda key: jax.random.uniform(key, (5,)))(keys)
    for key, row in zip(keys, together, strict=True):
        np.testing.assert_array_equal(jax.random.uniform(key, (5,)), row)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.uint8, 8), (jnp.uint16, 16), (jnp.uint64, 64)])
def test_words_of_other_widths_are_uniform_in_each_of_their_bytes(dtype, bits):
    with jax.enable_x64(bits == 64):
        x = np.asarray(jax.random.bits(KEY, (1 << 16,), dtype))
    assert x.dtype == dtype
    for shift in range(0, bits, 8):
        byte = ((x >> x.dtype.type(shift)) & x.dtype.type(0xFF)).astype(np.int64)
        assert abs(chi_squared(np.bincount(byte, minlength=256))) < 5


def test_every_seed_is_another_key():
    def first_words(seed):
        return jax.random.bits(jax.random.key(seed, impl=ops.keys.HASHED), (2,))

    words = np.asarray(jax.vmap(first_words)(jnp.arange(1 << 12)))
    assert len(np.unique(words, axis=0)) == 1 << 12
    np.testing.assert_array_equal(first_words(7), words[7])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_any_typed_key_can_be_hashed_and_others_are_refused(impl):
    keys = ops.hashed(jax.random.split(jax.random.key(3, impl=impl), 4))
    assert keys.shape == (4,)
    assert len(np.unique(np.asarray(jax.random.key_data(keys)), axis=0)) == 4
    with pytest.raises(TypeError, match="needs a typed key"):
        ops.hashed(jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize("hash_it", [False, True])
def test_keys_of_several_shapes_are_those_of_one_split(hash_it):
    key = ops.hashed(jax.random.key(3)) if hash_it else jax.random.key(3)
    parts = ops.split_keys(key, (), (2, 3), (0,), (4,))
    assert [part.shape for part in parts] == [(), (2, 3), (0,), (4,)]
    data = np.concatenate([np.asarray(jax.random.key_data(part)).reshape(-1, 2) for part in parts])
    np.testing.assert_array_equal(data, jax.random.key_data(jax.random.split(key, 11)))
    assert len(np.unique(data, axis=0)) == 11
