"""Turning action values into actions, with one or two random numbers per row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.ops import checks
from jrl.ops.distributions import Categorical, inverse_cdf, masked
from jrl.ops.losses import select_action
from jrl.types import Array, Key


def epsilon_greedy(key: Key, q: Array, epsilon: Array | float, mask: Array | None = None) -> Array:
    """Act uniformly with probability ε, else greedily.

    ``π(a|s) = ε / |allowed| + (1 − ε) [a = argmax q]``; among equals the first is the greedy one.

    Source: Watkins 1989, "Learning from Delayed Rewards", https://www.cs.rhul.ac.uk/~chrisw/thesis.html;
    Mnih et al. 2015, https://doi.org/10.1038/nature14236.

    Args:
        key: one key for the whole batch.
        q: floating ``[..., A]``.
        epsilon: a number, or ``[...]`` for one per row.
        mask: bool ``[..., A]``, True = allowed; both kinds of action keep to it. A row that allows nothing is
            treated as if it allowed everything.

    Returns:
        int32 ``[...]``.

    Raises:
        AssertionError: ``q`` is not floating, or ``mask`` is not bool or not of the shape of ``q``.
    """
    explore, which = jax.random.uniform(key, (2, *q.shape[:-1]))
    greedy, uniform = _greedy_and_uniform(q, which, mask)
    exploring = explore < jnp.broadcast_to(epsilon, q.shape[:-1])
    return jnp.where(exploring, uniform, greedy)


class HeldAction(NamedTuple):
    """An exploratory action and the steps it is still to be taken, both int32 ``[...]``; zeros at the start."""

    action: Array
    left: Array


def persistent_epsilon_greedy(
    key: Key,
    q: Array,
    held: HeldAction,
    epsilon: Array | float,
    exponent: Array | float,
    mask: Array | None = None,
    longest: int = 10_000,
) -> tuple[Array, HeldAction]:
    """Act greedily, but with probability ε take one uniform action for a heavy-tailed number of steps.

    ``P(steps ≥ k) = k^(1 − μ)`` up to ``longest``: the tail of the zeta distribution that the source draws from.

    Source: Dabney, Ostrovski and Barreto 2021, "Temporally-Extended ε-Greedy Exploration" (εz-greedy, μ = 2),
    https://arxiv.org/abs/2006.01782.

    Args:
        key: one key for the whole batch.
        q: floating ``[..., A]``.
        held: what is being held.
        epsilon: chance that a step in which nothing is held begins to hold an action; a number, or ``[...]``.
        exponent: μ, above 1; the larger, the shorter. Infinity is ε-greedy.
        mask: bool ``[..., A]``, True = allowed; an action that is no longer allowed is let go.
        longest: steps that an action is held at most, static.

    Returns:
        int32 ``[...]``, and what is held afterwards.

    Raises:
        AssertionError: ``q`` is not floating, or ``mask`` is not bool or not of the shape of ``q``.
    """
    explore, which, duration = jax.random.uniform(key, (3, *q.shape[:-1]))
    greedy, uniform = _greedy_and_uniform(q, which, mask)
    holding = held.left > 0
    if mask is not None:
        holding &= select_action(mask.astype(jnp.int32), held.action) > 0
    steps = jnp.minimum((1.0 - duration) ** (-1.0 / (exponent - 1.0)), longest).astype(jnp.int32)
    begins = ~holding & (explore < jnp.broadcast_to(epsilon, greedy.shape))
    action = jnp.where(holding, held.action, jnp.where(begins, uniform, greedy))
    left = jnp.where(holding, held.left, jnp.where(begins, steps, 1)) - 1
    return action, HeldAction(action, left)


def _greedy_and_uniform(q: Array, which: Array, mask: Array | None) -> tuple[Array, Array]:
    """Return the best actions and, for ``which`` uniform in [0, 1), uniform ones, int32 ``[...]``."""
    checks.floating(q=q)
    if mask is None:
        greedy, uniform = jnp.argmax(q, axis=-1), jnp.floor(which * q.shape[-1])
    else:
        checks.flags(mask=mask)
        checks.same_shape(q=q, mask=mask)
        mask = mask | ~jnp.any(mask, axis=-1, keepdims=True)
        greedy = jnp.argmax(masked(q, mask), axis=-1)
        rank = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
        chosen = jnp.floor(which * rank[..., -1]).astype(jnp.int32)
        uniform = jnp.sum(rank <= chosen[..., None], axis=-1)
    return greedy.astype(jnp.int32), uniform.astype(jnp.int32)


def boltzmann(key: Key, q: Array, temperature: Array | float, mask: Array | None = None) -> Array:
    """Act in proportion to exponentiated values.

    ``π(a|s) = exp(q(s, a) / τ) / Σ_b exp(q(s, b) / τ)``.

    Source: Sutton 1990, "Integrated Architectures for Learning, Planning, and Reacting",
    https://doi.org/10.1016/B978-1-55860-141-3.50030-4.

    Args:
        key: one key for the whole batch.
        q: floating ``[..., A]``.
        temperature: τ in the unit of ``q``, a number, or ``[...]`` for one per row; at 0 the draw is uniform
            among the greedy actions, at infinity among all.
        mask: bool ``[..., A]``, True = allowed. A row that allows nothing is drawn uniformly.

    Returns:
        int32 ``[...]``.

    Raises:
        AssertionError: ``q`` is not floating, or ``mask`` is not bool or not of the shape of ``q``.
    """
    return Categorical(_boltzmann_logits(q, temperature, mask)).sample(key)


def epsilon_greedy_policy(q: Array, epsilon: Array | float, mask: Array | None = None) -> Array:
    """Probabilities of acting uniformly with chance ε, else greedily, equals sharing.

    ``π(a|s) = ε / |allowed| + (1 − ε) [q(s, a) = max q] / |maximal|``. :func:`epsilon_greedy` draws from the same
    policy, but gives the first among equals all of it.

    Source: Sutton and Barto 2018, section 2.2, http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        q: floating ``[..., A]``.
        epsilon: a number, or ``[...]`` for one per row.
        mask: bool ``[..., A]``, True = allowed; every row allows something.

    Returns:
        ``[..., A]``.

    Raises:
        AssertionError: ``q`` is not floating, or ``mask`` is not bool or not of the shape of ``q``.
    """
    checks.floating(q=q)
    allowed = jnp.ones_like(q)
    if mask is not None:
        q, allowed = masked(q, mask), mask.astype(q.dtype)
    best = (q == jnp.max(q, axis=-1, keepdims=True)) * allowed
    epsilon = jnp.broadcast_to(epsilon, q.shape[:-1])[..., None]
    shared = best / jnp.sum(best, axis=-1, keepdims=True)
    return epsilon * allowed / jnp.sum(allowed, axis=-1, keepdims=True) + (1.0 - epsilon) * shared


def boltzmann_policy(q: Array, temperature: Array | float, mask: Array | None = None) -> Array:
    """Probabilities in proportion to exponentiated values, those :func:`boltzmann` draws from.

    ``π(a|s) = exp(q(s, a) / τ) / Σ_b exp(q(s, b) / τ)``.

    Source: as :func:`boltzmann`.

    Args:
        q: floating ``[..., A]``.
        temperature: τ in the unit of ``q``, a number, or ``[...]`` for one per row; at 0 equals share.
        mask: bool ``[..., A]``, True = allowed.

    Returns:
        ``[..., A]``.

    Raises:
        AssertionError: ``q`` is not floating, or ``mask`` is not bool or not of the shape of ``q``.
    """
    return jax.nn.softmax(_boltzmann_logits(q, temperature, mask), axis=-1)


def _boltzmann_logits(q: Array, temperature: Array | float, mask: Array | None) -> Array:
    checks.floating(q=q)
    if mask is not None:
        q = masked(q, mask)
    # Distances to the best are at most 0, so that a temperature near 0 gives −inf and never nan.
    behind = q - jnp.max(q, axis=-1, keepdims=True)
    scale = jnp.maximum(jnp.broadcast_to(temperature, q.shape[:-1]), jnp.finfo(q.dtype).tiny)
    logits = behind / scale[..., None]
    # Again: an enormous temperature brings every distance near 0, that of a disallowed action too.
    return logits if mask is None else masked(logits, mask)


def ucb_policy(q: Array, count: Array, coef: Array | float, mask: Array | None = None) -> Array:
    """Probabilities of the actions with the highest upper confidence bound, equals sharing.

    ``argmax_a q(s, a) + c sqrt(ln N(s) / n(s, a))`` with ``N(s) = Σ_a n(s, a)``; untried actions come first.

    Source: Auer, Cesa-Bianchi and Fischer 2002, https://doi.org/10.1023/A:1013689704352 (c = √2 for rewards in
    [0, 1]).

    Args:
        q: floating ``[..., A]``.
        count: ``[..., A]``, how often each action was taken.
        coef: c, in the unit of ``q``.
        mask: bool ``[..., A]``, True = allowed.

    Returns:
        ``[..., A]``.

    Raises:
        AssertionError: ``q`` is not floating, or ``count`` or ``mask`` has not its shape.
    """
    checks.floating(q=q)
    checks.same_shape(q=q, count=count)
    count = count.astype(q.dtype)
    total = jnp.maximum(jnp.sum(count, axis=-1, keepdims=True), 1.0)
    bound = q + coef * jnp.sqrt(jnp.log(total) / jnp.maximum(count, 1.0))
    untried = jnp.finfo(q.dtype).max
    return epsilon_greedy_policy(jnp.where(count == 0, untried, bound), 0.0, mask)


def draw_action(key: Key, probability: Array) -> Array:
    """Draw an action from its probabilities, with one uniform number per row.

    ``a ~ π(·|s)``; an action of probability 0 is never drawn.

    Source: Devroye 1986, section III.2, http://luc.devroye.org/rnbookindex.html.

    Args:
        key: one key for the whole batch.
        probability: floating ``[..., A]``.

    Returns:
        int32 ``[...]``.

    Raises:
        AssertionError: ``probability`` is not floating.
    """
    checks.floating(probability=probability)
    return inverse_cdf(probability, jax.random.uniform(key, probability.shape[:-1], probability.dtype))
