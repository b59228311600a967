"""Rewards of how a text is spelt, whatever its tokens are: automata over characters, carried over to tokens.

A token is a *piece* of text (:func:`jrl.language.tokenizers.pieces`), and reading it is reading its characters: an
automaton over characters is one over tokens with the same states, whose step is looked up in a table ``[S, V]``. So
words are counted and formats are checked in the compiled program, exactly, by one gather a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.language import grammar as grammars
from jrl.language.rewards import Score, Text
from jrl.types import Array


def compile(pattern: str, pieces: Sequence[str]) -> grammars.Automaton:
    """Compile a regular expression over characters (:func:`jrl.language.grammar.compile`) to one over pieces.

    Args:
        pattern: the expression; a text belongs to it where all of its characters match.
        pieces: the text of each token; the empty one (a special token) belongs nowhere. Where words are tokens each has
            a blank before it, and so has the expression: ``( the)( cat)?``.

    Raises:
        ValueError: a malformed expression, or one that no text of these pieces matches.
    """
    letters = sorted(set("".join(pieces)))
    over_letters = grammars.compile(pattern, letters)
    column, table = {letter: i for i, letter in enumerate(letters)}, np.asarray(over_letters.transitions)
    states = np.full((len(pieces), len(table)), -1)
    for row, piece in zip(states, pieces, strict=True):
        if piece:
            state = np.arange(len(table))
            for letter in piece:
                state = np.where(state >= 0, table[state, column[letter]], -1)
            row[:] = state
    return grammars.automaton(states.T, np.asarray(over_letters.accepting))


class Lexicon(NamedTuple):
    """An automaton that counts words; a pytree.

    Attributes:
        transitions: int32 ``[S, V]``; state 0 is between two words.
        counts: float32 ``[S, V, 2]``, words worth more and less than 0 that end while a token is read.
        last: float32 ``[S, 2]``, likewise, if the text ends here.
    """

    transitions: Array
    counts: Array
    last: Array


def lexicon(worth: Mapping[str, float], pieces: Sequence[str]) -> Lexicon:
    """Make the automaton of a list of words.

    A word is a longest run of letters, digits and apostrophes, upper and lower case alike.

    Args:
        worth: word -> a number above or below 0.
        pieces: the text of each token.

    Raises:
        ValueError: no word, one that is none, one with a character that no token has, or a worth of 0.
    """
    if not worth:
        raise ValueError("a lexicon without words: name some, such as happy=1,sad=-1.")
    known = set("".join(pieces).lower())
    # 0: between words, 1: in a word that is not listed, then the beginnings of those that are
    tree: list[dict[str, int]] = [{}, {}]
    ends: dict[int, float] = {}
    for word, value in worth.items():
        if not word or not all(map(_in_word, word)) or not np.isfinite(value) or value == 0:
            raise ValueError(
                f"{word!r}={value}: expected a word of letters, digits and apostrophes, and a number other than 0."
            )
        missing = [letter for letter in word.lower() if letter not in known]
        if missing:
            raise ValueError(f"the word {word!r} has {missing[0]!r}, which no token of the model spells.")
        state = 0
        for letter in word.lower():
            if letter not in tree[state]:
                tree[state][letter] = len(tree)
                tree.append({})
            state = tree[state][letter]
        ends[state] = float(value)
    states = np.arange(len(tree))
    last = np.zeros((len(tree), 2), np.float32)
    for state, value in ends.items():
        last[state, int(value < 0)] = abs(value)
    transitions = np.zeros((len(pieces), len(tree)), np.int32)
    counts = np.zeros((len(pieces), len(tree), 2), np.float32)
    steps: dict[str, np.ndarray] = {}
    for token, piece in enumerate(pieces):
        at = states
        for letter in piece.lower():
            if _in_word(letter):
                if letter not in steps:
                    steps[letter] = np.array([tree[s].get(letter, 1) for s in states])
                at = steps[letter][at]
            else:
                counts[token] += last[at]
                at = np.zeros_like(at)
        transitions[token] = at
    return Lexicon(jnp.asarray(transitions.T), jnp.asarray(counts.transpose(1, 0, 2)), jnp.asarray(last))


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "'"


def count(words: Lexicon, text: Text) -> Array:
    """Return how much the words that end in the completion are worth, float32 ``[2]``: above and below 0."""

    def read(carry: tuple[Array, Array], x: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (state, total), (token, place) = carry, x
        said = place < text.length - text.finished
        token = jnp.maximum(token, 0)
        total += jnp.where(said & (place >= text.prompt_length), words.counts[state, token], 0.0)
        return (jnp.where(said, words.transitions[state, token], state), total), None

    places = jnp.arange(text.tokens.shape[0])
    (state, total), _ = jax.lax.scan(read, (jnp.int32(0), jnp.zeros(2)), (text.tokens, places))
    return total + jnp.where(text.length - text.finished > text.prompt_length, words.last[state], 0.0)


def polarity(words: Lexicon) -> Score:
    """``(P − N) / (P + N)``, what a text's words are worth above and below 0; 0 where it has none of the lexicon.

    The balance of a dictionary of sentiment (Stone et al., 1966, "The General Inquirer"). Where no bad
    word is said, a good one said twice is worth no more than one said once.
    """

    def score(text: Text) -> Array:
        good, bad = count(words, text)
        return (good - bad) / jnp.maximum(good + bad, 1e-9)

    return score
