"""Rewards of texts, and scorers of batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.language import grammar, ngrams, rewards
from jrl.language.rewards import References, Text


def text(prompt, said, finished=True, size=10, reference=()):
    row = [*prompt, *said, *([9] if finished else [])]
    tokens = jnp.array(row + [-1] * (size - len(row)), jnp.int32)
    return Text(tokens, jnp.int32(len(prompt)), jnp.int32(len(row)), jnp.bool_(finished), reference)


def references(*texts):
    size = max(map(len, texts))
    rows = [[*t, *[0] * (size - len(t))] for t in texts]
    return References(jnp.array(rows, jnp.int32), jnp.array([len(t) or -1 for t in texts], jnp.int32))


def test_against_references():
    many = references([1, 2, 3, 4], [], [5, 6])
    right, half = text([7, 7], [1, 2, 3, 4], reference=many), text([7, 7], [1, 2], reference=many)
    assert rewards.exact_match(right) == 1.0
    assert rewards.exact_match(half) == 0.0
    unfinished = text([7, 7], [1, 2, 3, 4], finished=False, reference=many)
    assert rewards.exact_match(unfinished) == 0.0
    assert rewards.edit_similarity(half) == 0.5
    np.testing.assert_allclose(rewards.rouge_l(half), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(rewards.bleu()(right), 1.0, rtol=1e-6)
    assert 0.0 < rewards.bleu()(text([7, 7], [1, 3], reference=many)) < 1.0


@pytest.mark.parametrize(
    "name", ["bleu", "rouge_l", "exact_match", "edit_similarity", "edit_similarity_ahead"]
)
@pytest.mark.parametrize("finished", [True, False])
def test_without_any_reference_there_is_nothing_to_earn(name, finished):
    nothing = text([7, 7], [1, 2], finished, reference=references([], []))
    score = rewards.bleu() if name == "bleu" else getattr(rewards, name)
    assert score(nothing) == jax.jit(score)(nothing) == 0.0


def test_without_references():
    weights = jnp.array([0.0, 1.0, -1.0, *[0.0] * 7])
    assert rewards.lexicon(weights)(text([2], [1, 1, 2, 0])) == 0.25
    assert rewards.lexicon(weights)(text([2], [])) == 0.0
    np.testing.assert_allclose(rewards.distinct(2)(text([0], [1, 1, 1, 1])), 1 / 3, rtol=1e-6)
    compiled = grammar.compile("12*", [str(i) for i in range(10)])
    assert rewards.in_grammar(compiled)(text([5], [1, 2, 2])) == 1.0
    assert rewards.in_grammar(compiled)(text([5], [2, 2])) == 0.0


def test_fluency_and_likelihood_are_means_over_the_completion():
    model = ngrams.fit([[1, 2, 3, 1, 2, 3, 1, 2, 2, 9]], 10, 2)
    given = text([1, 2], [3, 1], finished=True)
    tokens = jnp.array([1, 2, 3, 1, 9])
    expected = ngrams.log_probs(model, tokens)[2:4].mean()
    np.testing.assert_allclose(rewards.fluency(model)(given), expected, rtol=1e-6)
    same = rewards.likelihood(lambda tokens: ngrams.log_probs(model, tokens))
    np.testing.assert_allclose(same(given), expected, rtol=1e-6)


def test_sums_are_normalised_by_all_that_was_seen():
    random = np.random.default_rng(0)
    scores = {"a": lambda t: t.tokens[0].astype(jnp.float32), "b": lambda t: 100.0 * t.tokens[1]}
    scorer = rewards.weighted_sum(scores, {"b": 2.0, "a": 1.0}, normalize=True)
    state, seen = scorer.init(), []
    for _ in range(3):
        tokens = jnp.asarray(random.integers(0, 10, (5, 4)), jnp.int32)
        batch = Text(tokens, jnp.ones(5, int), jnp.full(5, 4), jnp.ones(5, bool))
        seen.append(np.asarray(tokens)[:, :2] * [1.0, 100.0])
        state, score, report = jax.jit(scorer.apply)(state, batch)
    every = np.concatenate(seen)
    standardised = (seen[-1] - every.mean(0)) / (every.std(0) + 1e-4)
    np.testing.assert_allclose(score, standardised @ [1.0, 2.0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(report["score/b"], seen[-1][:, 1].mean(), rtol=1e-6)
    plain = rewards.weighted_sum(scores, {"b": 2.0, "a": 1.0})
    np.testing.assert_allclose(plain.apply(plain.init(), batch)[1], seen[-1] @ [1.0, 2.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"weights has the names \['a'\], the scores are \['a', 'b'\]"):
        rewards.weighted_sum(scores, {"a": 1.0})


def test_sums_are_normalised_where_the_mean_is_far_larger_than_the_spread():
    value = 20_000.0 + np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    scorer = rewards.weighted_sum({"a": lambda t: t.reference}, {"a": 1.0}, normalize=True)
    state, ones = scorer.init(), jnp.ones(64, int)
    for row in value:
        state, score, _ = scorer.apply(
            state, Text(jnp.zeros((64, 2), int), ones, ones, ones > 0, jnp.asarray(row))
        )
    expected = (value[-1].astype(float) - value.mean(dtype=float)) / value.std(dtype=float)
    np.testing.assert_allclose(score, expected, atol=5e-3)  # float32 has steps of 0.002 there


def test_multipliers_rise_while_a_constraint_is_violated_and_fall_after():
    def first(t):
        return t.tokens[0].astype(jnp.float32)

    scorer = rewards.constrained(lambda t: -first(t), {"enough": (first, 3.0)}, step_size=0.5)
    state = scorer.init()

    def batch(value):
        return Text(jnp.full((4, 2), value), jnp.ones(4, int), jnp.full(4, 2), jnp.ones(4, bool))

    state, score, _ = scorer.apply(state, batch(1))
    np.testing.assert_allclose(score, -1.0)
    assert state.tolist() == [1.0]
    state, score, report = scorer.apply(state, batch(1))
    np.testing.assert_allclose(score, -1.0 + 1.0 * (1.0 - 3.0))
    assert report["multiplier/enough"] == 1.0
    for _ in range(5):
        state, _, _ = scorer.apply(state, batch(9))
    assert state.tolist() == [0.0]
    with pytest.raises(ValueError, match="constraints is empty; name at least one"):
        rewards.constrained(first, {})
