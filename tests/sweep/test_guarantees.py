"""What every algorithm's sweep promises: solo runs, independence, one compilation, bad members, any devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import configuration, sweep
from jrl.sweep import members, program

pytestmark = pytest.mark.optimized  # bits of different programs

NUM_STEPS = 3
ENV = jrl.make("CartPole-v1")


def ppo():
    return jrl.ppo, jrl.ppo.Config(
        num_envs=4, unroll_length=16, num_epochs=2, num_minibatches=2, hidden_sizes=(8,)
    )


def dqn():
    return jrl.dqn, jrl.dqn.Config(capacity=256, batch_size=16, warmup_env_steps=40, hidden_sizes=(8,))


class Case:
    """An algorithm with its programs, compiled once for all tests of this module."""

    def __init__(self, make):
        module, config = make()
        self.algo = module.make(ENV, config)
        self.single = configuration.build(self.algo, ENV, hparams=module.HParams()).hparams
        self.traced = {"init": 0, "step": 0}
        self.programs = {}

    def counted(self):
        def init(key, hparams):
            self.traced["init"] += 1
            return self.algo.init(key, hparams)

        def step(state, hparams):
            self.traced["step"] += 1
            return self.algo.step(state, hparams)

        return self.algo._replace(init=init, step=step)

    def train(self, hparams, seeds, *, devices=1, width=1):
        """Train members and return ``(states, report)`` on the host."""
        mesh = program.mesh(jax.devices()[:devices])
        if (devices, width) not in self.programs:
            self.programs[devices, width] = (
                program.init(self.algo, mesh, width),
                program.chunk(self.algo, mesh, width, NUM_STEPS),
            )
        init, chunk = self.programs[devices, width]
        seeds, hparams = placed((jnp.asarray(seeds, jnp.uint32), hparams), mesh)
        failed_at = placed(jnp.full(len(seeds), program.RUNNING, jnp.int32), mesh)
        states = init(seeds, hparams)
        groups = len(seeds) // devices // (width or len(seeds) // devices)
        (states, _), report = chunk(states, failed_at, hparams, *map(jnp.int32, (0, NUM_STEPS, groups)))
        return host(states), host(report)


@pytest.fixture(scope="module", params=[ppo, dqn], ids=["ppo", "dqn"])
def case(request):
    return Case(request.param)


def placed(tree, mesh):
    return jax.device_put(tree, program.sharding(mesh))


def host(tree):
    return jax.tree.map(
        lambda leaf: np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ),
        tree,
    )


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def assert_same_bits(one, other):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def grid_of_four(case):
    return sweep.grid(case.single, learning_rate=[1e-4, 1e-3, 1e-2, 3e-3])


def test_a_member_computed_by_itself_is_the_run_alone_bit_for_bit(case):
    hparams = grid_of_four(case)
    states, _ = case.train(hparams, [0, 7, 0, 7])
    numbers = member(hparams, 1)
    solo = jax.jit(case.algo.init)(members.key_of(jnp.uint32(7), members.INIT), numbers)
    for _ in range(NUM_STEPS):
        solo, _ = jax.jit(case.algo.step)(solo, numbers)
    assert_same_bits(member(states, 1), host(solo))


def test_members_do_not_depend_on_the_number_of_devices_or_on_each_other(case):
    hparams = grid_of_four(case)
    states, _ = case.train(hparams, [0, 1, 2, 3])
    sharded, _ = case.train(hparams, [0, 1, 2, 3], devices=2)
    assert_same_bits(states, sharded)
    # every member between other neighbours
    order = np.array([2, 0, 3, 1])
    shuffled, _ = case.train(jax.tree.map(lambda leaf: leaf[order], hparams), order)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[order], states), shuffled)


@pytest.mark.optimized(False)
def test_side_by_side_is_one_by_one_to_rounding(case):
    hparams = grid_of_four(case)
    alone, _ = case.train(hparams, [0, 1, 2, 3])
    for width in (2, None):
        together, _ = case.train(hparams, [0, 1, 2, 3], width=width)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(alone.params), jax.tree.leaves(together.params), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-3, err_msg=jax.tree_util.keystr(path))


def test_no_two_members_share_a_random_stream(case):
    hparams = members.broadcast(case.single, 4)
    states, _ = case.train(hparams, [0, 1, 2, 3])
    for leaves in (states.params, states.key, states.rollout):
        distinct = {b"".join(leaf[i].tobytes() for leaf in jax.tree.leaves(leaves)) for i in range(4)}
        assert len(distinct) == 4


def test_any_values_of_any_leaf_are_one_compilation(case):
    traced = case.counted()
    mesh = program.mesh(jax.devices()[:1])
    # the very programs of the other tests, found in the compilation cache
    init, chunk = program.init(traced, mesh, 1), program.chunk(traced, mesh, 1, NUM_STEPS)
    seeds = placed(jnp.arange(4, dtype=jnp.uint32), mesh)

    def train(states, hparams):
        failed_at = placed(jnp.full(4, program.RUNNING, jnp.int32), mesh)
        chunk(states, failed_at, hparams, *map(jnp.int32, (0, 1, 4)))

    for name in [None, *members.names(case.single)]:
        leaf = None if name is None else np.asarray(members.names(case.single)[name])
        if leaf is not None and leaf.ndim:
            continue
        values = {} if name is None else {name: [leaf.item() + i for i in range(4)]}
        hparams = sweep.grid(case.single, **values) if values else members.broadcast(case.single, 4)
        hparams = placed(hparams, mesh)
        states = init(seeds, hparams)
        if name is None:  # training is compiled once; that it serves every leaf is in the shapes it was given
            train(states, hparams)
            first = dict(case.traced)
            shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), hparams)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), hparams) == shapes
    train(init(seeds, hparams), hparams)
    assert case.traced == first == {"init": 1, "step": 1}


def test_a_bad_member_costs_itself_only(case):
    healthy = grid_of_four(case)
    bad = dataclasses.replace(healthy, learning_rate=healthy.learning_rate.at[1].set(jnp.inf))
    without, _ = case.train(healthy, [0, 1, 2, 3])
    states, report = case.train(bad, [0, 1, 2, 3])
    failed_at = report.failed_at
    assert failed_at[1] in (1, 2)
    assert (np.delete(failed_at, 1) == program.RUNNING).all()
    for i in (0, 2, 3):
        assert_same_bits(member(states, i), member(without, i))
    # set back to where the chunk began: finite, and what the values were is in the report
    assert all(np.isfinite(leaf[1]).all() for leaf in jax.tree.leaves(states.params))
    assert not all(np.isfinite(values[1]) for values in report.at_failure.values())
    assert np.isfinite(report.at_failure["loss"][0])


def test_a_sweep_over_the_environment_is_trained_and_evaluated_in_it(case):
    short = sweep.grid(case.single, **{"env.max_steps_in_episode": [5, 500]})
    short = jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, leaf]), short
    )  # four, as the other tests compile
    case.train(short, [0, 0, 1, 1])
    mesh = program.mesh(jax.devices()[:1])
    seeds, short = placed((jnp.asarray([0, 0, 1, 1], jnp.uint32), short), mesh)
    evaluate = program.evaluate(case.algo, ENV, mesh, 1, 3)
    init = case.programs[1, 1][0](seeds, short)
    evaluation = evaluate(init, seeds, short)
    for i in (0, 2):
        assert evaluation.episode_length_mean[i] == 5
        assert evaluation.episode_return_max[i] == 5
        assert evaluation.episode_length_mean[i + 1] > 5


@pytest.mark.optimized(False)
def test_batch_is_an_algorithm_like_any_other(case):
    many = sweep.batch(case.algo)
    keys, hparams = sweep.product(sweep.seeds(2), sweep.grid(case.single, learning_rate=[1e-4, 1e-2]))
    state = many.init(keys, hparams)
    state, metrics = jrl.train(many, state, hparams, num_steps=2)
    assert metrics["loss"].shape == (2, 4)
    policy = many.policy(state)
    obs = jnp.zeros((4, 3, 4))
    action, _, _ = policy(jax.random.key(0), obs)
    assert action.shape == (4, 3)
    for i in range(4):
        alone, _, _ = case.algo.policy(member(state, i))(jax.random.key(0), obs[i])
        np.testing.assert_array_equal(action[i], alone)
    assert many.policy(state).apply is policy.apply  # a new policy does not compile anew


def test_a_width_that_does_not_divide_is_refused(case):
    with pytest.raises(ValueError, match="width=3 does not divide the 4 members"):
        sweep.batch(case.algo, width=3).init(sweep.seeds(4), members.broadcast(case.single, 4))
