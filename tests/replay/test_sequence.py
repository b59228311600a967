"""Sequences against a slow loop over all that was written."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_replay import block, spec, stream

import jrl
from jrl import r2d2, replay

T, B = 3, 2
LENGTH = 7  # touches three blocks, the last one in part


def remembering(rows, num_envs):
    """A stream whose memory before each step says which step of which environment it is."""
    transitions = stream(rows, num_envs)
    return transitions._replace(extras={"hidden": 10.0 * transitions.obs})


def written(blocks, rows, gap=1):
    transitions = remembering(blocks * T, B)
    buffer = replay.sequence.buffer(T, LENGTH)
    state, add = buffer.init(spec(transitions), rows, B, gap), jax.jit(buffer.add)
    states = []
    for i in range(blocks):
        state = add(state, block(transitions, i * T, T))
        states.append(state)
    return transitions, states


@pytest.fixture(scope="module")
def history():
    return written(blocks=14, rows=5 * T)


def test_every_whole_sequence_can_be_drawn_and_no_other(history):
    """Before the ring is full, and after it has wrapped twice."""
    _, states = history
    sample = jax.jit(lambda key, state: replay.sequence.sample(key, state, 256, beta=1.0))
    for i, state in enumerate(states):
        if i < 2:
            assert replay.sum_tree.total(state.tree) == 0  # not one is whole yet
            continue
        drawn = sample(jax.random.key(i), state)
        first = np.asarray(drawn.steps.obs[0, :, 0]).astype(int) // T
        # The block under way takes the first row of the oldest one, whose own sequences are gone.
        oldest = max(0, i - 5 + 2)
        assert set(first) == set(range(oldest, i - 1)), i


def test_sequences_are_what_was_written_and_begin_with_their_memory(history):
    transitions, states = history
    drawn = replay.sequence.sample(jax.random.key(0), states[-1], 64, beta=1.0)
    for n in range(64):
        t, b = (int(x) for x in drawn.steps.obs[0, n])
        assert t % T == 0
        np.testing.assert_array_equal(drawn.memory["hidden"][n], [10.0 * t, 10.0 * b])
        for s in range(LENGTH):
            for name in ("obs", "action", "reward", "terminated", "truncated"):
                held = getattr(drawn.steps, name)[s, n]
                np.testing.assert_array_equal(held, getattr(transitions, name)[t + s, b])
            if not transitions.terminated[t + s, b]:
                np.testing.assert_array_equal(drawn.steps.next_obs[s, n], transitions.next_obs[t + s, b])
    assert not drawn.lost.any()


def test_a_lost_successor_is_marked():
    """All rows of a block share one slot: of two truncations in it the first one's successor is lost."""
    transitions, states = written(blocks=14, rows=5 * T, gap=T)
    drawn = replay.sequence.sample(jax.random.key(0), states[-1], 64, beta=1.0)
    cut = np.asarray(transitions.truncated & ~transitions.terminated)
    lost = 0
    for n in range(64):
        t, b = (int(x) for x in drawn.steps.obs[0, n])
        for s in range(LENGTH):
            row = t + s
            later = cut[row + 1 : row // T * T + T, b].any()
            assert bool(drawn.lost[s, n]) == bool(cut[row, b] and later)
            lost += bool(drawn.lost[s, n])
    assert lost > 0


def test_draws_and_weights_follow_the_priorities(history):
    _, states = history
    state = states[-1]
    position = jnp.flatnonzero(state.tree[0] > 0)
    error = jnp.linspace(0.5, 2.0, position.size)
    state = replay.sequence.update_priorities(state, position, error, alpha=0.9)
    probability = np.zeros(state.tree[0].size)
    probability[position] = (np.asarray(error) + 1e-6) ** 0.9
    probability /= probability.sum()
    drawn = replay.sequence.sample(jax.random.key(0), state, 4096, beta=0.6)
    frequency = np.bincount(np.asarray(drawn.position), minlength=probability.size) / 4096
    np.testing.assert_allclose(frequency, probability, atol=2e-3)  # stratified
    weight = probability[np.asarray(drawn.position)] ** -0.6
    np.testing.assert_allclose(drawn.weight, weight / weight.max(), rtol=1e-4)
    # What is written next counts as much as the largest one seen.
    transitions = remembering(T, B)
    assert float(replay.sequence.add(state, transitions).tree[0].max()) == pytest.approx(2.0**0.9, rel=1e-4)


def test_what_does_not_fit_is_refused():
    transitions = remembering(T, B)
    with pytest.raises(
        ValueError, match=r"rows=9 for sequences of 7 steps in blocks of 3: .* at least 12; raise"
    ):
        replay.sequence.buffer(T, LENGTH).init(spec(transitions), 9, B)
    state = replay.sequence.buffer(T, LENGTH).init(spec(transitions), 12, B)
    with pytest.raises(ValueError, match="a block of 2 steps in a replay of blocks of 3"):
        replay.sequence.add(state, block(transitions, 0, 2))


def test_sequences_of_one_block_are_whole_at_once():
    transitions = remembering(3 * T, B)
    buffer = replay.sequence.buffer(T, T)
    state = buffer.init(spec(transitions), 3 * T, B)
    for i in range(3):
        state = buffer.add(state, block(transitions, i * T, T))
        drawn = replay.sequence.sample(jax.random.key(i), state, 64, beta=1.0)
        held = {0: {0}, 1: {0, 1}, 2: {1, 2}}[i]  # the third took the first row of the first
        assert set(np.asarray(drawn.steps.obs[0, :, 0]).astype(int) // T) == held


def test_the_compiled_program_holds_no_copy_of_the_replay():
    sizes = {
        "num_envs": 4,
        "unroll_length": 4,
        "burn_in": 2,
        "learn_length": 6,
        "batch_size": 4,
        "num_updates": 2,
    }
    config = r2d2.Config(**sizes, capacity=40_000, warmup_env_steps=64, hidden_sizes=(8,), memory_size=8)
    algo, hparams = r2d2.make(jrl.make("CartPole-v1"), config), r2d2.HParams()
    state = jax.eval_shape(algo.init, jax.random.key(0), hparams)
    train = jax.jit(lambda state: jrl.train(algo, state, hparams, num_steps=3), donate_argnums=0)
    compiled = train.lower(state).compile()
    stored = (state.replay.ring.storage, state.replay.memory, state.replay.tree[0])
    sizes = "|".join(str(leaf.shape[0]) for leaf in stored)
    buffer = re.compile(rf"= \w+\[({sizes})(,\d+)*\]\S* (copy|copy-start|select|concatenate)\(")
    copies = [line.strip() for line in compiled.as_text().splitlines() if buffer.search(line)]
    assert not copies, copies[:3]
    assert compiled.memory_analysis().temp_size_in_bytes < state.replay.ring.storage.shape[0] * 4
