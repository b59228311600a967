"""Metrics of token sequences inside the compiled program: BLEU, ROUGE-L, edit distance, exact match, distinct-n.

A text is ``tokens`` int32 ``[..., L]`` with ``length`` int32 ``[...]``; what lies behind the length is ignored.
``R`` is the number of references of one text. All leading axes are batch. The last axis within is the batch, so
that a loop over positions is vector arithmetic over texts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.types import Array

SMOOTHING = ("exp", "none", "floor", "add-k")
_BITS = 8  # of a packed count of one order; sums are taken over at most 2^8 − 1 places at once


class BleuStatistics(NamedTuple):
    """What BLEU is computed from; those of a corpus are the sums over its texts.

    Attributes:
        matches: float32 ``[..., order]``, n-grams that the references have too, clipped.
        totals: float32 ``[..., order]``, n-grams of the text.
        length: float32 ``[...]``, tokens of the text.
        reference_length: float32 ``[...]``, tokens of the reference nearest in length, the shorter of two.
    """

    matches: Array
    totals: Array
    length: Array
    reference_length: Array


def bleu_statistics(
    tokens: Array, length: Array, references: Array, reference_lengths: Array, *, order: int = 4
) -> BleuStatistics:
    """Count the n-grams that texts share with their references.

    ``matches_n = Σ_g min(count(g), max_r count_r(g))`` over the distinct n-grams ``g`` of the text.

    Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation",
    https://aclanthology.org/P02-1040.

    Args:
        tokens: int32 ``[..., L]``.
        length: int32 ``[...]``.
        references: int32 ``[..., R, M]``.
        reference_lengths: int32 ``[..., R]``; below 0 where a text has fewer than ``R`` references.
        order: the longest n-gram, static, 1 to 4.

    Raises:
        ValueError: ``order`` is out of range, or the leading axes differ.
    """
    if not 1 <= order <= 32 // _BITS:
        raise ValueError(f"bleu_statistics(order={order}): must be 1 to {32 // _BITS}.")
    batch = tokens.shape[:-1]
    if (
        references.shape[:-2] != batch
        or length.shape != batch
        or reference_lengths.shape != references.shape[:-1]
    ):
        raise ValueError(
            f"bleu_statistics: tokens {tokens.shape} with length {length.shape}, references {references.shape} with "
            f"reference_lengths {reference_lengths.shape}: expected [..., L], [...], [..., R, M] and [..., R]."
        )
    tokens, references = _with_room(tokens), _with_room(references)
    size, count, longest = tokens.shape[-1], *references.shape[-2:]
    # What is behind a text's end equals nothing, not even itself.
    text = _fenced(tokens.reshape(-1, size), length.reshape(-1), -1).T
    others = _fenced(references.reshape(-1, count, longest), reference_lengths.reshape(-1, count), -2)
    others = others.transpose(1, 2, 0)

    def runs(run: Array, equal: Array) -> Array:
        # One bit field for each order: set where the last 1, 2 … tokens agree. Shifting drops what is too long.
        before = jnp.pad(run[..., :-1, :], [(0, 0)] * (run.ndim - 2) + [(1, 0), (0, 0)])
        return jnp.where(equal, before << _BITS | jnp.uint32(1), jnp.uint32(0))

    def place(
        carry: tuple[Array, Array, Array], x: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        own, other, matches = carry
        token, i = x
        own = runs(own, (text == token) & (jnp.arange(size)[:, None] <= i))
        other = runs(other, others == token)
        # The k-th occurrence of an n-gram is matched if a reference has it k times.
        rank, available = _unpack(own, order), _unpack(other, order).max(1)
        return (own, other, matches + ((rank > 0) & (rank <= available))), None

    start = (
        jnp.zeros(text.shape, jnp.uint32),
        jnp.zeros(others.shape, jnp.uint32),
        jnp.zeros((order, text.shape[1]), jnp.int32),
    )
    (_, _, matches), _ = jax.lax.scan(place, start, (text, jnp.arange(size)))
    length = length.astype(jnp.float32)
    totals = jnp.maximum(length[..., None] - jnp.arange(order), 0.0)
    difference = jnp.where(reference_lengths < 0, jnp.inf, jnp.abs(reference_lengths - length[..., None]))
    nearest = difference == difference.min(-1, keepdims=True)
    reference_length = jnp.where(nearest, reference_lengths, jnp.iinfo(jnp.int32).max).min(-1)
    return BleuStatistics(
        matches.T.reshape(*batch, order).astype(jnp.float32),
        totals,
        length,
        reference_length.astype(jnp.float32),
    )


def _unpack(run: Array, order: int) -> Array:
    """Return how often each order agrees, int32 ``[order, ..., N]``, of packed runs ``[..., M, N]``."""
    most = 2**_BITS - 1
    counts = []
    for start in range(0, run.shape[-2], most):  # one round unless texts are longer than 255
        packed = run[..., start : start + most, :].sum(-2, dtype=jnp.uint32)
        counts.append(jnp.stack([(packed >> (_BITS * n)) & most for n in range(order)]).astype(jnp.int32))
    return sum(counts[1:], counts[0])


def bleu(
    statistics: BleuStatistics,
    *,
    smoothing: str = "exp",
    smoothing_value: Array | float | None = None,
    effective_order: bool = True,
) -> Array:
    """BLEU of texts, or of a corpus (the statistics summed first, ``effective_order=False``), 0 to 100.

    ``BP · exp(mean_n log p_n)``, ``p_n = 100 matches_n / totals_n``, ``BP = min(1, exp(1 − r / c))``. Where
    ``matches_n = 0``: ``exp`` takes ``p_n = 100 / (2^k totals_n)`` for the k-th such order, ``floor`` takes
    ``100 value / totals_n`` (0.1), ``add-k`` adds ``value`` (1) to both counts of orders above 1, ``none`` gives 0.

    Source: as :func:`bleu_statistics`; Chen and Cherry 2014, "A Systematic Comparison of Smoothing Techniques",
    https://aclanthology.org/W14-3346; Post 2018, "A Call for Clarity in Reporting BLEU Scores",
    https://arxiv.org/abs/1804.08771 (whose numbers these are).

    Args:
        statistics: from :func:`bleu_statistics`.
        smoothing: one of :data:`SMOOTHING`, static.
        smoothing_value: of ``floor`` and ``add-k``; None means their defaults.
        effective_order: average over the orders that the text is long enough for, instead of over all.

    Returns:
        float32 ``[...]``.

    Raises:
        ValueError: an unknown smoothing.
    """
    if smoothing not in SMOOTHING:
        raise ValueError(f"smoothing={smoothing!r}: must be one of {', '.join(SMOOTHING)}.")
    matches, totals, length, reference_length = statistics
    orders = jnp.arange(matches.shape[-1])
    value = {"floor": 0.1, "add-k": 1.0}.get(smoothing, 0.0) if smoothing_value is None else smoothing_value
    counted, of = matches, totals
    if smoothing == "add-k":
        counted, of = matches + value * (orders > 0), totals + value * (orders > 0)
    possible = jnp.cumprod(of > 0, axis=-1) > 0
    none = (counted == 0) & possible
    if smoothing == "exp":
        counted = jnp.where(none, 0.5 ** jnp.cumsum(none, axis=-1), counted)
    elif smoothing == "floor":
        counted = jnp.where(none, value, counted)
    precision = counted / jnp.where(possible, of, 1.0)
    zero = (possible & (precision == 0)).any(-1) | (matches.sum(-1) == 0)
    if not effective_order:
        zero |= ~possible.all(-1)
    averaged = possible if effective_order else jnp.ones_like(possible)
    log_precision = jnp.where(
        possible & (precision > 0), jnp.log(jnp.where(precision > 0, precision, 1.0)), 0.0
    )
    mean = log_precision.sum(-1) / jnp.maximum(averaged.sum(-1), 1)
    brevity = jnp.minimum(0.0, 1.0 - reference_length / jnp.maximum(length, 1.0))
    return jnp.where(zero | (length == 0), 0.0, 100.0 * jnp.exp(mean + brevity))


class Rouge(NamedTuple):
    """``precision``, ``recall`` and their harmonic mean ``f``, float32 ``[...]``."""

    precision: Array
    recall: Array
    f: Array


def rouge_l(tokens: Array, length: Array, reference: Array, reference_length: Array) -> Rouge:
    """ROUGE-L of texts: the longest common subsequence against either length.

    ``P = lcs / c``, ``R = lcs / r``, ``F = 2 P R / (P + R)``; all 0 where one text is empty.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries",
    https://aclanthology.org/W04-1013. With several references take the maximum of each.

    Args:
        tokens: int32 ``[..., L]``.
        length: int32 ``[...]``.
        reference: int32 ``[..., M]``.
        reference_length: int32 ``[...]``.
    """
    common = longest_common_subsequence(tokens, length, reference, reference_length).astype(jnp.float32)
    precision, recall = common / jnp.maximum(length, 1), common / jnp.maximum(reference_length, 1)
    both = precision + recall
    return Rouge(
        precision, recall, jnp.where(both > 0, 2 * precision * recall / jnp.where(both > 0, both, 1.0), 0.0)
    )


def longest_common_subsequence(
    tokens: Array, length: Array, reference: Array, reference_length: Array
) -> Array:
    """Length of the longest sequence that both texts contain in order, int32 ``[...]``.

    ``c(i, j) = max(c(i − 1, j), c(i, j − 1), c(i − 1, j − 1) + [x_i = y_j])``, a row at a time: a row never falls,
    so that the dependence on ``j − 1`` is a running maximum.

    Source: Wagner and Fischer 1974, https://doi.org/10.1145/321796.321811.
    """
    text, other, batch = _pair(tokens, length, reference, reference_length)

    def row(above: Array, token: Array) -> tuple[Array, None]:
        diagonal = jnp.pad(above[:-1], ((1, 0), (0, 0))) + (other == token)
        return jax.lax.cummax(jnp.maximum(above, diagonal)), None

    last, _ = jax.lax.scan(row, jnp.zeros(other.shape, jnp.int32), text)
    return last[-1].reshape(batch)


def edit_distance(tokens: Array, length: Array, reference: Array, reference_length: Array) -> Array:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions, int32 ``[...]``.

    ``d(i, j) = min(d(i − 1, j) + 1, d(i, j − 1) + 1, d(i − 1, j − 1) + [x_i ≠ y_j])``, a row at a time: less ``j``
    the dependence on ``j − 1`` is a running minimum.

    Source: Wagner and Fischer 1974, https://doi.org/10.1145/321796.321811. The word error rate is this over the
    reference's length, summed over a corpus before it is divided.

    Args:
        tokens: int32 ``[..., L]``.
        length: int32 ``[...]``.
        reference: int32 ``[..., M]``.
        reference_length: int32 ``[...]``.
    """
    last, batch = _distances(tokens, length, reference, reference_length)
    return jnp.take_along_axis(last, reference_length.reshape(1, -1), axis=0)[0].reshape(batch)


def prefix_distance(tokens: Array, length: Array, reference: Array, reference_length: Array) -> Array:
    """The :func:`edit_distance` that the best continuation of a text leaves, ``min_j d(x, y_1…j)``, int32 ``[...]``.

    Source: Sabour et al. 2019, "Optimal Completion Distillation", https://arxiv.org/abs/1810.01398. Arguments as in
    :func:`edit_distance`.
    """
    last, batch = _distances(tokens, length, reference, reference_length)
    there = jnp.arange(last.shape[0])[:, None] <= reference_length.reshape(1, -1)
    return jnp.where(there, last, last.shape[0] + tokens.shape[-1]).min(0).reshape(batch)


def _distances(
    tokens: Array, length: Array, reference: Array, reference_length: Array
) -> tuple[Array, tuple[int, ...]]:
    """Return the distances between the whole text and every prefix of the reference, ``[M + 1, N]``, and the batch."""
    text, other, batch = _pair(tokens, length, reference, reference_length)
    columns = jnp.arange(other.shape[0] + 1)[:, None]

    def row(above: Array, x: tuple[Array, Array]) -> tuple[Array, None]:
        token, i = x
        best = jnp.minimum(above[1:] + 1, above[:-1] + (other != token))
        best = jnp.concatenate([jnp.broadcast_to(i + 1, best[:1].shape), best])
        return jnp.where(i < length.reshape(-1), jax.lax.cummin(best - columns) + columns, above), None

    start = jnp.broadcast_to(columns, (columns.shape[0], text.shape[1]))
    return jax.lax.scan(row, start, (text, jnp.arange(text.shape[0])))[0], batch


def word_error_rate(tokens: Array, length: Array, reference: Array, reference_length: Array) -> Array:
    """:func:`edit_distance` per token of the reference, float32 ``[...]``; an empty reference counts as one token."""
    distance = edit_distance(tokens, length, reference, reference_length)
    return distance / jnp.maximum(reference_length, 1).astype(jnp.float32)


def exact_match(tokens: Array, length: Array, reference: Array, reference_length: Array) -> Array:
    """1 where both texts are the same, else 0: float32 ``[...]``; arguments as in :func:`edit_distance`."""
    size = max(tokens.shape[-1], reference.shape[-1])

    def fenced(x: Array, n: Array) -> Array:
        return jnp.pad(
            _fenced(x, n, -1), [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])], constant_values=-1
        )

    return (fenced(tokens, length) == fenced(reference, reference_length)).all(-1).astype(jnp.float32)


def distinct_n(tokens: Array, length: Array, n: int) -> Array:
    """Share of n-grams that are the first of their kind, float32 ``[...]``; 1 for a text that has none.

    ``|{g}| / max(length − n + 1, 1)``. One less it is the share of repetitions.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
    https://arxiv.org/abs/1510.03055 (there over a corpus).

    Args:
        tokens: int32 ``[..., L]``.
        length: int32 ``[...]``.
        n: static, 1 to ``L``.

    Raises:
        ValueError: ``n`` is out of range.
    """
    size = tokens.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"distinct_n(n={n}): texts of at most {size} tokens have n-grams of 1 to {size}.")
    places = size - n + 1
    grams = jnp.stack([tokens[..., k : k + places] for k in range(n)], axis=-1)
    same = (grams[..., :, None, :] == grams[..., None, :, :]).all(-1)
    earlier = jnp.tril(jnp.ones((places, places), bool), -1)
    exists = jnp.arange(places) <= length[..., None] - n
    first = exists & ~(same & earlier).any(-1)
    total = exists.sum(-1)
    return jnp.where(total > 0, first.sum(-1) / jnp.maximum(total, 1).astype(jnp.float32), 1.0)


def _fenced(tokens: Array, length: Array, fence: int) -> Array:
    return jnp.where(jnp.arange(tokens.shape[-1]) < length[..., None], tokens, fence)


def _with_room(x: Array) -> Array:
    """Return ``x`` itself, or one place of padding where it has room for no token at all."""
    return x if x.shape[-1] else jnp.zeros((*x.shape[:-1], 1), jnp.int32)


def _pair(
    tokens: Array, length: Array, reference: Array, reference_length: Array
) -> tuple[Array, Array, tuple[int, ...]]:
    """Return text ``[L, N]`` and reference ``[M, N]``, whose padding equals nothing, and the batch's shape."""
    batch = tokens.shape[:-1]
    if not reference.shape[:-1] == length.shape == reference_length.shape == batch:
        raise ValueError(
            f"tokens {tokens.shape} with length {length.shape}, reference {reference.shape} with reference_length "
            f"{reference_length.shape}: expected [..., L], [...], [..., M] and [...] of the same leading axes."
        )

    def columns(x: Array, length: Array, fence: int) -> Array:
        x = _with_room(x)
        return _fenced(x, length, fence).reshape(-1, x.shape[-1]).T

    return columns(tokens, length, -1), columns(reference, reference_length, -2), batch
