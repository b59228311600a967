"""Kneser-Ney smoothing against a slow dictionary version, and as a distribution."""

from __future__ import annotations

from collections import Counter

import bundle
import jax
import numpy as np
import pytest

from jrl.language import ngrams


def slow_probability(texts, vocab_size, order):
    """p(word | context) from the equation, over dictionaries."""
    grams = {
        n: Counter(tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1))
        for n in range(1, order + 1)
    }
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in grams[n + 1])
    discounts = {}
    for n in counts:
        ones, twos = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        discounts[n] = ones / (ones + 2 * twos) if ones else 0.0

    def probability(word, context):
        n = len(context) + 1
        shorter = probability(word, context[1:]) if context else 1 / vocab_size
        following = {g: c for g, c in counts[n].items() if g[:-1] == context}
        total = sum(following.values())
        if not total:
            return shorter
        share = discounts[n] * len(following) / total
        return max(following.get((*context, word), 0) - discounts[n], 0) / total + share * shorter

    return probability


@pytest.mark.parametrize("order", [1, 2, 4])
def test_equals_the_equation_and_sums_to_one(order):
    random = np.random.default_rng(0)
    texts = [random.choice(5, size=n, p=[0.4, 0.3, 0.2, 0.1, 0.0]).tolist() for n in (1, 30, 2, 40)]
    model = ngrams.fit(texts, 5, order)
    expected = slow_probability(texts, 5, order)
    probe = random.integers(0, 5, 25)
    ours = np.exp(ngrams.log_probs(model, probe))
    wanted = [expected(probe[t], tuple(probe[max(0, t - order + 1) : t])) for t in range(25)]
    np.testing.assert_allclose(ours, wanted, rtol=2e-5)
    for length in (0, 1, 2, 10):
        following = np.exp(ngrams.next_log_probs(model, probe, length))
        np.testing.assert_allclose(following.sum(), 1.0, rtol=1e-5)
        np.testing.assert_allclose(following[probe[length]], wanted[length], rtol=2e-5)


@pytest.mark.parametrize("texts", [[[0], [1], [1]], [[0, 1], [1, 2], [1, 2]]])
def test_orders_longer_than_every_text_are_left_out(texts):
    longest = len(texts[0])
    model, expected = ngrams.fit(texts, 3, order=4), slow_probability(texts, 3, longest)
    probe = np.array([1, 2, 0, 1, 1, 2])
    wanted = [expected(probe[t], tuple(probe[max(0, t - longest + 1) : t])) for t in range(6)]
    np.testing.assert_allclose(np.exp(ngrams.log_probs(model, probe)), wanted, rtol=2e-5)
    following = np.exp(ngrams.next_log_probs(model, probe, 3))
    np.testing.assert_allclose(following.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(following[1], wanted[3], rtol=2e-5)
    np.testing.assert_allclose(np.exp(ngrams.last_log_prob(model, probe, 4)), wanted[3], rtol=2e-5)


def test_real_text_is_likelier_than_its_letters_shuffled():
    letters = bundle.path("shakespeare/input.txt").read_text()[:200_000]
    known = sorted(set(letters))
    ids = np.array([known.index(letter) for letter in letters], np.int32)
    model = ngrams.fit([ids[:190_000]], len(known), 4)
    held_out = ids[190_000:]
    bits = -np.asarray(jax.jit(ngrams.log_probs)(model, held_out)).mean()
    shuffled = np.random.default_rng(0).permutation(held_out)
    assert bits < 1.9  # nats a letter; letters alone have 3.3
    assert -np.asarray(ngrams.log_probs(model, shuffled)).mean() > 3.0


def test_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="token 7 is outside the vocabulary of 5 tokens, 0 to 4"):
        ngrams.fit([[0, 1], [7]], 5)
    with pytest.raises(ValueError, match="hold no token"):
        ngrams.fit([[], []], 5)
    with pytest.raises(ValueError, match=r"order=0"):
        ngrams.fit([[1]], 5, 0)
    with pytest.raises(ValueError, match=r"exceed 32 bits; use order=1"):
        ngrams.fit([[0, 1]], 100_000, 2)
