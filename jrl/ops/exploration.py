"""Turning action values into actions, with one or two random numbers per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jrl.ops import checks
from jrl.ops.distributions import Categorical, masked
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
    checks.floating(q=q)
    batch, num_actions = q.shape[:-1], q.shape[-1]
    explore, which = jax.random.uniform(key, (2, *batch))
    if mask is None:
        greedy = jnp.argmax(q, axis=-1)
        uniform = jnp.floor(which * num_actions)
    else:
        checks.flags(mask=mask)
        checks.same_shape(q=q, mask=mask)
        mask = mask | ~jnp.any(mask, axis=-1, keepdims=True)
        greedy = jnp.argmax(masked(q, mask), axis=-1)
        rank = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
        chosen = jnp.floor(which * rank[..., -1]).astype(jnp.int32)
        uniform = jnp.sum(rank <= chosen[..., None], axis=-1)
    exploring = explore < jnp.broadcast_to(epsilon, batch)
    return jnp.where(exploring, uniform.astype(jnp.int32), greedy.astype(jnp.int32))


def boltzmann(key: Key, q: Array, temperature: Array | float, mask: Array | None = None) -> Array:
    """Act in proportion to exponentiated values.

    ``π(a|s) = exp(q(s, a) / τ) / Σ_b exp(q(s, b) / τ)``.

    Source: Sutton 1990, "Integrated Architectures for Learning, Planning, and Reacting",
    https://doi.org/10.1016/B978-1-55860-141-3.50030-4.

    Args:
        key: one key for the whole batch.
        q: floating ``[..., A]``.
        temperature: τ in the unit of ``q``, a number, or ``[...]`` for one per row; at 0 the draw is uniform
            among the greedy actions.
        mask: bool ``[..., A]``, True = allowed. A row that allows nothing is drawn uniformly.

    Returns:
        int32 ``[...]``.

    Raises:
        AssertionError: ``q`` is not floating, or ``mask`` is not bool or not of the shape of ``q``.
    """
    checks.floating(q=q)
    if mask is not None:
        q = masked(q, mask)
    # Distances to the best are at most 0, so that a temperature near 0 gives −inf and never nan.
    behind = q - jnp.max(q, axis=-1, keepdims=True)
    scale = jnp.maximum(jnp.broadcast_to(temperature, q.shape[:-1]), jnp.finfo(q.dtype).tiny)
    return Categorical(behind / scale[..., None]).sample(key)
