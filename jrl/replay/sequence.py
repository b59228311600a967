"""Prioritised replay of sequences, with the policy's memory from where each of them began.

Made of :mod:`jrl.replay.uniform`'s ring and a sum tree over sequences. Sequences begin where blocks do (what one
``add`` writes, ``T`` steps of ``B`` environments), so that the memory is kept once a block; longer ones than a block
overlap. A sequence can be drawn from when its last step was written until its first one is overwritten. It may run
over the end of an episode: the flags say where.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.replay import prioritized, sum_tree, uniform
from jrl.types import Array, Key, Memory, Transition


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ring", "memory", "tree", "max_priority", "blocks"),
    meta_fields=("block_length", "sequence_length"),
)
@dataclasses.dataclass(frozen=True)
class SequenceState:
    """The replay.

    Attributes:
        ring: the steps.
        memory: the policy's memory before the first step of each block, leaves ``[blocks, B, ...]``.
        tree: priorities ``p^α`` of the sequences that begin at each block, ``[blocks · B]``.
        max_priority: float32 ``[]``, the largest one seen.
        blocks: int32 ``[]``, the blocks written so far, up to as many as a sequence touches.
        block_length: ``T``, static.
        sequence_length: ``S``, static.
    """

    ring: uniform.UniformState
    memory: Memory
    tree: sum_tree.Tree
    max_priority: Array
    blocks: Array
    block_length: int
    sequence_length: int

    @property
    def span(self) -> int:
        """Blocks that a sequence touches."""
        return -(-self.sequence_length // self.block_length)


class Sequences(NamedTuple):
    """``N`` sequences of ``S`` steps.

    Attributes:
        steps: leaves ``[S, N, ...]``; ``next_obs`` is the true successor, of no meaning where a step terminated.
        lost: bool ``[S, N]``, where ``next_obs`` of a truncated step was lost, see :mod:`jrl.replay.uniform`.
        memory: of the policy before the first step, leaves ``[N, ...]``.
        weight: importance weight, float32 ``[N]``.
        position: int32 ``[N]``, for :func:`update_priorities`.
    """

    steps: Transition
    lost: Array
    memory: Memory
    weight: Array
    position: Array


class Buffer(NamedTuple):
    """``init`` and ``add`` of a replay of sequences, as :func:`jrl.algos.off_policy.warm_up` takes them."""

    init: functools.partial[SequenceState]
    add: functools.partial[SequenceState]


def buffer(block_length: int, sequence_length: int) -> Buffer:
    """Return ``init(spec, rows, num_envs, gap, obs_dtype=)`` and ``add(state, transitions)`` for such sequences."""
    return Buffer(
        functools.partial(init, block_length=block_length, sequence_length=sequence_length),
        functools.partial(add),
    )


def init(
    spec: Transition,
    rows: int,
    num_envs: int,
    gap: int = 1,
    *,
    block_length: int,
    sequence_length: int,
    obs_dtype: Any = None,
) -> SequenceState:
    """Return an empty replay.

    Args:
        spec: shapes and dtypes of one transition; its ``extras`` are the policy's memory before the step.
        rows: time steps, a multiple of ``block_length``.
        num_envs: ``B``.
        gap: see :func:`jrl.replay.uniform.init`.
        block_length: ``T``, steps that every ``add`` writes.
        sequence_length: ``S``.
        obs_dtype: see :func:`jrl.replay.uniform.init`.

    Raises:
        ValueError: ``rows`` is no multiple of ``block_length``, or holds no sequence beside the block under way.
    """
    blocks, rest = divmod(rows, block_length)
    span = -(-sequence_length // block_length)
    if rest or blocks < span + 1:
        raise ValueError(
            f"a replay of rows={rows} for sequences of {sequence_length} steps in blocks of {block_length}: the rows "
            f"must be a multiple of {block_length}, at least {(span + 1) * block_length}; raise the capacity."
        )
    return SequenceState(
        ring=uniform.init(spec._replace(extras=()), rows, num_envs, gap, obs_dtype=obs_dtype),
        memory=jax.tree.map(lambda leaf: jnp.zeros((blocks, num_envs, *leaf.shape), leaf.dtype), spec.extras),
        tree=sum_tree.init(blocks * num_envs),
        max_priority=jnp.float32(1.0),
        blocks=jnp.int32(0),
        block_length=block_length,
        sequence_length=sequence_length,
    )


def add(state: SequenceState, transitions: Transition) -> SequenceState:
    """Write a block ``[T, B, ...]`` over the oldest one; what it completes gets the largest priority seen.

    Raises:
        ValueError: the block has not ``block_length`` steps.
    """
    length, num_envs = transitions.reward.shape
    if length != state.block_length:
        raise ValueError(f"a block of {length} steps in a replay of blocks of {state.block_length}.")
    num_blocks = state.ring.layout.rows // length
    block, env = state.ring.row // length, jnp.arange(num_envs)
    count = jnp.minimum(state.blocks + 1, state.span)
    whole = jnp.where(count == state.span, state.max_priority, 0.0)
    # The next block is no whole sequence's start any more: what this one led to lies in its first row. One update with
    # indices that differ: a second one would make XLA copy the tree.
    zero = jnp.zeros_like(whole)
    by_offset = {0: zero, 1: zero, 1 - state.span: whole}  # of one block's span the block itself is whole
    index = jnp.stack([(block + offset) % num_blocks for offset in by_offset])[:, None] * num_envs + env
    priority = jnp.repeat(jnp.stack([*by_offset.values()]), num_envs)
    tree = sum_tree.update(state.tree, index.reshape(-1), priority)
    return dataclasses.replace(
        state,
        ring=uniform.add(state.ring, transitions._replace(extras=())),
        memory=jax.tree.map(lambda ring, new: ring.at[block].set(new[0]), state.memory, transitions.extras),
        tree=tree,
        blocks=count,
    )


def sample(key: Key, state: SequenceState, batch_size: int, *, beta: Array | float) -> Sequences:
    """Draw sequences with ``P(i) = p_i^α / Σ p^α``, and importance weights ``w_i = P(i)^-β / max_j P(j)^-β``.

    Args:
        key: consumed.
        state: the replay, with at least one whole sequence.
        batch_size: ``N``, static.
        beta: how much of the bias of drawing by priority is taken back; 1 is all of it.
    """
    rows, num_envs = state.ring.layout.rows, state.ring.layout.num_envs
    index, priority = sum_tree.sample(key, state.tree, batch_size)
    log_weight = -beta * jnp.log(priority)
    block, env = index // num_envs, index % num_envs
    row = (block * state.block_length + jnp.arange(state.sequence_length)[:, None]) % rows
    steps, lost = uniform.steps(state.ring, (row * num_envs + env).reshape(-1))
    shape = (state.sequence_length, batch_size)
    return Sequences(
        steps=jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), steps),
        lost=lost.reshape(shape),
        memory=jax.tree.map(lambda leaf: leaf[block, env], state.memory),
        weight=jnp.exp(log_weight - log_weight.max()),
        position=index,
    )


def update_priorities(
    state: SequenceState, position: Array, error: Array, *, alpha: Array | float, eps: float = 1e-6
) -> SequenceState:
    """Set ``p_i = (|error_i| + ε)^α`` of the sequences drawn; as :func:`jrl.replay.prioritized.update_priorities`."""
    priority = prioritized.from_error(error, alpha, eps)
    return dataclasses.replace(
        state,
        tree=sum_tree.update(state.tree, position, priority),
        max_priority=jnp.maximum(state.max_priority, priority.max()),
    )
