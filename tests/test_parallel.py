"""One run on several devices: the same numbers as on one, and nothing exchanged but what must be."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import checkpoint, dqn, ppo, pqn
from jrl.envs import from_functions
from jrl.parallel import data_parallel

NUM_SHARDS = 8
HPARAMS = ppo.HParams(env=None)


def maker(env="CartPole-v1", module=ppo, **choices):
    sizes = {"num_envs": 16, "unroll_length": 8, "num_epochs": 2, "num_minibatches": 2, "hidden_sizes": (8,)}
    return functools.partial(module.make, jrl.make(env), module.Config(**sizes | choices))


PENDULUM = {"normalize_observations": True, "normalize_rewards": True, "stop_at_target_kl": True}
CASES = {
    "discrete": maker(),
    "continuous": maker("Pendulum-v1", **PENDULUM),
    "native": maker(hidden_sizes=(8, 8), kernels="native", num_microbatches=2),
    "gru": maker("MemoryChain-bsuite", memory="gru", memory_size=8, num_epochs=1),
    "pqn": maker(module=pqn),
}


class Run:
    """Two steps of an algorithm from one key, with its program."""

    def __init__(self, algo, hparams):
        self.algo = algo
        self.start = jax.jit(algo.init)(jax.random.key(0), hparams)
        self.compiled = jax.jit(algo.step).lower(self.start, hparams).compile()
        self.first, self.first_metrics = self.compiled(self.start, hparams)
        self.second, self.second_metrics = self.compiled(self.first, hparams)


@functools.cache
def run(case, num_devices, kernels="xla"):
    devices = jax.devices()[:num_devices]
    algo = data_parallel(CASES[case], devices, num_shards=NUM_SHARDS, kernels=kernels)
    return Run(algo, pqn.HParams() if case == "pqn" else HPARAMS)


@functools.cache
def in_one_piece():
    """ "discrete" without shards, its jitted step, a start, and what a step makes of it. For optimized tests."""
    algo = CASES["discrete"]()
    start, step = jax.jit(algo.init)(jax.random.key(0), HPARAMS), jax.jit(algo.step)
    return algo, step, start, step(start, HPARAMS)


def raw(tree):
    """The leaves by path as NumPy arrays, keys as their data."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for _, leaf in named]
    return {
        jax.tree_util.keystr(path): np.asarray(jax.random.key_data(leaf) if key else leaf)
        for (path, leaf), key in zip(named, is_key, strict=True)
    }


def assert_close(a, b, rtol=1e-4):
    a, b = raw(a), raw(b)
    assert a.keys() == b.keys()
    for name in a:
        scale = np.abs(a[name]).max() if a[name].size else 0.0
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol * max(scale, 1e-2), err_msg=name)


@pytest.mark.parametrize(
    ("case", "num_devices"),
    [
        pytest.param("discrete", 2, marks=pytest.mark.optimized),
        pytest.param("discrete", 8, marks=pytest.mark.optimized),
        ("continuous", 8),
        pytest.param(
            "native", 2, marks=pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
        ),
        ("gru", 2),
    ],
)
def test_the_same_run_on_any_number_of_devices(case, num_devices):
    one, several = run(case, 1), run(case, num_devices)
    assert_close(several.start, one.start, rtol=0)
    assert_close((several.first, several.first_metrics), (one.first, one.first_metrics))
    assert_close((several.second.params, several.second_metrics), (one.second.params, one.second_metrics))


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize(("case", "num_devices"), [("native", 2), ("continuous", 8)])
def test_native_kernels_exchange_the_same(case, num_devices):
    one, several = run(case, 1), run(case, num_devices, "native")
    assert "jrl_mean" in several.compiled.as_text()
    assert_close((several.first, several.first_metrics), (one.first, one.first_metrics))
    assert_close((several.second.params, several.second_metrics), (one.second.params, one.second_metrics))
    for leaf in jax.tree.leaves(several.second.params):
        values = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(values) == num_devices
        assert all(np.array_equal(value, values[0]) for value in values)


def test_every_device_holds_its_own_environments_and_all_parameters():
    state = run("continuous", 8).second
    for leaf in jax.tree.leaves((state.rollout, state.reward_scaling.running_return)):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, *leaf.shape[1:])}
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.observation_statistics)):
        values = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(values) == 8
        assert all(np.array_equal(value, values[0]) for value in values)
    obs = np.asarray(state.rollout.obs)
    assert len(np.unique(obs, axis=0)) == len(obs)  # no two shards draw the same


def test_a_memory_is_split_with_its_environments():
    several = run("gru", 2)
    for leaf in jax.tree.leaves(several.second.rollout.memory):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(8, *leaf.shape[1:])}
        assert (np.asarray(leaf) != 0).any(-1).all()
    assert several.first_metrics["num_episodes"] > 0  # at whose ends it was reset


@pytest.mark.optimized
@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_loop_exchanges_one_vector_a_minibatch_and_no_data(num_devices):
    text = run("discrete", num_devices).compiled.as_text()
    computations = re.split(r"\n(?=%|ENTRY)", text)
    exchanges = r" = (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    found = {body.split(" ", 1)[0]: re.findall(exchanges, body) for body in computations}
    found = {name: kinds for name, kinds in found.items() if kinds}
    num_params = sum(leaf.size for leaf in jax.tree.leaves(run("discrete", num_devices).start.params))
    in_loop = [kinds for kinds in found.values() if any(f"f32[{num_params + 6}]" in t for t, _ in kinds)]
    assert [[kind for _, kind in kinds] for kinds in in_loop] == [["all-reduce"]]
    others = [one for kinds in found.values() if kinds not in in_loop for one in kinds]
    assert {kind for _, kind in others} == {"all-reduce", "all-gather"}
    shapes = [dims for text, _ in others for dims in re.findall(r"\[([\d,]*)\]", text)]
    sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in shapes]
    num_metrics = len(run("discrete", num_devices).first_metrics)
    # Nothing larger than the metrics of all shards: a minibatch has 64 transitions of 4 numbers and more.
    assert max(sizes) == NUM_SHARDS * num_metrics < 64 * 4


@pytest.mark.optimized  # the same bits as "discrete" above
def test_it_starts_as_the_run_in_one_piece_does_and_counts_its_steps():
    whole, step, start, _ = in_one_piece()
    several = run("discrete", 8)
    assert several.algo.env_steps_per_step == whole.env_steps_per_step == 16 * 8
    assert_close(several.start, start, rtol=0)
    assert jrl.ops.counter.to_int(several.second.env_steps) == 2 * 16 * 8
    _, metrics = step(jax.device_put(several.first, jax.devices()[0]), HPARAMS)  # continued in one piece
    assert metrics.keys() == several.second_metrics.keys()


def test_a_checkpoint_goes_on_with_another_number_of_devices(tmp_path):
    eight, two = run("discrete", 8), run("discrete", 2)
    checkpoint.save(tmp_path, eight.first, step=1)
    like = jax.eval_shape(eight.algo.init, jax.random.key(0), HPARAMS)
    restored = checkpoint.restore(tmp_path, like=like)
    assert_close(restored, eight.first, rtol=0)
    assert_close(two.compiled(restored, HPARAMS)[0].params, eight.second.params)
    assert_close(eight.compiled(restored, HPARAMS), (eight.second, eight.second_metrics), rtol=0)


def test_the_policy_is_evaluated_as_any_other():
    several = run("discrete", 2)
    policy = several.algo.policy(several.second)
    stats = jrl.evaluate(jax.random.key(1), jrl.make("CartPole-v1"), policy, num_episodes=4, max_steps=20)
    assert np.isfinite(stats.episode_return).all()


def counting():
    """Episodes of length 1 to 16: each environment draws its own, and earns 1 a step."""

    def reset(key, params):
        length = jax.random.randint(key, (), 1, 17)
        return (length, 0), jnp.float32([0.0])

    def transition(key, state, action, params):
        length, time = state
        return (length, time + 1), jnp.float32([0.0]), 1.0, time + 1 >= length, False

    return from_functions(reset, transition, (), jrl.Discrete(2), "counting")


def test_episode_metrics_are_those_of_all_shards():
    make = functools.partial(
        ppo.make, counting(), ppo.Config(num_envs=8, unroll_length=16, num_epochs=1, hidden_sizes=(2,))
    )
    algo = data_parallel(make, jax.devices()[:4], num_shards=8)
    state = jax.jit(algo.init)(jax.random.key(0), HPARAMS)
    lengths = np.asarray(state.rollout.env_state[0])
    # First episodes that end within the unroll are those of all; the later ones draw their lengths anew.
    _, metrics = jax.jit(algo.step)(state, HPARAMS)
    assert metrics["num_episodes"] >= 8
    assert metrics["episode_return_min"] <= lengths.min()
    assert metrics["episode_return_max"] >= lengths.max()
    assert metrics["episode_return"] == metrics["episode_length"]
    total = metrics["num_episodes"] * metrics["episode_return"]
    np.testing.assert_allclose(total, np.round(total), atol=1e-3)  # whole steps, by whole episodes


def test_what_cannot_be_split_says_so():
    devices = jax.devices()[:3]
    with pytest.raises(
        ValueError, match=r"num_envs=16 cannot be split into 3 equal shards; use a multiple of 3"
    ):
        data_parallel(maker(), devices)
    with pytest.raises(ValueError, match=r"num_shards=4 on 3 devices: .*use a multiple of the devices"):
        data_parallel(maker(), devices, num_shards=4)
    with pytest.raises(ValueError, match=r"num_shards=0 on 0 devices"):
        data_parallel(maker(), [])
    with pytest.raises(ValueError, match=r"num_minibatches=16 does not divide .* 8 shards, 2 × 4 = 8"):
        data_parallel(maker(unroll_length=4, num_minibatches=16))
    with pytest.raises(
        TypeError, match=r"with jrl.algos.dqn.make: no function that takes shards=.*pqn.make do"
    ):
        data_parallel(functools.partial(dqn.make, jrl.make("CartPole-v1")), devices)
    with pytest.raises(TypeError, match=r"with jrl.types.Algorithm: no function that takes shards="):
        data_parallel(maker()(), devices)
    with pytest.raises(ValueError, match=r"kernels='fast': must be 'xla' or 'native'"):
        data_parallel(maker(), devices, kernels="fast")


@pytest.mark.optimized
def test_one_shard_is_the_run_in_one_piece():
    one = data_parallel(CASES["discrete"], jax.devices()[:1])
    _, _, start, (_, metrics) = in_one_piece()
    np.testing.assert_array_equal(jax.jit(one.step)(start, HPARAMS)[1]["loss"], metrics["loss"])


@pytest.mark.optimized  # the same bits as the run in one piece
def test_one_device_that_is_not_the_default_one_computes_the_run():
    device = jax.devices()[3]
    there = data_parallel(CASES["discrete"], [device])
    state = jax.jit(there.init)(jax.random.key(0), HPARAMS)
    stepped, metrics = jax.jit(there.step)(state, HPARAMS)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves((state, stepped, metrics)))
    assert_close((stepped, metrics), in_one_piece()[-1], rtol=0)


def test_it_says_which_environment_it_was_made_for():
    make = maker()
    env = make.args[0]
    for algo in (data_parallel(make, jax.devices()[:2]), data_parallel(make, [jax.devices()[3]])):
        assert algo.env is env
