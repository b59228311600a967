import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, replay
from jrl.types import Transition

GAMMA = 0.9


def stream(rows: int, num_envs: int, seed: int = 0) -> Transition:
    """Transitions [rows, B] whose observations say which step of which environment they are."""
    rng = np.random.default_rng(seed)
    step = np.arange(rows)[:, None] * np.ones((1, num_envs))
    env = np.ones((rows, 1)) * np.arange(num_envs)[None]
    obs = np.stack([step, env], -1).astype(np.float32)
    shape = (rows, num_envs)
    return Transition(
        obs=jnp.asarray(obs),
        action=jnp.asarray(rng.integers(0, 3, shape), jnp.int32),
        reward=jnp.asarray(rng.normal(size=shape), jnp.float32),
        terminated=jnp.asarray(rng.random(shape) < 0.15),
        truncated=jnp.asarray(rng.random(shape) < 0.15),
        next_obs=jnp.asarray(obs + np.array([0.5, 0.0], np.float32)),
        extras=(),
    )


def block(transitions: Transition, start: int, length: int) -> Transition:
    return jax.tree.map(lambda leaf: leaf[start : start + length], transitions)


def spec(transitions: Transition) -> Transition:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), transitions)


def window_oracle(transitions: Transition, t: int, b: int, newest: int, n: int):
    """One n-step window from the definition: rewards until either flag, or the newest row."""
    reward, k = 0.0, 0
    while True:
        row = t + k
        reward += GAMMA**k * float(transitions.reward[row, b])
        k += 1
        terminated, truncated = bool(transitions.terminated[row, b]), bool(transitions.truncated[row, b])
        if terminated or truncated or k == n or row == newest:
            return reward, k, terminated, np.asarray(transitions.next_obs[row, b])


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("written", [6, 12, 20])
def test_windows_equal_a_slow_loop(n, written):
    """Before the ring is full, when just full, and after it has wrapped."""
    rows, num_envs, length = 12, 3, 2
    transitions = stream(written, num_envs)
    state = replay.uniform.init(spec(transitions), rows, num_envs)
    add = jax.jit(replay.uniform.add)
    for start in range(0, written, length):
        state = add(state, block(transitions, start, length))
    sample = jax.jit(lambda key: replay.uniform.sample(key, state, 200, num_envs, n))(jax.random.key(0))
    seen = set()
    for i in range(200):
        t, b = (int(x) for x in sample.obs[i])
        seen.add((t, b))
        assert max(0, written - rows) <= t < written
        reward, k, terminated, next_obs = window_oracle(transitions, t, b, written - 1, n)
        powers = GAMMA ** np.arange(n)
        np.testing.assert_allclose(powers @ np.asarray(sample.rewards)[:, i], reward, rtol=1e-5, atol=1e-6)
        assert sample.length[i] == k
        assert bool(sample.terminated[i]) == terminated
        np.testing.assert_array_equal(sample.next_obs[i], next_obs)
        assert sample.action[i] == transitions.action[t, b]
    assert len(seen) == min(written, rows) * num_envs  # every item held can be drawn


def test_what_is_read_is_what_was_written():
    """Bit for bit, whatever the dtypes: NaN and -0 keep their bits, narrow leaves share words."""
    rng = np.random.default_rng(0)
    shape = (4, 2)

    def bits(dtype, *tail):
        return jnp.asarray(
            rng.integers(0, 256, (*shape, *tail, jnp.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
        )

    board = {
        "pixels": bits(np.uint8, 3, 3),
        "mask": bits(np.uint8, 5) > 127,
        "half": bits(jnp.bfloat16, 3),
        "position": bits(np.float32, 2).at[0, 0].set(jnp.array([jnp.nan, -0.0])),
        "clock": bits(np.int16),
        "empty": jnp.zeros((*shape, 0), jnp.int8),
    }
    transitions = stream(4, 2)._replace(obs=board, next_obs=board, extras={"ticks": bits(np.int32)})
    state = replay.uniform.init(spec(transitions), 4, 2)
    state = jax.jit(replay.uniform.add)(state, transitions)
    read = jax.jit(replay.uniform.read)(state, jnp.arange(8)[::-1])
    for got, written in zip(jax.tree.leaves(read), jax.tree.leaves(transitions), strict=True):
        newest_first = np.asarray(written).reshape(8, *written.shape[2:])[::-1]
        assert np.asarray(got).tobytes() == newest_first.tobytes()
    assert jax.tree.map(lambda leaf: leaf.dtype, read) == jax.tree.map(lambda leaf: leaf.dtype, transitions)


def test_narrow_leaves_share_words():
    transitions = stream(4, 2)._replace(
        obs=jnp.zeros((4, 2, 6), jnp.uint8), next_obs=jnp.zeros((4, 2, 6), bool)
    )
    state = replay.uniform.init(spec(transitions), 4, 2)
    # action, reward, both flags in one word; two observations of six bytes.
    assert state.storage.shape == (8, 3 + 2 + 2)


@pytest.mark.parametrize("dtype", ["complex64", "int4", "key<fry>"])
def test_leaves_that_are_no_numbers_are_refused(dtype):
    leaf = jax.random.key(0) if dtype == "key<fry>" else jnp.zeros((), dtype)
    transitions = spec(stream(4, 2))._replace(extras={"x": jax.ShapeDtypeStruct((), leaf.dtype)})
    with pytest.raises(TypeError, match=f"leaf of dtype {dtype} cannot be kept in a replay"):
        replay.uniform.init(transitions, 4, 2)


def test_capacity_is_rounded_up_to_whole_blocks():
    assert replay.num_rows(10_000, 10, 1) == 1000
    assert replay.num_rows(10_001, 10, 1) == 1001
    assert replay.num_rows(100, 4, 8) == 32


def test_a_block_larger_than_the_ring_is_refused():
    transitions = stream(6, 2)
    state = replay.uniform.init(spec(transitions), 4, 2)
    with pytest.raises(ValueError, match="a block of 6 rows does not fit a replay of 4"):
        replay.uniform.add(state, transitions)


def test_prioritized_draws_and_weights_follow_the_definition():
    transitions = stream(8, 2)
    state = replay.prioritized.init(spec(transitions), 8, 2)
    state = replay.prioritized.add(state, transitions)
    index = jnp.arange(16)
    error = jnp.linspace(0.1, 3.0, 16)
    alpha, beta = 0.7, 0.5
    state = replay.prioritized.update_priorities(state, index, error, alpha=alpha)
    probability = np.asarray(error + 1e-6) ** alpha
    probability /= probability.sum()

    sample = jax.jit(lambda key: replay.prioritized.sample(key, state, 4096, 2, beta=beta))(jax.random.key(0))
    frequency = np.bincount(np.asarray(sample.position), minlength=16) / 4096
    np.testing.assert_allclose(frequency, probability, atol=2e-3)  # stratified: far below the error of chance
    weight = (16 * probability[np.asarray(sample.position)]) ** -beta
    np.testing.assert_allclose(sample.weight, weight / weight.max(), rtol=1e-4)


def test_new_items_get_the_largest_priority_and_empty_rows_are_never_drawn():
    transitions = stream(8, 2)
    state = replay.prioritized.init(spec(transitions), 8, 2)
    state = replay.prioritized.add(state, block(transitions, 0, 2))
    state = replay.prioritized.update_priorities(
        state, jnp.arange(4), jnp.asarray([5.0, 0.1, 0.1, 0.1]), alpha=1.0
    )
    state = replay.prioritized.add(state, block(transitions, 2, 2))
    leaves = np.asarray(state.tree[0])
    np.testing.assert_allclose(leaves[:8], [5, 0.1, 0.1, 0.1, 5, 5, 5, 5], rtol=1e-5)
    sample = replay.prioritized.sample(jax.random.key(0), state, 512, 2, beta=1.0)
    assert int(sample.position.max()) < 8


@pytest.mark.parametrize(
    ("choices", "vmapped"),
    [
        ({}, False),
        ({"n_step": 3, "unroll_length": 4, "num_updates": 3}, True),
        ({"prioritized": True}, False),
        ({"prioritized": True, "num_updates": 2}, True),
    ],
    ids=str,
)
def test_the_compiled_program_holds_no_copy_of_the_replay(choices, vmapped):
    """What makes a replay slow is invisible in the source: so look at what XLA made of it."""
    env = jrl.make("CartPole-v1")
    config = dqn.Config(
        num_envs=4, capacity=40_000, warmup_env_steps=64, batch_size=8, hidden_sizes=(8,), **choices
    )
    algo, hparams = dqn.make(env, config), dqn.HParams()
    state = jax.eval_shape(algo.init, jax.random.key(0), hparams)

    def train(state):
        return jrl.train(algo, state, hparams, num_steps=3)

    if vmapped:
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), state)
        train = jax.vmap(train)
    compiled = jax.jit(train, donate_argnums=0).lower(state).compile()
    ring = state.replay.ring if config.prioritized else state.replay
    num_items = ring.storage.shape[-2]
    buffer = re.compile(
        rf"= \w+\[(3,)?({num_items}|{-(-num_items // 16) * 16})(,\d+)*\]\S* (copy|copy-start|select|concatenate)\("
    )
    copies = [line.strip() for line in compiled.as_text().splitlines() if buffer.search(line)]
    assert not copies, copies[:3]
    # What the program needs beside its arguments must not grow with the buffer either.
    smallest_buffer = num_items * 4
    assert compiled.memory_analysis().temp_size_in_bytes < smallest_buffer
