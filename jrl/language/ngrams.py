"""An n-gram language model with interpolated Kneser-Ney smoothing: fitted on the host, read in the compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jrl.types import Array

_MAX_KEY = 2**32 - 1


class Order(NamedTuple):
    """The n-grams of one length above 1, sorted by key.

    Attributes:
        key: uint32 ``[G]``, ``place of the context among the shorter n-grams · V + token``.
        discounted: float32 ``[G]``, ``max(c − D, 0)`` over the context's total.
        backoff: float32 ``[contexts]``, what a context leaves to the shorter model; 1 where nothing followed it.
    """

    key: Array
    discounted: Array
    backoff: Array


class NgramModel(NamedTuple):
    """``unigram``: float32 ``[V]``, probabilities; ``orders``: those of 2 tokens, 3 tokens …. A pytree."""

    unigram: Array
    orders: tuple[Order, ...]


def fit(texts: Sequence[Sequence[int]], vocab_size: int, order: int = 3) -> NgramModel:
    """Count the n-grams of texts and smooth them.

    ``p_n(w | h) = max(c(h w) − D_n, 0) / c(h ·) + D_n N₁₊(h ·) / c(h ·) p_{n−1}(w | h')``, ``h'`` without its first
    token; ``c`` counts occurrences at the highest order and distinct tokens before the n-gram at lower ones;
    ``D_n = n₁ / (n₁ + 2 n₂)`` of the counts of each order; the unigrams leave their share to the uniform distribution.

    Source: Chen and Goodman 1999, "An Empirical Study of Smoothing Techniques for Language Modeling",
    https://doi.org/10.1006/csla.1999.0128 (interpolated, one discount an order). No symbol for a text's start is
    added: the first tokens of a text are predicted by the shorter models. Add one to the texts to change that. Orders
    longer than every text are left out.

    Args:
        texts: token ids of each text.
        vocab_size: ``V``.
        order: the longest n-gram.

    Raises:
        ValueError: a token outside the vocabulary, no token at all, or too many n-grams for 32-bit keys.
    """
    if order < 1:
        raise ValueError(f"fit(order={order}): must be at least 1.")
    arrays = [np.asarray(text, np.int64) for text in texts]
    flat = np.concatenate([*arrays, np.zeros(0, np.int64)])
    if not flat.size:
        raise ValueError("fit: the texts hold no token.")
    wrong = flat[(flat < 0) | (flat >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"fit: token {wrong[0]} is outside the vocabulary of {vocab_size} tokens, 0 to {vocab_size - 1}."
        )
    start = np.concatenate([np.arange(len(text)) for text in arrays])  # places since the text began

    # node[t]: place, among the n-grams of this length, of the one that ends at t.
    node, grams = flat, [np.arange(vocab_size)]
    ends: list[
        tuple[np.ndarray, np.ndarray]
    ] = []  # (n-gram, the one without its first token), each distinct once
    shorter, counts = node, np.bincount(flat, minlength=vocab_size)
    for n in range(2, order + 1):
        at = np.flatnonzero(start >= n - 1)
        if not at.size:
            order = n - 1
            break
        if len(grams[-1]) * vocab_size > _MAX_KEY:
            raise ValueError(
                f"fit: {len(grams[-1])} n-grams of {n - 1} tokens times {vocab_size} tokens exceed 32 bits; use "
                f"order={n - 1}, or a smaller vocabulary."
            )
        key = node[at - 1] * vocab_size + flat[at]
        unique, place, counts = np.unique(key, return_inverse=True, return_counts=True)
        suffix = np.empty(len(unique), np.int64)
        suffix[place] = shorter[at]
        ends.append((np.arange(len(unique)), suffix))
        longer = np.zeros_like(node)
        longer[at] = place
        node = shorter = longer
        grams.append(unique)

    # Counts of each order: occurrences at the top, distinct predecessors below.
    by_order = [np.bincount(suffix, minlength=len(g)) for (_, suffix), g in zip(ends, grams, strict=False)]
    by_order.append(counts)
    orders = []
    for n in range(1, order + 1):
        count = by_order[n - 1].astype(np.float64)
        context = grams[n - 1] // vocab_size if n > 1 else np.zeros(vocab_size, np.int64)
        contexts = len(grams[n - 2]) if n > 1 else 1
        ones, twos = (count == 1).sum(), (count == 2).sum()
        discount = ones / (ones + 2 * twos) if ones else 0.0
        total = np.bincount(context, count, contexts)
        kinds = np.bincount(context, discount * (count > 0), contexts)
        safe = np.maximum(total, 1.0)
        discounted = np.maximum(count - discount, 0.0) / safe[context]
        backoff = np.where(total > 0, kinds / safe, 1.0)
        orders.append((grams[n - 1], discounted, backoff))
    (_, unigram, left), *longer_orders = orders
    return NgramModel(
        jnp.asarray(unigram + left[0] / vocab_size, jnp.float32),
        tuple(
            Order(jnp.asarray(key, jnp.uint32), jnp.asarray(p, jnp.float32), jnp.asarray(b, jnp.float32))
            for key, p, b in longer_orders
        ),
    )


def log_probs(model: NgramModel, tokens: Array) -> Array:
    """Log-probability of each token given those before it, in nats.

    Args:
        model: from :func:`fit`.
        tokens: int32 ``[..., L]``.

    Returns:
        float32 ``[..., L]``; −inf for a token that the corpus never had and for which no mass was left.
    """
    return _log_probs(model, tokens, jnp.ones(tokens.shape, bool))


def last_log_prob(model: NgramModel, tokens: Array, length: Array) -> Array:
    """Return the log-probability of the last of the first ``length`` tokens ``[L]`` given those before it, ``[]``."""
    context = len(model.orders)
    index = length - 1 - context + jnp.arange(context + 1)
    return _log_probs(model, tokens[jnp.maximum(index, 0)], index >= 0)[-1]


def next_log_probs(model: NgramModel, tokens: Array, length: Array) -> Array:
    """Log-probabilities of every token that may follow the first ``length`` ones, in nats.

    Args:
        model: from :func:`fit`.
        tokens: int32 ``[L]``, with ``L`` at least the order less one.
        length: int32 ``[]``.

    Returns:
        float32 ``[V]``.
    """
    vocab_size, context = model.unigram.shape[0], len(model.orders)
    index = length - context + jnp.arange(context)
    window = jnp.broadcast_to(tokens[jnp.maximum(index, 0)], (vocab_size, context))
    windows = jnp.concatenate([window, jnp.arange(vocab_size)[:, None]], axis=1).astype(jnp.int32)
    # What lies before the text's start is no context.
    real = jnp.broadcast_to(jnp.append(index >= 0, True), windows.shape)
    return _log_probs(model, windows, real)[:, -1]


def _log_probs(model: NgramModel, tokens: Array, real: Array) -> Array:
    vocab_size = model.unigram.shape[0]
    probability = model.unigram[jnp.clip(tokens, 0, vocab_size - 1)]
    node, known = tokens.astype(jnp.int32), real
    for order in model.orders:
        # The context of the n-gram that ends here is the shorter one that ended a token earlier.
        has_context = jnp.roll(known, 1, -1).at[..., 0].set(False)
        context = jnp.where(has_context, jnp.roll(node, 1, -1), 0)
        key = context.astype(jnp.uint32) * vocab_size + tokens.astype(jnp.uint32)
        node = jnp.minimum(jnp.searchsorted(order.key, key), order.key.shape[0] - 1).astype(jnp.int32)
        known = has_context & (order.key[node] == key)
        longer = jnp.where(known, order.discounted[node], 0.0) + order.backoff[context] * probability
        probability = jnp.where(has_context, longer, probability)
    return jnp.log(probability)
