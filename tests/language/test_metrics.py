"""Metrics inside the compiled program equal those that papers report."""

from __future__ import annotations

import functools
import itertools
import logging

import bundle
import jax
import numpy as np
import pytest

from jrl.language import metrics

SMOOTHINGS = ("exp", "none", "floor", "add-k")


def real_texts():
    """1,200 real sentences as hypotheses, each a reference with words dropped, doubled and moved; 1 to 4 references."""
    random = np.random.default_rng(0)
    lines = [es for _, es in bundle.pairs("bible/en_es.tsv")]
    lines = lines[:600] + [fr for _, fr in bundle.pairs("ui_strings/en_fr.tsv")][:600]
    words = [line.split()[:40] for line in lines]
    texts, references = [], []
    for sentence in words:
        text = [word for word in sentence for _ in range(random.choice([0, 1, 1, 1, 1, 2]))]
        if random.random() < 0.3:
            text = text[::-1]
        texts.append(text)
        others = [words[int(j)] for j in random.integers(len(words), size=int(random.integers(0, 4)))]
        references.append([sentence, *others])
    return texts, references


@functools.cache
def encoded():
    texts, references = real_texts()
    known = {}
    tokens, length = bundle.encode(texts, known=known)
    flat, lengths = bundle.encode([r for many in references for r in (many + [[]] * 4)[:4]], known=known)
    lengths = lengths.reshape(-1, 4)
    lengths[np.arange(4) >= np.array([len(many) for many in references])[:, None]] = -1
    return texts, references, (tokens, length, flat.reshape(len(texts), 4, -1), lengths)


def test_bleu_is_sacrebleu_on_real_sentences():
    sacrebleu = pytest.importorskip("sacrebleu")
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    texts, references, arrays = encoded()
    statistics = jax.jit(metrics.bleu_statistics)(*arrays)
    total = jax.tree.map(lambda x: x.sum(0), statistics)
    lines = [" ".join(text) for text in texts]
    columns = [[" ".join(many[k]) if k < len(many) else None for many in references] for k in range(4)]
    assert len(texts) >= 1000
    for smoothing in SMOOTHINGS:
        for effective in (True, False):
            peer = sacrebleu.BLEU(
                smooth_method=smoothing, effective_order=effective, tokenize="none", force=True
            )
            expected = [
                peer.sentence_score(line, [" ".join(r) for r in many]).score
                for line, many in zip(lines, references, strict=True)
            ]
            ours = metrics.bleu(statistics, smoothing=smoothing, effective_order=effective)
            np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0, err_msg=f"{smoothing} {effective}")
        corpus = sacrebleu.BLEU(smooth_method=smoothing, tokenize="none", force=True).corpus_score(
            lines, columns
        )
        ours = metrics.bleu(total, smoothing=smoothing, effective_order=False)
        np.testing.assert_allclose(ours, corpus.score, atol=5e-5, rtol=0)
        if smoothing != "add-k":  # which adds to them in place
            assert total.matches.tolist() == corpus.counts
            assert total.totals.tolist() == corpus.totals


def test_smoothing_values_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    tokens, references = np.array([[1, 2, 3, 9, 5]]), np.array([[[1, 2, 3, 4, 5, 6]]])
    statistics = metrics.bleu_statistics(tokens, np.array([5]), references, np.array([[6]]))
    for smoothing in ("floor", "add-k"):
        peer = sacrebleu.BLEU(
            smooth_method=smoothing, smooth_value=0.3, effective_order=True, tokenize="none"
        ).sentence_score("1 2 3 9 5", ["1 2 3 4 5 6"])
        np.testing.assert_allclose(
            metrics.bleu(statistics, smoothing=smoothing, smoothing_value=0.3), [peer.score], rtol=1e-5
        )


def test_bleu_of_texts_longer_than_a_packed_count():
    """600 times the same word: more than 8 bits hold; the clipped count is the reference's."""
    tokens, references = np.zeros((1, 600), np.int32), np.zeros((1, 1, 700), np.int32)
    for reference_length in (200, 255, 256, 700):
        statistics = metrics.bleu_statistics(
            tokens, np.array([600]), references, np.array([[reference_length]])
        )
        expected = [min(600 - n, reference_length - n) for n in range(4)]
        assert statistics.matches[0].tolist() == expected


def test_bleu_refuses_what_it_does_not_know():
    arrays = tuple(np.zeros(shape, np.int32) for shape in ((2, 3), (2,), (2, 1, 3), (2, 1)))
    with pytest.raises(ValueError, match=r"smoothing='linear': must be one of exp, none, floor, add-k"):
        metrics.bleu(metrics.bleu_statistics(*arrays), smoothing="linear")
    with pytest.raises(ValueError, match=r"order=5\): must be 1 to 4"):
        metrics.bleu_statistics(*arrays, order=5)
    with pytest.raises(ValueError, match=r"references \(3, 3\).*expected \[..., L\]"):
        metrics.bleu_statistics(arrays[0], arrays[1], np.zeros((3, 3), np.int32), arrays[3])


def test_rouge_l_is_rouge_scores():
    scoring = pytest.importorskip("rouge_score.rouge_scorer")

    class Words:
        def tokenize(self, text):
            return text.split()

    scorer = scoring.RougeScorer(["rougeL"], tokenizer=Words())
    texts, references, (tokens, length, others, lengths) = encoded()
    ours = jax.jit(metrics.rouge_l)(tokens, length, others[:, 0], lengths[:, 0])
    expected = [
        scorer.score(" ".join(many[0]), " ".join(text))["rougeL"]
        for text, many in zip(texts, references, strict=True)
    ]
    for field, name in (("precision", "precision"), ("recall", "recall"), ("f", "fmeasure")):
        np.testing.assert_allclose(getattr(ours, field), [getattr(e, name) for e in expected], atol=1e-6)


def slow_distance(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return table[-1, -1]


def slow_bleu_matches(text, references, order):
    def grams(words):
        return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]

    return sum(
        min(grams(text).count(g), max(grams(r).count(g) for r in references)) for g in set(grams(text))
    )


def test_metrics_equal_slow_loops_on_random_texts():
    random = np.random.default_rng(1)
    tokens, others = random.integers(0, 3, (40, 9)), random.integers(0, 3, (40, 2, 7))
    length, lengths = random.integers(0, 10, 40), random.integers(0, 8, (40, 2))
    texts = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
    references = [
        [row[:n].tolist() for row, n in zip(rows, ns, strict=True)]
        for rows, ns in zip(others, lengths, strict=True)
    ]
    statistics = metrics.bleu_statistics(tokens, length, others, lengths)
    for order in range(1, 5):
        expected = [slow_bleu_matches(t, r, order) for t, r in zip(texts, references, strict=True)]
        assert statistics.matches[:, order - 1].tolist() == expected

    first = (tokens, length, others[:, 0], lengths[:, 0])
    distance = [slow_distance(t, r[0]) for t, r in zip(texts, references, strict=True)]
    assert metrics.edit_distance(*first).tolist() == distance
    assert metrics.prefix_distance(*first).tolist() == [
        min(slow_distance(t, r[0][:j]) for j in range(len(r[0]) + 1))
        for t, r in zip(texts, references, strict=True)
    ]
    np.testing.assert_allclose(
        metrics.word_error_rate(*first),
        [d / max(len(r[0]), 1) for d, r in zip(distance, references, strict=True)],
        rtol=1e-6,
    )
    assert metrics.exact_match(*first).tolist() == [
        float(t == r[0]) for t, r in zip(texts, references, strict=True)
    ]
    distinct = [
        len({(a, b) for a, b in itertools.pairwise(t)}) / (len(t) - 1) if len(t) > 1 else 1.0 for t in texts
    ]
    np.testing.assert_allclose(metrics.distinct_n(tokens, length, 2), distinct, rtol=1e-6)


def test_any_leading_axes_and_none():
    random = np.random.default_rng(2)
    tokens, others = random.integers(0, 4, (2, 3, 5)), random.integers(0, 4, (2, 3, 6))
    length, lengths = random.integers(1, 6, (2, 3)), random.integers(1, 7, (2, 3))
    for metric in (metrics.edit_distance, metrics.longest_common_subsequence, metrics.exact_match):
        batch = metric(tokens, length, others, lengths)
        assert batch.shape == (2, 3)
        assert metric(tokens[1, 2], length[1, 2], others[1, 2], lengths[1, 2]) == batch[1, 2]
    with pytest.raises(ValueError, match=r"reference \(3, 6\).*of the same leading axes"):
        metrics.edit_distance(tokens, length, others[0], lengths)


@pytest.mark.parametrize(("width", "other"), [(0, 3), (3, 0), (0, 0)])
def test_texts_that_have_no_room_for_a_token_are_empty(width, other):
    """As the same text in an array with room: lengths are what counts."""
    given = np.ones((2, width), int), np.full(2, width), np.ones((2, other), int), np.full(2, other)
    roomy = np.ones((2, 4), int), given[1], np.ones((2, 4), int), given[3]
    assert metrics.edit_distance(*given).tolist() == [max(width, other)] * 2
    for metric in (
        metrics.edit_distance,
        metrics.prefix_distance,
        metrics.word_error_rate,
        metrics.longest_common_subsequence,
        metrics.rouge_l,
        lambda *pair: metrics.bleu_statistics(*pair[:2], *(x[:, None] for x in pair[2:])),
    ):
        jax.tree.map(np.testing.assert_array_equal, metric(*given), metric(*roomy))
