import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, replay
from jrl.types import Transition

GAMMA = 0.9
ADD, READ = jax.jit(replay.uniform.add), jax.jit(replay.uniform.read)
ADD_PRIORITIZED, UPDATE = jax.jit(replay.prioritized.add), jax.jit(replay.prioritized.update_priorities)
SAMPLE_PRIORITIZED = jax.jit(replay.prioritized.sample, static_argnums=(2, 3))


def stream(rows: int, num_envs: int, seed: int = 0) -> Transition:
    """Transitions [rows, B] whose observations say which step of which environment they are."""
    rng = np.random.default_rng(seed)
    step = np.arange(rows)[:, None] * np.ones((1, num_envs))
    env = np.ones((rows, 1)) * np.arange(num_envs)[None]
    obs = np.stack([step, env], -1).astype(np.float32)
    shape = (rows, num_envs)
    terminated, truncated = rng.random(shape) < 0.15, rng.random(shape) < 0.15
    cut = np.where((terminated | truncated)[..., None], [0.5, 0.0], [1.0, 0.0])
    return Transition(  # of NumPy, which slices rows without a program for each
        obs=obs,
        action=rng.integers(0, 3, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        next_obs=(obs + cut).astype(np.float32),
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
    rows, num_envs = 12, 3
    sample, transitions = drawn(rows, num_envs, n, written)
    seen = set()
    for i in range(200):
        t, b = (int(x) for x in sample.obs[i])
        seen.add((t, b))
        assert max(0, written - rows + 1) <= t < written  # one row is under way
        reward, k, terminated, next_obs = window_oracle(transitions, t, b, written - 1, n)
        powers = GAMMA ** np.arange(n)
        np.testing.assert_allclose(powers @ np.asarray(sample.rewards)[:, i], reward, rtol=1e-5, atol=1e-6)
        assert sample.length[i] == k
        assert bool(sample.terminated[i]) == terminated
        if not terminated:
            np.testing.assert_array_equal(sample.next_obs[i], next_obs)
        assert sample.action[i] == transitions.action[t, b]
    assert len(seen) == min(written, rows - 1) * num_envs  # every item held can be drawn
    assert (sample.weight == 1).all()


@pytest.mark.parametrize("n", [1, 3])
def test_a_truncation_whose_slot_went_to_another_gets_no_weight(n):
    """Of those of one environment in the same ``gap`` rows the last one keeps its successor."""
    rows, num_envs, gap, written = 12, 3, 4, 20
    sample, transitions = drawn(rows, num_envs, n, written, gap)
    cut = np.asarray(transitions.truncated & ~transitions.terminated)
    lost = 0
    for i in range(200):
        t, b = (int(x) for x in sample.obs[i])
        _, k, terminated, next_obs = window_oracle(transitions, t, b, written - 1, n)
        last = t + k - 1
        same_slot = [
            u for u in range(last + 1, written) if u % rows // gap == last % rows // gap and u - last < gap
        ]
        if cut[last, b] and cut[same_slot, b].any():
            assert sample.weight[i] == 0
            lost += 1
        else:
            assert sample.weight[i] == 1
            if not terminated:
                np.testing.assert_array_equal(sample.next_obs[i], next_obs)
    assert 0 < lost < 50


def drawn(rows: int, num_envs: int, n: int, written: int, gap: int = 1):
    """200 windows from a ring that ``written`` rows have gone into, two at a time, and those rows."""
    transitions = stream(written, num_envs)
    state = replay.uniform.init(spec(transitions), rows, num_envs, gap)
    for start in range(0, written, 2):
        state = ADD(state, block(transitions, start, 2))
    sample = jax.jit(lambda key: replay.uniform.sample(key, state, 200, num_envs, n))(jax.random.key(0))
    return jax.device_get(sample), transitions


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
    # What a step led to comes back too, unless it terminated: from the next item, or from the slot.
    ahead = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], leaf[:1]]), board)
    flags = {
        "terminated": jnp.zeros(shape, bool),
        "truncated": jnp.asarray([[0, 1], [0, 0], [1, 0], [1, 1]], bool),
    }
    transitions = stream(4, 2)._replace(obs=board, next_obs=ahead, extras={"ticks": bits(np.int32)}, **flags)
    state = replay.uniform.init(spec(transitions), 4, 2)
    state = ADD(state, transitions)
    read = READ(state, np.arange(8)[::-1])
    for got, written in zip(jax.tree.leaves(read), jax.tree.leaves(transitions), strict=True):
        newest_first = np.asarray(written).reshape(8, *written.shape[2:])[::-1]
        assert np.asarray(got).tobytes() == newest_first.tobytes()
    assert jax.tree.map(lambda leaf: leaf.dtype, read) == jax.tree.map(lambda leaf: leaf.dtype, transitions)


def test_observations_are_kept_once_and_narrow_leaves_share_words():
    transitions = stream(4, 2)._replace(
        obs=jnp.zeros((4, 2, 6), jnp.uint8), next_obs=jnp.zeros((4, 2, 6), jnp.uint8)
    )
    narrow = spec(transitions)._replace(action=jax.ShapeDtypeStruct((), jnp.uint8))
    state = replay.uniform.init(narrow, 32, 2, gap=16)
    # Reward, action and both flags in one word, an observation of six bytes; rows, one ahead, two of slots.
    assert state.storage.shape == ((32 + 1 + 2) * 2, 1 + 1 + 2)


@pytest.mark.parametrize(("kept", "bits", "largest"), [("float16", 11, 65_504.0), ("bfloat16", 8, 3.39e38)])
def test_floats_of_observations_can_be_kept_in_half_the_memory(kept, bits, largest):
    """Rounded to the nearest, large ones to the largest; integers, NaN and infinities as they are."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 2, 6)).astype(np.float32)
    values[0, 0] = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 0.0]
    obs = {"x": jnp.asarray(values), "count": jnp.full((4, 2), 70_000, jnp.int32)}
    transitions = stream(4, 2)._replace(obs=obs, next_obs=obs)
    whole = replay.uniform.init(spec(transitions), 4, 2)
    state = replay.uniform.init(spec(transitions), 4, 2, obs_dtype=kept)
    assert state.storage.shape[1] == whole.storage.shape[1] - 3  # three words for six numbers
    read = READ(ADD(state, transitions), np.arange(8))
    assert jax.tree.map(lambda leaf: leaf.dtype, read) == jax.tree.map(lambda leaf: leaf.dtype, transitions)
    got = np.asarray(read.obs["x"])
    np.testing.assert_array_equal(got[0, :3], values[0, 0, :3])
    np.testing.assert_allclose(got[0, 3:], [largest, -largest, 0.0], rtol=1e-2)
    assert np.isfinite(got[0, 3:]).all()
    error = np.abs(got[1:] - values.reshape(8, 6)[1:])
    assert error.max() > 0.0
    np.testing.assert_array_less(error, np.abs(values.reshape(8, 6)[1:]) * 2.0**-bits + 1e-7)
    np.testing.assert_array_equal(read.obs["count"], 70_000)
    np.testing.assert_array_equal(read.reward, transitions.reward.reshape(-1))


@pytest.mark.parametrize("dtype", ["complex64", "int4", "key<fry>"])
def test_leaves_that_are_no_numbers_are_refused(dtype):
    leaf = jax.random.key(0) if dtype == "key<fry>" else jnp.zeros((), dtype)
    transitions = spec(stream(4, 2))._replace(extras={"x": jax.ShapeDtypeStruct((), leaf.dtype)})
    with pytest.raises(TypeError, match=f"leaf of dtype {dtype} cannot be kept in a replay"):
        replay.uniform.init(transitions, 4, 2)


def test_capacity_is_rounded_up_to_whole_blocks():
    assert replay.num_rows(10_000, 10, 1) == 1001  # one is under way
    assert replay.num_rows(10_001, 10, 1) == 1002
    assert replay.num_rows(100, 4, 8) == 32


@pytest.mark.parametrize("buffer", [replay.uniform, replay.prioritized], ids=["uniform", "prioritized"])
def test_what_would_mix_up_the_ring_is_refused(buffer):
    """Blocks that wrap, or of other environments: each would be read back as transitions that never were."""
    state = buffer.init(spec(stream(4, 2)), 12, 2)
    for length in (5, 24):
        with pytest.raises(
            ValueError, match=rf"a block of {length} rows in a replay of 12: .*num_rows\(capacity, 2"
        ):
            buffer.add(state, stream(length, 2))
    with pytest.raises(ValueError, match="num_envs=3 in a replay that was made for 2 environments"):
        buffer.add(state, stream(4, 3))
    with pytest.raises(
        ValueError, match=r"rewards have shape \(2,\): expected \[T, B\].* a leading axis of 1"
    ):
        buffer.add(state, jax.tree.map(lambda leaf: leaf[0], stream(4, 2)))
    state = buffer.add(state, stream(4, 2))
    numbers = {"beta": 0.4} if buffer is replay.prioritized else {}
    with pytest.raises(ValueError, match="num_envs=4 in a replay that was made for 2 environments"):
        buffer.sample(jax.random.key(0), state, 8, 4, **numbers)


def test_a_ring_that_could_hold_nothing_is_refused():
    with pytest.raises(ValueError, match="a replay of rows=1 holds nothing"):
        replay.uniform.init(spec(stream(4, 2)), 1, 2)
    with pytest.raises(ValueError, match="a replay with gap=0: a slot is shared by at least 1 step"):
        replay.uniform.init(spec(stream(4, 2)), 4, 2, gap=0)


def test_prioritized_draws_and_weights_follow_the_definition():
    transitions = stream(8, 2)
    state = replay.prioritized.init(spec(transitions), 16, 2)
    state = ADD_PRIORITIZED(state, transitions)
    index = np.arange(16)
    error = np.linspace(0.1, 3.0, 16, dtype=np.float32)
    alpha, beta = 0.7, 0.5
    state = UPDATE(state, index, error, alpha=alpha)
    probability = np.asarray(error + 1e-6) ** alpha
    probability /= probability.sum()

    sample = SAMPLE_PRIORITIZED(jax.random.key(0), state, 4096, 2, beta=beta)
    frequency = np.bincount(np.asarray(sample.position), minlength=16) / 4096
    np.testing.assert_allclose(frequency, probability, atol=2e-3)  # stratified: far below the error of chance
    weight = (16 * probability[np.asarray(sample.position)]) ** -beta
    np.testing.assert_allclose(sample.weight, weight / weight.max(), rtol=1e-4)


def test_what_is_not_learned_from_takes_no_weight_from_the_others():
    """One whose successor is lost has the least priority, and so would have the largest weight of all."""
    transitions = stream(8, 1)
    flags = {"terminated": np.zeros((8, 1), bool), "truncated": np.isin(np.arange(8)[:, None], [3, 5])}
    state = replay.prioritized.init(spec(transitions), 16, 1, gap=16)
    state = ADD_PRIORITIZED(state, transitions._replace(**flags))
    state = UPDATE(state, np.arange(8), np.where(np.arange(8) == 3, 0.0, 0.5).astype(np.float32), alpha=0.1)
    sample = SAMPLE_PRIORITIZED(jax.random.key(0), state, 256, 1, beta=1.0)
    lost = np.asarray(sample.position) == 3
    assert lost.any()
    np.testing.assert_allclose(sample.weight, np.where(lost, 0.0, 1.0), rtol=1e-5)
    # And where nothing else was drawn:
    state = UPDATE(state, np.arange(8), np.where(np.arange(8) == 3, 1.0, 0.0).astype(np.float32), alpha=9.0)
    np.testing.assert_array_equal(SAMPLE_PRIORITIZED(jax.random.key(0), state, 4, 1, beta=1.0).weight, 0.0)


def test_new_items_get_the_largest_priority_and_empty_rows_are_never_drawn():
    transitions = stream(8, 2)
    state = replay.prioritized.init(spec(transitions), 8, 2)
    state = ADD_PRIORITIZED(state, block(transitions, 0, 2))
    state = UPDATE(state, np.arange(4), np.float32([5.0, 0.1, 0.1, 0.1]), alpha=1.0)
    state = ADD_PRIORITIZED(state, block(transitions, 2, 2))
    leaves = np.asarray(state.tree[0])
    np.testing.assert_allclose(leaves[:8], [5, 0.1, 0.1, 0.1, 5, 5, 5, 5], rtol=1e-5)
    sample = SAMPLE_PRIORITIZED(jax.random.key(0), state, 512, 2, beta=1.0)
    assert int(sample.position.max()) < 8


def test_the_row_under_way_is_never_drawn():
    transitions = stream(6, 2)
    state = replay.prioritized.init(spec(transitions), 5, 2)
    for start in range(6):
        state = ADD_PRIORITIZED(state, block(transitions, start, 1))
        sample = SAMPLE_PRIORITIZED(jax.random.key(start), state, 64, 2, beta=1.0)
        rows = set(np.asarray(sample.position) // 2)
        # Where that is row 0, what the last row led to lies behind it instead, and row 0 is whole.
        under_way = {(start + 1) % 5} - {0}
        assert rows == {row % 5 for row in range(start + 1)} - under_way, start


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
    num_leaves = state.replay.tree[0].shape[-1] if config.prioritized else num_items
    buffer = re.compile(
        rf"= \w+\[(3,)?({num_items}|{num_leaves})(,\d+)*\]\S* (copy|copy-start|select|concatenate)\("
    )
    copies = [line.strip() for line in compiled.as_text().splitlines() if buffer.search(line)]
    assert not copies, copies[:3]
    # What the program needs beside its arguments must not grow with the buffer either.
    smallest_buffer = num_items * 4
    assert compiled.memory_analysis().temp_size_in_bytes < smallest_buffer
