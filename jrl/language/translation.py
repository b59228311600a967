"""Translation: a prompt is a source, what is said after it is compared with its references.

Supervised first, by :mod:`jrl.language.pretraining` on rows of :func:`jrl.language.data.prompted`, then reinforcement
learning on the metric itself from there::

    env = translation.environment(pairs, vocab_size=70, separator=68, eos=69)
    algo = grpo.make(env, grpo.Config(cache=True), model=models.from_transformer(env, decoder, params))
    texts = translation.translate(state.params, decoder, held_out)
    print(translation.error_rate(texts, held_out))

Source of learning on the metric: Ranzato et al. 2016, "Sequence Level Training with Recurrent Neural Networks",
https://arxiv.org/abs/1511.06732.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jrl.language import generation, metrics, rewards
from jrl.language.environments import Prompts, at_end, shaped, token_mdp, token_step
from jrl.language.generation import Generated
from jrl.language.rewards import References, Score
from jrl.networks import transformer
from jrl.types import Array, Environment, Params

Pairs = Mapping[tuple[int, ...], Sequence[Sequence[int]]]
"""Tokens of a source -> tokens of its references."""


def group(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[tuple[int, ...], list[list[int]]]:
    """Return the distinct references of each source; equal sources are one, so that no split can part them."""
    grouped: dict[tuple[int, ...], list[list[int]]] = {}
    for source, target in pairs:
        known = grouped.setdefault(tuple(source), [])
        if list(target) not in known:
            known.append(list(target))
    return grouped


def environment(
    pairs: Pairs,
    *,
    vocab_size: int,
    separator: int,
    eos: int,
    score: Score = rewards.edit_similarity,
    potential: Score | None = None,
    max_new_tokens: int | None = None,
    name: str = "Translation",
) -> Environment:
    """Make a token environment whose prompts are sources and a separator, and whose reward is a metric at the end.

    Args:
        pairs: see :data:`Pairs`.
        vocab_size: tokens of both sides, with the separator and the end.
        separator: put after each source.
        eos: ends a translation.
        score: of the whole text, whose ``reference`` is a :class:`~jrl.language.rewards.References`.
        potential: Φ of the text so far, added as ``Φ(s') − Φ(s)``: it pays each token at once, and for a learner with
            γ = 1 leaves the ranks as they are (:func:`~jrl.language.environments.shaped`). For edit_similarity its own
            optimal value, :func:`~jrl.language.rewards.edit_similarity_ahead`, with which a learner may have γ = 0.
        max_new_tokens: None is the longest reference and its end.
        name: for messages and records.

    Raises:
        ValueError: no pair, a source without a reference, one that cannot be said, or as
            :func:`~jrl.language.environments.token_mdp`.
    """
    if not pairs or not all(pairs.values()):
        raise ValueError(
            f"{name}: {len(pairs)} sources, each of which needs a reference: there is nothing to say."
        )
    if separator == eos:
        raise ValueError(f"{name}: separator={separator} is the end, eos, too: use two tokens.")
    for source, targets in pairs.items():
        for token in (token for target in targets for token in target):
            if not 0 <= token < vocab_size or token == eos:
                what = "the end, which is put behind it" if token == eos else f"none of {vocab_size} tokens"
                raise ValueError(
                    f"{name}: a reference of {source} has token {token}, {what}: it could not be said."
                )
    sources = [[*source, separator] for source in pairs]
    tokens, lengths = _table(sources)
    most = max(map(len, pairs.values()))
    longest = max(len(target) for targets in pairs.values() for target in targets)
    references = np.zeros((len(pairs), most, longest), np.int32)
    reference_lengths = np.full((len(pairs), most), -1, np.int32)
    for i, targets in enumerate(pairs.values()):
        for j, target in enumerate(targets):
            references[i, j, : len(target)] = target
            reference_lengths[i, j] = len(target)
    return token_mdp(
        Prompts(tokens, lengths, References(jnp.asarray(references), jnp.asarray(reference_lengths))),
        at_end(score) if potential is None else shaped(at_end(score), potential, 1.0),
        vocab_size=vocab_size,
        max_new_tokens=max_new_tokens or longest + 1,
        eos=eos,
        at_limit="terminate",
        name=name,
    )


def _table(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows])
    table = np.zeros((len(rows), lengths.max()), np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table, lengths


def translate(
    params: Params, config: transformer.Config, env: Environment, *, num_slots: int = 256
) -> Generated:
    """Return what the decoder says greedily after every prompt of ``env``, in their order."""
    spec = token_step(env, "translate")
    assert spec.eos is not None
    settings = generation.Settings(
        max_new_tokens=spec.max_new_tokens, end_token=spec.eos, num_slots=num_slots, greedy=True
    )
    prompts, lengths = jnp.asarray(spec.prompts.tokens), jnp.asarray(spec.prompts.length)
    return _translate(params, config, prompts, lengths, settings)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _translate(
    params: Params, config: transformer.Config, prompts: Array, lengths: Array, settings: generation.Settings
) -> Generated:
    return generation.generate(jax.random.key(0), params, config, prompts, lengths, settings)


def error_rate(texts: Generated, env: Environment) -> tuple[float, float]:
    """Return the error rate of the corpus and the share of texts that are one of their references.

    ``Σ_i min_r d(x_i, r) / Σ_i |r_i|``, ``d`` the edit distance and ``r_i`` the reference nearest to text ``i``.
    """
    references: References = token_step(env, "error_rate").prompts.reference
    there = references.length >= 0
    length = jnp.maximum(references.length, 0)
    distance = jax.vmap(metrics.edit_distance, (None, None, 1, 1), 1)(
        texts.tokens, _said(texts), references.tokens, length
    )
    nearest = jnp.where(there, distance, jnp.iinfo(jnp.int32).max).argmin(1)[:, None]
    distance, length = (jnp.take_along_axis(x, nearest, 1)[:, 0] for x in (distance, length))
    exact = (distance == 0) & texts.finished
    return float(distance.sum() / jnp.maximum(length.sum(), 1)), float(exact.mean())


def bleu(texts: Generated, env: Environment) -> float:
    """Return the BLEU of the corpus, 0 to 100, its tokens taken for words: :func:`jrl.language.metrics.bleu`."""
    references: References = token_step(env, "bleu").prompts.reference
    statistics = metrics.bleu_statistics(texts.tokens, _said(texts), references.tokens, references.length)
    total = jax.tree.map(lambda leaf: leaf.sum(0), statistics)
    return float(metrics.bleu(total, effective_order=False))


def _said(texts: Generated) -> Array:
    """Return the lengths without the token that ends a text."""
    return texts.length - texts.finished
