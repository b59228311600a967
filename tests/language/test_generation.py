"""Generation against a plain loop over whole texts, slots that are reused, and the distribution that is sampled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.language import generation
from jrl.language.generation import Sampling, Settings
from jrl.networks import transformer

CONFIG = transformer.Config(
    vocab_size=9, num_layers=1, num_heads=2, num_kv_heads=1, width=8, mlp_width=8, max_length=14,
    value_head=True, init_scale=0.6,
)  # fmt: skip
PROMPTS = np.array([[3, 1, 4, 0], [5, 0, 0, 0], [2, 6, 0, 0]])
LENGTHS = np.array([3, 1, 2])
SHAPED = Sampling(temperature=0.8, top_k=7, top_p=0.95)
END = 2


@functools.cache
def model():
    params = transformer.init(jax.random.key(0), CONFIG)
    params["value"] = {"kernel": jnp.linspace(-1, 1, 8), "bias": jnp.float32(0.5)}
    forward = jax.jit(lambda params, tokens: transformer.forward(params, CONFIG, tokens))
    return params, forward


@functools.cache
def generator(settings):
    params, _ = model()
    return jax.jit(
        lambda key, sampling: generation.generate(key, params, CONFIG, PROMPTS, LENGTHS, settings, sampling)
    )


@pytest.fixture(scope="module")
def sampled():
    return generator(Settings(max_new_tokens=10, end_token=END, num_samples=3))(jax.random.key(7), SHAPED)


def test_tokens_log_probabilities_and_values_are_those_of_whole_texts(sampled):
    params, forward = model()
    for r in range(9):
        prompt = list(PROMPTS[r // 3][: LENGTHS[r // 3]])
        length = int(sampled.length[r])
        text = prompt + np.asarray(sampled.tokens[r, :length]).tolist()
        output = forward(params, jnp.pad(jnp.array(text), (0, 14 - len(text)))[None])
        where = len(prompt) - 1 + np.arange(length)
        log_p = np.log(slow_shape(np.asarray(output.logits[0, where], np.float64), 0.8, 7, 0.95))
        np.testing.assert_allclose(
            sampled.log_prob[r, :length], log_p[np.arange(length), text[len(prompt) :]], atol=1e-5
        )
        np.testing.assert_allclose(sampled.value[r, :length], output.value[0, where], atol=1e-5)


def slow_shape(logits, temperature, top_k, top_p):
    """Probabilities, by sorting; rows [n, V]."""
    rows = []
    for row in np.exp(logits / temperature):
        order = np.argsort(-row)
        row[order[top_k:]] = 0
        row /= row.sum()
        kept = np.searchsorted(np.cumsum(row[order]), top_p) + 1
        row[order[kept:]] = 0
        rows.append(row / row.sum())
    return np.maximum(np.array(rows), 1e-300)


def test_texts_end_at_the_end_token_and_samples_differ(sampled):
    tokens, mask = np.asarray(sampled.tokens), np.asarray(sampled.mask)
    for r in range(9):
        ends = np.flatnonzero(tokens[r] == END)
        assert bool(sampled.finished[r]) == bool(ends.size)
        assert int(sampled.length[r]) == (ends[0] + 1 if ends.size else 10)
    assert not tokens[~mask].any()
    assert not np.asarray(sampled.log_prob)[~mask].any()
    assert 0 < sampled.finished.sum() < 9, "both ways to end are to be seen here"
    assert len({tuple(row) for row in tokens}) > 3


def test_slots_that_are_reused_say_the_same(sampled):
    # 9 requests on 2 slots: each is given several, at different times, after texts of different lengths.
    few = generator(Settings(max_new_tokens=10, end_token=END, num_samples=3, num_slots=2))(
        jax.random.key(7), SHAPED
    )
    np.testing.assert_array_equal(few.tokens, sampled.tokens)
    np.testing.assert_array_equal(few.length, sampled.length)
    np.testing.assert_array_equal(few.finished, sampled.finished)
    np.testing.assert_allclose(few.log_prob, sampled.log_prob, atol=1e-5)
    np.testing.assert_allclose(few.value, sampled.value, atol=1e-5)


def test_the_cache_is_written_in_place():
    settings = Settings(max_new_tokens=10, end_token=END, num_samples=3, num_slots=2)
    program = generator(settings).lower(jax.random.key(7), SHAPED).compile().as_text()
    cache = r"f32\[2,1,4,13\]\S*"
    assert re.search(rf"{cache} parameter", program), "the cache was not found: the test does not test"
    assert not re.search(rf"= {cache} copy\(", program)


def test_members_of_a_batch_are_the_same_texts_alone(sampled):
    params, _ = model()
    settings = Settings(max_new_tokens=10, end_token=END, num_samples=3)
    keys = jnp.stack([jax.random.key(8), jax.random.key(7)])
    both = jax.jit(
        jax.vmap(
            lambda key, sampling: generation.generate(
                key, params, CONFIG, PROMPTS, LENGTHS, settings, sampling
            ),
            in_axes=(0, None),
        )
    )(keys, SHAPED)
    np.testing.assert_array_equal(both.tokens[1], sampled.tokens)
    np.testing.assert_allclose(both.log_prob[1], sampled.log_prob, atol=1e-5)
    assert (both.tokens[0] != both.tokens[1]).any()


def test_greedy_takes_the_most_probable_token_of_whole_texts():
    params, forward = model()
    texts = generator(Settings(max_new_tokens=5, greedy=True))(jax.random.key(0), Sampling())
    for prompt, length, tokens in zip(PROMPTS, LENGTHS, texts.tokens, strict=True):
        text = list(prompt[:length])
        for _ in range(5):
            logits = forward(params, jnp.pad(jnp.array(text), (0, 14 - len(text)))[None]).logits
            text.append(int(logits[0, len(text) - 1].argmax()))
        assert text[length:] == np.asarray(tokens).tolist()
    assert not texts.finished.any()


def test_sampling_numbers_do_not_recompile():
    function = generator(Settings(max_new_tokens=10, end_token=END, num_samples=3))
    function(jax.random.key(7), SHAPED)
    before = function._cache_size()
    function(jax.random.key(7), Sampling(0.5, 3, 0.5))
    assert function._cache_size() == before


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (3, None), (None, 0.6), (40, 0.9), (None, 1.0), (1, 0.0)]
)
def test_truncation_equals_sorting(top_k, top_p):
    logits = 3 * np.asarray(jax.random.normal(jax.random.key(1), (64, 40)))
    shaped = generation.shape_logits(jnp.asarray(logits), Sampling(0.7, top_k, top_p))
    expected = slow_shape(logits.astype(np.float64), 0.7, top_k or 40, 1.0 if top_p is None else top_p)
    np.testing.assert_allclose(jax.nn.softmax(shaped), expected, atol=1e-6)


def test_draws_follow_the_distribution():
    logits = jnp.broadcast_to(jnp.array([1.0, 0.0, -1.0, 2.0, 0.5]), (20_000, 5))
    keys = jax.random.split(jax.random.key(3), 20_000)
    token, log_prob = jax.jit(generation.draw)(keys, logits, Sampling(temperature=2.0, top_k=4))
    p = slow_shape(np.asarray(logits[:1], np.float64), 2.0, 4, 1.0)[0]
    count = np.bincount(token, minlength=5)
    assert count[2] == 0
    assert (np.abs(count / 20_000 - p) < 4 * np.sqrt(p / 20_000)).all()
    np.testing.assert_allclose(log_prob, np.log(p)[np.asarray(token)], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_new_tokens": 11}, "a prompt of 4 tokens and 11 new ones: the context holds max_length=14"),
        ({"max_new_tokens": 2, "end_token": 9}, "end_token=9 is outside the vocabulary of 9 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        generator(Settings(**settings)).lower(jax.random.key(0), Sampling())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_samples=0: must be at least 1"):
        Settings(num_samples=0)
    with pytest.raises(TypeError, match="max_new_tokens=1\\.5: must be an integer"):
        Settings(max_new_tokens=1.5)
