"""Rewards of generated text: functions of a :class:`Text`, computed where it is generated.

A *score* is ``Text -> float32 []``; batch with ``vmap``. A :class:`Scorer` rates a whole batch and keeps what evolves:
weighted sums whose parts are normalised as training goes on, and constraints with multipliers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.language import grammar as grammars
from jrl.language import metrics, ngrams
from jrl.normalize import RunningStatistics, init_statistics, update_statistics, variance
from jrl.types import Array, Metrics, PyTree


class Text(NamedTuple):
    """A prompt and what has been generated after it.

    Attributes:
        tokens: int32 ``[L]``, −1 behind the end.
        prompt_length: int32 ``[]``, tokens of the prompt.
        length: int32 ``[]``, tokens in all, the one that ends the text included.
        finished: bool ``[]``, whether it was ended by its own choice (the last token is the end), not by the limit.
        reference: what the task knows about the answer, a pytree; () where nothing.
    """

    tokens: Array
    prompt_length: Array
    length: Array
    finished: Array
    reference: PyTree = ()


class References(NamedTuple):
    """``tokens``: int32 ``[R, M]``; ``length``: int32 ``[R]``, below 0 for a reference that is not there."""

    tokens: Array
    length: Array


Score = Callable[[Text], Array]


def completion(text: Text) -> tuple[Array, Array]:
    """Return what was generated, from its first token on and without the end: int32 ``[L]`` and its length ``[]``."""
    tokens = jnp.roll(text.tokens, -text.prompt_length)
    return tokens, text.length - text.prompt_length - text.finished


# ------------------------------------------------------------------------------------------ against references


def bleu(smoothing: str = "exp", order: int = 4) -> Score:
    """Sentence BLEU of the completion, 0 to 1: :func:`jrl.language.metrics.bleu` with effective order."""

    def score(text: Text) -> Array:
        statistics = metrics.bleu_statistics(*completion(text), *text.reference, order=order)
        return metrics.bleu(statistics, smoothing=smoothing) / 100.0

    return score


def rouge_l(text: Text) -> Array:
    """ROUGE-L's F of the completion, 0 to 1: the best over the references."""
    return _best(text, lambda *pair: metrics.rouge_l(*pair).f)


def exact_match(text: Text) -> Array:
    """1 where the text is finished and its completion one of the references, else 0."""
    return _best(text, metrics.exact_match) * text.finished


def edit_similarity(text: Text) -> Array:
    """``max(0, 1 − edit distance / reference's length)`` of the completion, the best over the references."""
    return _best(text, lambda *pair: jnp.maximum(0.0, 1.0 - metrics.word_error_rate(*pair)))


def edit_similarity_ahead(text: Text) -> Array:
    """Return the largest :func:`edit_similarity` that a continuation of the text can have: its optimal value.

    ``max(0, 1 − min_j d(x, y_1…j) / |y|)``, the best over the references. As a potential (:func:`shaped
    <jrl.language.environments.shaped>`, γ = 1) it pays each token what the token alone has lost: nothing for one that
    a best continuation may have, ``−1 / |y|`` for a mistake.

    Source: Sabour et al. 2019, "Optimal Completion Distillation", https://arxiv.org/abs/1810.01398.
    """

    def ahead(tokens: Array, length: Array, reference: Array, reference_length: Array) -> Array:
        distance = metrics.prefix_distance(tokens, length, reference, reference_length)
        return jnp.maximum(0.0, 1.0 - distance / jnp.maximum(reference_length, 1).astype(jnp.float32))

    return _best(text, ahead)


def _best(text: Text, metric: Callable[..., Array]) -> Array:
    """Return the best ``metric``, at least 0, against the references that are there; 0, as BLEU, where none is."""
    tokens, length = completion(text)
    reference: References = text.reference
    value = jax.vmap(metric, (None, None, 0, 0))(
        tokens, length, reference.tokens, jnp.maximum(reference.length, 0)
    )
    return jnp.where(reference.length >= 0, value, 0.0).max()


# ------------------------------------------------------------------------------------------ without references


def lexicon(weights: Array) -> Score:
    """Mean weight of the completion's tokens, ``Σ_t w(x_t) / n``; ``weights``: float32 ``[V]``. 0 for an empty one."""

    def score(text: Text) -> Array:
        tokens, length = completion(text)
        inside = jnp.arange(tokens.shape[0]) < length
        return jnp.where(inside, weights[jnp.where(inside, tokens, 0)], 0.0).sum() / jnp.maximum(length, 1)

    return score


def distinct(n: int) -> Score:
    """Share of the completion's n-grams that are the first of their kind: 1 without repetition."""
    return lambda text: metrics.distinct_n(*completion(text), n)


def in_grammar(grammar: grammars.Automaton) -> Score:
    """1 where the completion belongs to the grammar, else 0."""
    return lambda text: grammars.accepts(grammar, *completion(text)).astype(jnp.float32)


def fluency(model: ngrams.NgramModel) -> Score:
    """Mean log-probability of the completion's tokens under an n-gram model, with the prompt as context, nats."""
    return lambda text: _mean_over_completion(text, ngrams.log_probs(model, jnp.maximum(text.tokens, 0)))


def likelihood(log_probs: Callable[[Array], Array]) -> Score:
    """Mean log-probability of the completion's tokens under a frozen model; minus its logarithm of perplexity.

    Args:
        log_probs: ``tokens int32 [L] -> float32 [L]``, of each token given those before it; causal, so that the
            padding behind the end (token 0) plays no part. What it is for the first token is not read.
    """
    return lambda text: _mean_over_completion(text, log_probs(jnp.maximum(text.tokens, 0)))


def _mean_over_completion(text: Text, values: Array) -> Array:
    place = jnp.arange(text.tokens.shape[0])
    inside = (place >= jnp.maximum(text.prompt_length, 1)) & (place < text.length - text.finished)
    return jnp.where(inside, values, 0.0).sum() / jnp.maximum(inside.sum(), 1)


# ------------------------------------------------------------------------------------------------- whole batches


class Scorer(NamedTuple):
    """Rates texts with a state of its own.

    Attributes:
        init: ``() -> state``.
        apply: ``(state, Text with leaves [B, ...]) -> (state, score [B], Metrics)``.
    """

    init: Callable[[], PyTree]
    apply: Callable[[PyTree, Text], tuple[PyTree, Array, Metrics]]


def weighted_sum(
    scores: Mapping[str, Score], weights: Mapping[str, float], *, normalize: bool = False
) -> Scorer:
    """``Σ_k w_k s_k``; with ``normalize`` each score is first shifted and scaled by the moments of those seen so far.

    Args:
        scores: by name.
        weights: by the same names.
        normalize: ``(s_k − mean_k) / (std_k + 1e-4)`` over all texts so far, the batch included: weights then mean
            the same whatever a score's unit.

    Raises:
        ValueError: the names differ.
    """
    _same_names("weights", scores, weights)
    factors = jnp.array([weights[name] for name in scores], jnp.float32)

    def apply(state: RunningStatistics, texts: Text) -> tuple[RunningStatistics, Array, Metrics]:
        values = _values(scores, texts)
        report = {f"score/{name}": value.mean() for name, value in zip(scores, values, strict=True)}
        if not normalize:
            return state, factors @ values, report
        state = update_statistics(state, values.T)
        std = jnp.sqrt(variance(state))
        return state, factors @ ((values - state.mean[:, None]) / (std[:, None] + 1e-4)), report

    return Scorer(lambda: init_statistics(jax.ShapeDtypeStruct(factors.shape, jnp.float32)), apply)


def constrained(
    objective: Score,
    constraints: Mapping[str, tuple[Score, float]],
    *,
    step_size: float = 0.05,
    most: float = 100.0,
) -> Scorer:
    """Maximise a score under ``mean c_k ≥ bound_k``, each with a multiplier λ_k ≥ 0 that follows its violation.

    ``s + Σ_k λ_k (c_k − bound_k)``, then ``λ_k ← clip(λ_k + η (bound_k − mean c_k), 0, most)``.

    Source: Tessler et al. 2019, "Reward Constrained Policy Optimization", https://arxiv.org/abs/1805.11074.

    Args:
        objective: what is maximised.
        constraints: name -> (score, bound).
        step_size: η, of the multipliers.
        most: bound of the multipliers; of a constraint that cannot be met they would grow for ever.

    Raises:
        ValueError: no constraint.
    """
    if not constraints:
        raise ValueError(
            "constrained: constraints is empty; name at least one, or use weighted_sum for the objective alone."
        )
    bounds = jnp.array([bound for _, bound in constraints.values()], jnp.float32)
    parts = {name: score for name, (score, _) in constraints.items()}

    def apply(multipliers: Array, texts: Text) -> tuple[Array, Array, Metrics]:
        values, goal = _values(parts, texts), jax.vmap(objective)(texts)
        score = goal + multipliers @ (values - bounds[:, None])
        report = {"score/objective": goal.mean()}
        for k, name in enumerate(parts):
            report |= {f"score/{name}": values[k].mean(), f"multiplier/{name}": multipliers[k]}
        multipliers = jnp.clip(multipliers + step_size * (bounds - values.mean(1)), 0.0, most)
        return multipliers, score, report

    return Scorer(lambda: jnp.zeros(len(parts)), apply)


def _values(scores: Mapping[str, Score], texts: Text) -> Array:
    return jnp.stack([jax.vmap(score)(texts).astype(jnp.float32) for score in scores.values()])


def _same_names(what: str, expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if set(expected) != set(given):
        raise ValueError(
            f"{what} has the names {sorted(given)}, the scores are {sorted(expected)}: they must be the same."
        )
