"""One stage after another: what a run starts from, and how much sooner it arrives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import dqn, grpo, networks, ppo, sac, stages, tabular
from jrl.envs import to_mdp
from jrl.language import tasks
from jrl.ops import mdp
from jrl.types import Discrete, MaskedObservation, MultiDiscrete, Network

GAMMA = 0.95
SIZES = {"num_envs": 4, "batch_size": 8, "capacity": 64, "warmup_env_steps": 32, "hidden_sizes": (8,)}


def fresh(module, env="CartPole-v1", **choices):
    algo = module.make(jrl.make(env), module.Config(**choices))
    return algo, jax.jit(algo.init)(jax.random.key(0), module.HParams())


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_warm_start_replaces_parameters_and_targets_and_shares_nothing():
    algo, state = fresh(dqn, **SIZES)
    other = jax.tree.map(lambda leaf: leaf + 1.0, state.params)
    warm = jrl.warm_start(state, other)
    assert_equal(warm.params, other)
    assert_equal(warm.target_params, other)
    assert_equal(warm.opt_state, state.opt_state)
    jax.jit(algo.step, donate_argnums=0)(warm, dqn.HParams())  # no buffer twice
    assert_equal(other, jax.tree.map(lambda leaf: leaf + 1.0, state.params))


@pytest.mark.parametrize(("choices", "kept"), [({}, True), ({"penalty": "none"}, False)])
def test_a_policy_of_texts_is_kept_near_what_it_starts_from(choices, kept):
    env = tasks.random_rewards(3, 2)
    algo = grpo.make(env, grpo.Config(num_prompts=1, group_size=2, hidden_sizes=(4,), **choices))
    hparams = grpo.HParams(kl_coef=0.1)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    params = jax.tree.map(lambda leaf: leaf + 1.0, state.params)
    warm = jrl.warm_start(state, params)
    assert_equal(warm.reference, params if kept else ())
    metrics = jax.jit(algo.step, donate_argnums=0)(warm, hparams)[1]
    np.testing.assert_allclose(metrics["kl"], 0.0, atol=1e-6)


def test_a_part_of_the_parameters():
    _, state = fresh(sac, "Pendulum-v1", **SIZES)
    critic = jax.tree.map(lambda leaf: leaf + 1.0, state.params["critic"])
    warm = jrl.warm_start(state, {"critic": critic})
    assert_equal(warm.params["critic"], critic)
    assert_equal(warm.target_critic, critic)
    assert_equal(warm.params["actor"], state.params["actor"])


def test_parameters_of_another_network():
    _, state = fresh(dqn, **SIZES)
    _, wider = fresh(dqn, **SIZES | {"hidden_sizes": (16,)})
    with pytest.raises(
        ValueError, match=r"\['kernel'\] is float32\[16, 2\], where the algorithm has float32\[8, 2\]"
    ):
        jrl.warm_start(state, wider.params)
    with pytest.raises(
        ValueError, match=r"is missing, where the algorithm has .*: the networks must be built alike"
    ):
        jrl.warm_start(state, {"params": {}})


@pytest.mark.parametrize(("data", "sizes", "message"), [
    ((jnp.zeros((100, 4)), jnp.zeros(50)), {}, r"data\[0\] \[100, 4\], data\[1\] \[50\]: all need one leading axis"),
    ((jnp.zeros((0, 4)), jnp.zeros(0)), {}, r"data\[0\] \[0, 4\], .* at least 1"),
    ({"x": jnp.zeros(3), "y": 1.0}, {}, r"data\['x'\] \[3\], data\['y'\] \[\]"),
    ((), {}, r"shapes \(none\)"),
    (jnp.zeros(3), {"batch_size": 0}, r"fit\(batch_size=0\): must be an integer of at least 1"),
    (jnp.zeros(3), {"num_steps": 2.5}, r"fit\(num_steps=2\.5\): must be an integer of at least 1"),
])  # fmt: skip
def test_data_that_cannot_be_fitted(data, sizes, message):
    with pytest.raises(ValueError, match=message):
        stages.fit(
            jax.random.key(0),
            lambda params, batch: params,
            jnp.float32(0),
            data,
            **{"num_steps": 2, "batch_size": 4} | sizes,
        )


def test_distilling_leaves_out_what_a_mask_forbids():
    """Of three actions two are allowed: the divergence is that of the two, whatever the third is said to be worth."""
    student = Network(lambda key, obs, memory: (), lambda params, obs, memory: (jnp.zeros((1, 3)), ()))
    obs = MaskedObservation(jnp.zeros((1, 2)), jnp.array([[True, False, True]]))
    p = 1.0 / (1.0 + np.exp(-2.0))
    expected = np.log(2.0) + p * np.log(p) + (1 - p) * np.log(1 - p)
    for worth in (100.0, jnp.finfo(jnp.float32).min):
        q = jnp.array([[0.2, worth, 0.0]])
        value = stages.distillation_loss(student, temperature=0.1)((), (obs, q))
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_cloning_sees_the_mask_as_ppo_does():
    env = jrl.envs.action_mask(jrl.make("CartPole-v1"), lambda obs, params: jnp.array([True, False]))
    network = networks.as_network(networks.actor_critic(env, ppo.Config(hidden_sizes=(8,))))
    params = network.init(jax.random.key(0), jnp.zeros(4), ())
    obs = MaskedObservation(jnp.ones((5, 4)), jnp.tile(jnp.array([True, False]), (5, 1)))
    loss = stages.cloning_loss(network, env.action)
    # One action is allowed: it has all the probability. Without the mask two share it.
    assert loss(params, (obs, jnp.zeros(5, jnp.int32))) == 0.0
    assert loss(params, (obs.obs, jnp.zeros(5, jnp.int32))) > 0.1


@pytest.mark.parametrize(
    ("space", "inside", "outside"),
    [
        (Discrete(2), [[0, 1]], [[0, 2], [-1, 0]]),
        (MultiDiscrete((3, 2)), [[[2, 1], [0, 0]]], [[[2, 1], [0, 2]], [[2, -1], [0, 0]]]),
    ],
)
def test_an_action_outside_of_the_space_is_seen_in_the_loss(space, inside, outside):
    """It counted as one as likely as the best, whose gradient made all others less likely."""
    width = space.n if isinstance(space, Discrete) else sum(space.ns)
    network = Network(lambda *_: (), lambda params, obs, memory: ((jnp.zeros((2, width)), 0.0), memory))
    loss = stages.cloning_loss(network, space)
    for actions, expected in ((inside, np.log(2) + np.log(3) * (width > 2)), (outside, np.nan)):
        for action in actions:
            np.testing.assert_allclose(loss((), (jnp.zeros((2, 1)), jnp.array(action))), expected, rtol=1e-6)


# -------------------------------------------------------------------------------- how much sooner it arrives


@functools.cache
def grid():
    """The 8×8 grid with its goal in a corner, begun anywhere; its process, the chances to start, and the solution."""
    env = jrl.make("GridWorld-jrl", rows=8, columns=8, goals=(63,), traps=(54,), start=-1)
    process, start, _ = to_mdp(env, GAMMA)
    return env, process, start, mdp.value_iteration(process)


def linear_q():
    """A table as a network: with one-hot observations the weights are Q."""
    return Network(
        init=lambda key, obs, memory: 0.01 * jax.random.normal(key, (64, 4)),
        apply=lambda params, obs, memory: (obs @ params, memory),
    )


def env_steps_to_95_percent(algo, state, hparams, num_steps, head):
    """Environment steps until the greedy policy is worth 95 % of the optimum, exactly evaluated over all starts."""
    _, process, start, solution = grid()

    def step(state, _):
        state, _ = algo.step(state, hparams)
        greedy = mdp.greedy_policy(head(state.params, jnp.eye(64)))
        return state, start @ mdp.evaluate_policy(process, greedy)

    _, value = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps))(state)
    optimum = float(start @ solution.value)
    reached = np.asarray(value) >= 0.95 * optimum
    assert reached.any(), f"best {value.max()} of {optimum}"
    return (int(np.argmax(reached)) + 1) * algo.env_steps_per_step


@pytest.mark.slow
def test_ppo_after_cloning_noisy_demonstrations_needs_half_the_steps():
    env, _, _, solution = grid()
    config = ppo.Config(num_envs=16, unroll_length=32, hidden_sizes=(32,))
    algo, network = ppo.make(env, config), networks.actor_critic(env, config)
    hparams = ppo.HParams(gamma=GAMMA, learning_rate=3e-3)

    def head(params, obs):
        return network.apply(params, obs, ())[0][0]

    demonstration_key, noise_key, fit_key = jax.random.split(jax.random.key(1), 3)
    cells = jax.random.randint(demonstration_key, (400,), 0, 64)
    best = solution.policy.argmax(-1)[cells].astype(jnp.int32)
    # A third of the demonstrated actions are any action.
    noise = jax.random.randint(noise_key, (2, 400), 0, 12)
    action = jnp.where(noise[0] < 4, noise[1] % 4, best)
    ratios = []
    for seed in range(3):
        cold = jax.jit(algo.init)(jax.random.key(seed), hparams)
        params, losses = stages.fit(
            fit_key,
            stages.cloning_loss(network, env.action),
            cold.params,
            (jnp.eye(64)[cells], action),
            num_steps=300,
            batch_size=64,
        )
        assert losses[-20:].mean() < losses[:20].mean()
        warm = jrl.warm_start(cold, params)
        steps = [env_steps_to_95_percent(algo, state, hparams, 300, head) for state in (warm, cold)]
        ratios.append(steps[0] / steps[1])
    assert np.median(ratios) <= 0.5, ratios


@pytest.mark.slow
def test_dqn_from_a_table_needs_half_the_steps():
    env, *_ = grid()
    table = tabular.make(env, tabular.Config(unroll_length=100))
    numbers = tabular.HParams(gamma=GAMMA)
    learned = jax.jit(table.init)(jax.random.key(5), numbers)
    learned, _ = jrl.train(table, learned, numbers, num_steps=300)
    config = dqn.Config(num_envs=8, unroll_length=4, capacity=8192, warmup_env_steps=256, num_updates=4)
    algo = dqn.make(env, config, network=linear_q())
    hparams = dqn.HParams(gamma=GAMMA, learning_rate=1e-2, epsilon_env_steps=5_000.0, target_period=320.0)
    ratios = []
    for seed in range(3):
        cold = jax.jit(algo.init)(jax.random.key(seed), hparams)
        warm = jrl.warm_start(cold, learned.params)
        steps = [
            env_steps_to_95_percent(algo, state, hparams, 2000, lambda params, obs: obs @ params)
            for state in (warm, cold)
        ]
        ratios.append(steps[0] / steps[1])
    assert np.median(ratios) <= 0.5, ratios
