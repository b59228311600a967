"""Automata accept what Python's regular expressions match, and their masks lead to accepted texts only."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.language import grammar

SYMBOLS = ["a", "b", "c", "-", "<eos>"]
EOS = 4


@pytest.mark.parametrize(
    "pattern",
    [
        "abc",
        "a|b*",
        "(ab|c)+",
        "a?b{2}",
        "[a-c]{1,3}-",
        "(a|ab)(c|bc)?",
        ".b.",
        "a{0,2}c",
        "(a*b)*",
        "[-a]+b",
        "a{0}b",
    ],
)
def test_accepts_what_re_matches(pattern):
    compiled = grammar.compile(pattern, SYMBOLS)
    texts = [t for n in range(6) for t in itertools.product(range(4), repeat=n)]
    tokens = np.array([[*t, *[0] * (5 - len(t))] for t in texts])
    lengths = np.array([len(t) for t in texts])
    accepted = jax.jit(grammar.accepts)(compiled, tokens, lengths)
    expected = [re.fullmatch(pattern, "".join(SYMBOLS[i] for i in t)) is not None for t in texts]
    assert accepted.tolist() == expected


def test_every_text_drawn_under_the_mask_is_accepted_in_time():
    compiled = grammar.compile("a(b|c)*-(ab)+", SYMBOLS)

    def draw(key):
        def pick(state, x):
            key, remaining = x
            here, ended, length = state
            mask = grammar.allowed(compiled, here, EOS, remaining)
            token = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
            token = jnp.where(ended, EOS, token)
            ended |= token == EOS
            here = jnp.where(ended, here, grammar.step(compiled, here, token))
            return (here, ended, length + ~ended), (token, mask.any() | ended)

        start = (jnp.int32(0), jnp.bool_(False), jnp.int32(0))
        return jax.lax.scan(pick, start, (jax.random.split(key, 8), 8 - jnp.arange(8)))

    (_, ended, length), (tokens, possible) = jax.vmap(draw)(jax.random.split(jax.random.key(0), 200))
    assert ended.all()
    assert possible.all()
    assert grammar.accepts(compiled, tokens, length).all()
    assert len({tuple(row) for row in tokens.tolist()}) > 5


def test_a_repetition_without_an_end():
    rules = grammar.compile("a{2,}b{0,}", ["a", "b"])
    for text, inside in (("a", False), ("aa", True), ("aaaa", True), ("aaabb", True), ("abb", False)):
        tokens = jnp.asarray(["ab".index(letter) for letter in text])
        assert grammar.accepts(rules, tokens, len(text)) == inside


def test_what_it_refuses():
    for pattern, message in (("[^a]", "sets of what is not in them"), ("[c-a]|b", "a range from 'c' to 'a'")):
        with pytest.raises(ValueError, match=message):
            grammar.compile(pattern, ["a", "b", "c", "^"])
    for pattern, message in {
        "(ab": "not closed at character 3",
        "ab)": "never opened at character 2",
        "*a": "'*' has nothing before it at character 0",
        "a{x}": "must be {2}, {2,5} or {2,}",
        "a{3,2}": "at least 3 and at most 2",
        "z": "accepts no text",
        "(" * 3000 + "a" + ")" * 3000: "parentheses are nested too deeply",
        "[ab": "ends too early",
        "^ab": r"the whole text must match anyway; a character ^ is written \^, and '^' at character 0",
        "(ab)$": r"a character $ is written \$, and '$' at character 4",
        "a{99999999}": "more than 5,055 states, its repetitions written out (use smaller ones), at character 0",
        "((a{99}){99}){99}": "states, its repetitions written out",
        "(a|b)*a(a|b){20}": "states, as what may follow depends on too much",
        r"a\d+": r"\d is not known: write a set such as [0-9], or the character itself, at character 2",
        r"[\w]": r"\w is not known",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            grammar.compile(pattern, SYMBOLS)
    with pytest.raises(ValueError, match="next state 5 does not exist; states are 0 to 1"):
        grammar.automaton([[0, 5], [1, 1]], [False, True])
    with pytest.raises(ValueError, match=r"transitions \(2,\)"):
        grammar.automaton([0, 1], [True])
    with pytest.raises(
        ValueError, match=r"transitions \(0, 3\): it accepts no text; needs at least one state"
    ):
        grammar.automaton(np.zeros((0, 3), int), np.zeros(0, bool))
    with pytest.raises(ValueError, match="it accepts no text; needs at least one state and one token"):
        grammar.compile("a", [])
