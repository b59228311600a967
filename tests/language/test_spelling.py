"""Words counted and formats checked on tokens, against Python's own strings and regular expressions."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.language import rewards, spelling, tokenizers
from jrl.language.rewards import Text

PIECES = ["", "h", "a", "p", "y", " ", "hap", "py ", ", s", "ad", "A", "'", "ha. ha", "1"]


def random_texts(count=400, size=12):
    random = np.random.default_rng(0)
    tokens = random.integers(1, len(PIECES), (count, size))
    prompt, length = random.integers(1, 4, count), random.integers(4, size + 1, count)
    finished = random.random(count) < 0.5
    tokens[np.arange(size) >= length[:, None]] = -1
    tokens[np.arange(count)[finished], length[finished] - 1] = 0
    return Text(*(jnp.asarray(x) for x in (tokens, prompt, length, finished)))


def said(texts, i):
    """The prompt of text ``i`` and its completion."""
    row = np.asarray(texts.tokens[i])[: int(texts.length[i]) - int(texts.finished[i])]
    return tuple("".join(PIECES[t] for t in part) for part in np.split(row, [int(texts.prompt_length[i])]))


def test_words_are_counted_as_python_splits_them():
    worth = {"happy": 1.0, "ha": 2.0, "sad": -1.5, "a": -0.25}
    texts = random_texts()
    words = spelling.lexicon(worth, PIECES)
    ours = jax.vmap(lambda text: spelling.count(words, text))(texts)
    balance = jax.vmap(spelling.polarity(words))(texts)
    found = 0
    for i in range(len(ours)):
        prompt, completion = said(texts, i)
        ends = [(m[0].lower(), m.end()) for m in re.finditer(r"[\w']+", prompt + completion)]
        # A word is the completion's if what ends it is: the character after it, or the end of the text.
        counted = [worth.get(w, 0.0) for w, end in ends if end >= len(prompt) and completion]
        good, bad = sum(w for w in counted if w > 0), -sum(w for w in counted if w < 0)
        np.testing.assert_allclose(ours[i], [good, bad], atol=1e-5, err_msg=repr((prompt, completion)))
        np.testing.assert_allclose(balance[i], (good - bad) / max(good + bad, 1e-9), atol=1e-5)
        found += bool(counted and any(counted))
    assert found > 50


def test_a_format_is_a_regular_expression_over_characters():
    texts, pattern = random_texts(), r"(h|a|p|,| )*(sad|y|A|\.)?.{0,3}"
    ours = jax.vmap(rewards.in_grammar(spelling.compile(pattern, PIECES)))(texts)
    matched = 0
    for i in range(len(texts.tokens)):
        completion = said(texts, i)[1]
        expected = re.fullmatch(pattern, completion) is not None
        assert bool(ours[i]) == expected, completion
        matched += expected
    assert 20 < matched < 380


def test_pieces_are_what_tokens_spell():
    assert tokenizers.pieces(tokenizers.Char("ab", ("<end>",)), 5) == ["a", "b", "", "", ""]
    assert tokenizers.pieces(tokenizers.Word(("to", "be"))) == [" <unk>", " to", " be"]
    spelt = tokenizers.pieces(tokenizers.Byte())
    assert (spelt[97], spelt[200], spelt[256]) == ("a", "\ufffd", "")


def test_what_it_refuses():
    with pytest.raises(ValueError, match="a lexicon without words"):
        spelling.lexicon({}, PIECES)
    with pytest.raises(ValueError, match=r"'to be'=1.0: expected a word of letters"):
        spelling.lexicon({"to be": 1.0}, PIECES)
    with pytest.raises(ValueError, match=r"'ha'=0.0: expected .* a number other than 0"):
        spelling.lexicon({"ha": 0.0}, PIECES)
    with pytest.raises(ValueError, match="the word 'zebra' has 'z', which no token of the model spells"):
        spelling.lexicon({"zebra": 1.0}, PIECES)
    with pytest.raises(ValueError, match="it accepts no text"):
        spelling.compile("z", PIECES)
