"""Rewards by name, as ``--reward`` writes them: ``[WEIGHT*]NAME[:ARGUMENT]``, several of which are added up.

==============  =========================  ====================================================================
name            argument                   what a text earns
==============  =========================  ====================================================================
``ngram``       order, 3                   ``Σ_t (log p(x_t | x_<t) + log V) / T`` under n-grams of the corpus: nats
                                           above guessing; ``log p`` at least -20
``repetition``  n, 3                       n-grams of the text that it has said before, over ``T``
``lexicon``     ``happy,joy=2,sad=-1``     balance of good and bad words, -1 to 1
``format``      regular expression         1 where the whole text matches, else 0
``likelihood``                             mean log-probability of its tokens under the frozen model, nats
``length``      n                          ``max(0, 1 − |tokens − n| / n)``
``finished``                               1 where it ended itself, 0 where the limit cut it
==============  =========================  ====================================================================

``T`` is the most tokens that a text may have. The first two are paid token by token as they are earned, the others at
the end. A text is what follows the prompt, with the blank before its first word where words are tokens: such a text
matches ``format:( the| cat)+``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.language import ngrams, rewards, spelling
from jrl.language.environments import Rating, TokenReward
from jrl.language.rewards import Score, Text, completion
from jrl.types import Array, PyTree

NAMES = ("ngram", "repetition", "lexicon", "format", "likelihood", "length", "finished")
_FORM = re.compile(r"\s*(?:([-+]?[\d.]+(?:[eE][-+]?\d+)?)\*)?([a-z]+)(?::(.*))?", re.DOTALL)


class Spec(NamedTuple):
    """One of ``--reward``: ``weight · name(argument)``."""

    weight: float
    name: str
    argument: str


class Source(NamedTuple):
    """What rewards are made of.

    Attributes:
        pieces: the text of each token, ``V`` of them.
        max_new_tokens: ``T``.
        corpus: ``() -> tokens`` of the corpus, int ``[M]``.
        log_probs: ``tokens int32 [L] -> float32 [L]`` of the frozen model, or None.
    """

    pieces: Sequence[str]
    max_new_tokens: int
    corpus: Callable[[], np.ndarray]
    log_probs: Callable[[Array], Array] | None


def parse(text: str) -> Spec:
    """Read ``[WEIGHT*]NAME[:ARGUMENT]``.

    Raises:
        ValueError: it is none, its weight is no finite number, or there is no such reward.
    """
    found = _FORM.fullmatch(text)
    try:
        weight = float(found[1] or 1.0) if found else math.nan
    except ValueError:
        weight = math.nan
    if not found or found[2] not in NAMES or not math.isfinite(weight):
        raise ValueError(
            f"--reward {text}: expected [WEIGHT*]NAME[:ARGUMENT] with a finite number as weight, such as "
            f"lexicon:happy,sad=-1 or -0.5*repetition:3. Names: {', '.join(NAMES)}."
        )
    return Spec(weight, found[2], found[3] or "")


def build(specs: Sequence[str], source: Source) -> tuple[TokenReward, Rating]:
    """Return what is paid at every token, and the rating of whole texts.

    Args:
        specs: as ``--reward`` has them, at least one.
        source: what they are made of.

    Raises:
        ValueError: an unknown reward, an argument that it refuses, or the same one twice.
    """
    scores: dict[str, Score] = {}
    weights, dense, given = {}, [], []
    for text in specs:
        spec = parse(text)
        name = spec.name if spec.name not in scores else f"{spec.name}:{spec.argument}"
        if spec[1:] in given:
            raise ValueError(f"--reward {text}: given twice.")
        try:
            score, per_token = _make(spec, source)
        except ValueError as error:
            raise ValueError(f"--reward {text}: {error}") from error
        given.append(spec[1:])
        scores[name], weights[name] = score, spec.weight if per_token is None else 0.0
        if per_token is not None:
            dense.append((spec.weight, per_token))

    def step(carry: PyTree, text: Text, over: Array) -> tuple[PyTree, Array, Array]:
        total = sum((weight * earn(text) for weight, earn in dense), jnp.float32(0.0))
        return carry, jnp.asarray(total, jnp.float32), jnp.bool_(False)

    if not scores:
        raise ValueError("no reward: pass at least one, such as ngram:3.")
    return TokenReward(lambda text: (), step), Rating(scores, weights)


def _make(spec: Spec, source: Source) -> tuple[Score, Score | None]:
    """Return a score of whole texts and, where it is paid token by token, what the last token of a text earns."""
    most, size = source.max_new_tokens, len(source.pieces)
    if spec.name in ("likelihood", "finished") and spec.argument:
        raise ValueError(f"{spec.name} has no argument: leave :{spec.argument} out.")
    match spec.name:
        case "ngram":
            model = ngrams.fit([source.corpus().tolist()], size, _number(spec, 3))
            return fluency(model, most), lambda text: last_fluency(model, text, most)
        case "repetition":
            n = _number(spec, 3)
            return lambda text: repeated(text, n) / most, lambda text: last_is_repeated(text, n) / most
        case "lexicon":
            return spelling.polarity(spelling.lexicon(_words(spec.argument), source.pieces)), None
        case "format":
            return rewards.in_grammar(spelling.compile(spec.argument, source.pieces)), None
        case "likelihood":
            if source.log_probs is None:
                raise ValueError("there is no frozen model: pass --model.")
            return rewards.likelihood(source.log_probs), None
        case "length":
            n = _number(spec, 0)
            return lambda text: jnp.maximum(0.0, 1.0 - jnp.abs(completion(text)[1] - n) / n), None
    return lambda text: text.finished.astype(jnp.float32), None


def _number(spec: Spec, default: int) -> int:
    text = spec.argument or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{spec.name}:{spec.argument}: needs a whole number of at least 1 after the colon.")
    return int(text)


def _words(argument: str) -> dict[str, float]:
    words: dict[str, float] = {}
    for item in argument.split(","):
        word, equals, worth = item.strip().partition("=")
        if word.lower() in map(str.lower, words):
            raise ValueError(f"the word {word!r} is listed twice, upper and lower case alike; keep one.")
        try:
            words[word] = float(worth) if equals else 1.0
        except ValueError:
            raise ValueError(f"{item!r}: expected WORD or WORD=NUMBER.") from None
    return words


def fluency(model: ngrams.NgramModel, most: int) -> Score:
    """``Σ_t (log p(x_t | x_<t) + log V) / T`` of the completion, the prompt its context."""

    def score(text: Text) -> Array:
        earned = _above_guessing(model, ngrams.log_probs(model, jnp.maximum(text.tokens, 0)))
        place = jnp.arange(text.tokens.shape[0])
        inside = (place >= text.prompt_length) & (place < text.length - text.finished)
        return jnp.where(inside, earned, 0.0).sum() / most

    return score


def last_fluency(model: ngrams.NgramModel, text: Text, most: int) -> Array:
    """What the last token adds to :func:`fluency`."""
    log_p = ngrams.last_log_prob(model, jnp.maximum(text.tokens, 0), text.length)
    return jnp.where(text.finished, 0.0, _above_guessing(model, log_p)) / most


def _above_guessing(model: ngrams.NgramModel, log_p: Array) -> Array:
    return jnp.maximum(log_p, -20.0) + jnp.log(model.unigram.shape[0])


def repeated(text: Text, n: int) -> Array:
    """Return how many n-grams of the completion have been there before."""
    tokens, length = completion(text)
    places = jnp.arange(tokens.shape[0])
    return jax.vmap(lambda end: _seen(tokens, n, 0, end) & (end < length))(places).sum()


def last_is_repeated(text: Text, n: int) -> Array:
    """Return whether the n-gram that the last token ends has been there before, bool ``[]``."""
    return _seen(text.tokens, n, text.prompt_length, text.length - 1) & ~text.finished


def _seen(tokens: Array, n: int, first: Array | int, end: Array) -> Array:
    """Whether the n-gram that ends at ``end`` also ends earlier, both within ``[first, end]``."""
    ends = jnp.arange(tokens.shape[0])
    same = jnp.stack([jnp.roll(tokens, k) == tokens[jnp.maximum(end - k, 0)] for k in range(n)]).all(0)
    return (same & (ends < end) & (ends - n + 1 >= first)).any()
