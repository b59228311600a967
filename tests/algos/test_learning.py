"""Both algorithms learn the probes, whose values are known exactly. A wrong value names a definite fault."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import a2c, dqn, networks, ops, ppo, pqn, r2d2, rainbow, reinforce, replay, sac, td3
from jrl.envs import action_mask, from_functions, probes, transform_action

GAMMA = 0.9
DISCRETE = [
    probes.CONSTANT,
    probes.OBSERVATION,
    probes.DISCOUNT,
    probes.ACTION,
    probes.POLICY,
    probes.TRUNCATION,
    probes.SUCCESSOR,
    probes.BOTH_FLAGS,
]


def trained(module, env, config, num_steps, **numbers):
    """The algorithm and its state after ``num_steps``, the step size annealed to 0."""
    algo = module.make(env, config)
    horizon = num_steps * algo.env_steps_per_step
    hparams = module.HParams(gamma=GAMMA, anneal_env_steps=float(horizon), **numbers)

    @jax.jit  # one program, without metrics: two of them take a fifth longer to compile
    def run(key, hparams):
        return jrl.train(algo, algo.init(key, hparams), hparams, num_steps=num_steps)[0]

    return algo, run(jax.random.key(0), hparams)


@functools.cache
def ppo_on(probe):
    config = ppo.Config(
        num_envs=16, unroll_length=16, num_minibatches=2, hidden_sizes=(16,), clip_value=False
    )
    return trained(ppo, probe.env, config, 300, learning_rate=1e-2, entropy_coef=0.0)


def train_dqn(env, numbers=(), module=dqn, **choices):
    sizes = {"num_envs": 16, "unroll_length": 4, "num_updates": 8, "batch_size": 64, "hidden_sizes": (16,)}
    config = module.Config(capacity=4096, warmup_env_steps=512, **(sizes | choices))
    numbers = {"target_period": 192.0, "tau": 0.05, "epsilon_end": 0.5, "epsilon_env_steps": 1.0} | dict(
        numbers
    )
    return trained(module, env, config, 1000, learning_rate=1e-2, **numbers)


@functools.cache
def dqn_on(probe):
    return train_dqn(probe.env)


def assert_values(values, expected, tolerance):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(values, expected, atol=tolerance * scale)


@pytest.mark.parametrize("probe", DISCRETE, ids=lambda probe: probe.id)
def test_ppo_learns_the_value_and_the_policy(probe):
    algo, state = ppo_on(probe)
    action, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    assert_values(extras["value"], probe.value(GAMMA), 0.01 if probe is probes.TRUNCATION else 0.05)
    if probe.optimal_actions is not None:
        np.testing.assert_array_equal(action, probe.optimal_actions)


@pytest.mark.parametrize("probe", DISCRETE, ids=lambda probe: probe.id)
def test_dqn_learns_the_action_values(probe):
    algo, state = dqn_on(probe)
    action, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    assert_values(extras["q"], probe.q(GAMMA), 0.01 if probe is probes.TRUNCATION else 0.05)
    if probe.optimal_actions is not None:
        np.testing.assert_array_equal(action, probe.optimal_actions)


def test_ppo_learns_a_continuous_action():
    probe = probes.CONTINUOUS
    algo, state = ppo_on(probe)
    action, _, _ = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    np.testing.assert_allclose(action, probe.optimal_actions, atol=0.1)


@functools.cache
def a2c_on(probe):
    config = a2c.Config(num_envs=16, unroll_length=8, hidden_sizes=(16,), vtrace=True, num_updates=2)
    return trained(a2c, probe.env, config, 600, learning_rate=1e-2, entropy_coef=0.0)


@pytest.mark.parametrize(
    "probe",
    [probes.POLICY, probes.TRUNCATION, probes.SUCCESSOR, probes.BOTH_FLAGS],
    ids=lambda probe: probe.id,
)
def test_a2c_learns_the_value_and_the_policy(probe):
    algo, state = a2c_on(probe)
    action, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    assert_values(extras["value"], probe.value(GAMMA), 0.05)
    if probe.optimal_actions is not None:
        np.testing.assert_array_equal(action, probe.optimal_actions)


def test_reinforce_bootstraps_a_time_limit_from_its_value():
    """Only the first window of 16 steps is seen of an episode of 40, and only truncated."""
    probe = probes.TRUNCATION
    config = reinforce.Config(num_envs=8, unroll_length=16, hidden_sizes=(16,))
    for max_steps in (5, 40):
        algo, state = trained(reinforce, probe.make({"max_steps": max_steps}), config, 400)
        _, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
        assert_values(extras["value"], probe.value(GAMMA), 0.05)


def replay_on(module, env, num_steps=600, hparams=(), **choices):
    """An algorithm with a replay, its state, and the lowest of its critics."""
    config = module.Config(
        num_envs=16,
        unroll_length=2,
        num_updates=8,
        batch_size=64,
        capacity=4096,
        warmup_env_steps=512,
        truncation_gap=1,
        hidden_sizes=(16,),
        **choices,
    )
    algo, state = trained(module, env, config, num_steps, learning_rate=1e-2, tau=0.05, **dict(hparams))
    num = 1 if choices.get("variant") == "ddpg" else 2
    critic = networks.critics(env, config, num)
    return algo, state, lambda inputs: critic.apply(state.params["critic"], inputs, ())[0].min(-2)


COLD = {"learn_temperature": False, "hparams": {"temperature": 1e-3}}


@pytest.mark.parametrize(
    "probe", [probes.POLICY, probes.SUCCESSOR, probes.BOTH_FLAGS], ids=lambda probe: probe.id
)
def test_discrete_sac_learns_the_action_values(probe):
    algo, state, values = replay_on(sac, probe.env, **COLD)
    obs = jnp.asarray(probe.observations)
    assert_values(values(obs), probe.q(GAMMA), 0.05)
    if probe.optimal_actions is not None:
        action, _, _ = algo.policy(state)(jax.random.key(0), obs)
        np.testing.assert_array_equal(action, probe.optimal_actions)


CONTINUOUS = [(sac, COLD), (td3, {}), (td3, {"variant": "ddpg"})]


def indifferent(env, space):
    """A probe that does not look at actions, with other ones."""
    return transform_action(env, lambda action: jnp.int32(0), space)


@pytest.mark.parametrize(("module", "choices"), CONTINUOUS, ids=["sac", "td3", "ddpg"])
def test_continuous_actions_are_learned(module, choices):
    probe = probes.CONTINUOUS
    algo, state, _ = replay_on(module, probe.env, 1000, **choices)
    action, _, _ = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    np.testing.assert_allclose(action, probe.optimal_actions, atol=0.1)


@pytest.mark.parametrize(("module", "choices"), CONTINUOUS, ids=["sac", "td3", "ddpg"])
def test_values_of_continuous_actions_go_beyond_a_time_limit(module, choices):
    probe = probes.SUCCESSOR
    env = indifferent(probe.env, jrl.Box((1,), -1.0, 1.0))
    _, _, values = replay_on(module, env, **choices)
    obs = jnp.asarray(probe.observations)
    assert_values(values((obs, jnp.zeros((2, 1))))[:, 0], probe.value(GAMMA), 0.05)


def test_the_temperature_holds_the_entropy_at_its_target():
    """Rewards that depend on nothing: the entropy is the temperature's to choose."""
    env = probes.CONSTANT.env
    ratio = 0.6
    _, state, _ = replay_on(sac, env, hparams={"target_entropy_ratio": ratio, "temperature": 0.1})
    assert np.exp(state.params["log_temperature"]) < 0.1  # a uniform policy has too much
    algo, state, _ = replay_on(
        sac, indifferent(env, jrl.Box((1,), 0.0, 4.0)), hparams={"target_entropy": 0.3, "temperature": 0.1}
    )
    _, metrics = jax.jit(algo.step)(state, sac.HParams(target_entropy=0.3, learning_rate=0.0))
    assert abs(metrics["entropy"] - (0.3 + np.log(2.0))) < 0.15


def test_the_temperature_asks_for_no_more_entropy_than_masks_leave():
    """Both actions are allowed in one state of four; in the others the entropy is 0 whatever the temperature."""

    def observe(state):
        return (jnp.arange(4) == state % 4).astype(jnp.float32)

    env = action_mask(
        from_functions(
            lambda key, params: (jnp.int32(0), observe(jnp.int32(0))),
            lambda key, state, action, params: (
                state + 1,
                observe(state + 1),
                action.astype(jnp.float32),
                False,
                state + 1 >= 8,
            ),
            (),
            jrl.Discrete(2),
            "one choice in four",
        ),
        lambda obs, params: jnp.stack([jnp.bool_(True), obs[0] > 0.0]),
    )
    algo, state, _ = replay_on(sac, env, hparams={"target_entropy_ratio": 0.6, "temperature": 0.1})
    # 0.6 log 2 is the entropy of choosing the better action with probability 0.854, and α = 1 / log(0.854 / 0.146).
    np.testing.assert_allclose(np.exp(state.params["log_temperature"]), 0.566, atol=0.05)
    _, metrics = jax.jit(algo.step)(state, sac.HParams(learning_rate=0.0))
    np.testing.assert_allclose(metrics["entropy"], 0.6 * np.log(2.0) / 4.0, atol=0.02)


@pytest.mark.parametrize("module", [dqn, pqn])
def test_the_values_reported_are_those_of_actions_that_are_allowed(module):
    """Action 0 is worth 1000, but never allowed."""
    env = action_mask(probes.CONSTANT.env, lambda obs, params: jnp.array([False, True]))
    network = (
        lambda key, obs: jnp.array([1000.0, 1.0]),
        lambda q, obs: jnp.broadcast_to(q, (*obs.shape[:-1], 2)),
    )
    sizes = {"num_envs": 2, "unroll_length": 4, "num_minibatches": 1}
    if module is dqn:
        sizes = {"num_envs": 2, "batch_size": 4, "capacity": 16, "warmup_env_steps": 8}
    algo = module.make(env, module.Config(**sizes), network=network)
    hparams = module.HParams(learning_rate=0.0)
    _, metrics = jax.jit(algo.step)(algo.init(jax.random.key(0), hparams), hparams)
    np.testing.assert_allclose(metrics["q"], 1.0)


def test_no_entropy_bonus_at_all_is_finite():
    algo = sac.make(
        probes.CONSTANT.env, sac.Config(learn_temperature=False, hidden_sizes=(4,), warmup_env_steps=64)
    )
    state = jax.jit(algo.init)(jax.random.key(0), sac.HParams(temperature=0.0))
    state, metrics = jax.jit(algo.step)(state, sac.HParams(temperature=0.0))
    assert all(np.isfinite(value) for value in metrics.values())
    # Or a run and a sweep would stop, as they do at any parameter that is not.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(metrics["loss"], metrics["critic_loss"] + metrics["actor_loss"], rtol=1e-5)


def test_a_transition_whose_successor_is_lost_has_no_priority():
    """Cut every 5 steps with 16 sharing a slot: no batch may fill with those that teach nothing."""

    def reset(key, params):
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        return (sign, 0), sign[None]

    def transition(key, state, action, params):
        sign, time = state
        return (sign, time + 1), sign[None], sign, False, time + 1 >= 5

    env = from_functions(reset, transition, (), jrl.Discrete(2), "cut every 5 steps")
    _, state = train_dqn(env, {"epsilon_env_steps": 0.0}, prioritized=True, truncation_gap=16)
    key = jax.random.key(1)
    weight = replay.prioritized.sample(key, state.replay, 4096, 16, 1, beta=0.4).weight
    uniform = replay.uniform.sample(key, state.replay.ring, 4096, 16, 1).weight
    assert (uniform == 0.0).mean() > 0.05
    assert (weight == 0.0).mean() < (uniform == 0.0).mean()


def ppo_with_memory(probe, memory, **numbers):
    config = ppo.Config(
        num_envs=16,
        unroll_length=16,
        num_minibatches=2,
        hidden_sizes=(16,),
        clip_value=False,
        memory=memory,
        memory_size=8,
        memory_window=4,
    )
    return trained(ppo, probe.env, config, 300, entropy_coef=0.0, **numbers)


@pytest.mark.parametrize("memory", ["none", "gru", "transformer"])
def test_only_with_a_memory_ppo_answers_what_was_shown_before(memory):
    """The return is -1 or 1, so that a greedy policy without memory gets 0 on average, whatever it does."""
    probe = probes.MEMORY
    algo, state = ppo_with_memory(probe, memory, learning_rate=1e-2)
    policy = algo.policy(state)
    stats = jrl.evaluate(jax.random.key(1), probe.env, policy, num_episodes=256)
    obs = jnp.asarray(probe.observations)
    _, _, extras = policy(jax.random.key(0), obs, policy.init_memory((2,)))
    if memory == "none":
        assert abs(stats.episode_return.mean()) < 0.25
    else:
        assert stats.episode_return.min() == 1.0
        assert_values(extras["value"], probe.value(GAMMA), 0.05)


def test_with_a_memory_a_time_limit_is_bootstrapped_from_what_its_episode_remembers():
    """One parameter for all steps: a value of r / (1 − γ) needs every bootstrap to be right."""
    probe = probes.SUCCESSOR
    algo, state = ppo_with_memory(probe, "gru", learning_rate=1e-2)
    policy = algo.policy(state)
    obs = jnp.asarray(probe.observations)
    _, memory, first = policy(jax.random.key(0), obs[:1], policy.init_memory((1,)))
    _, _, second = policy(jax.random.key(0), obs[1:], memory)
    values = np.concatenate([first["value"], second["value"]])
    assert_values(values, probe.value(GAMMA), 0.05)


def test_normalised_rewards_scale_the_truncation_probe():
    """Rewards of 100: scaled by the spread of the returns, the policy still sees the whole future."""
    probe = probes.TRUNCATION
    env = probe.make({"reward": 100.0})
    config = ppo.Config(
        num_envs=16, unroll_length=16, num_minibatches=2, hidden_sizes=(16,), normalize_rewards=True
    )
    algo, state = trained(ppo, env, config, 300, learning_rate=1e-2, entropy_coef=0.0)
    _, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    spread = np.sqrt(np.asarray(jrl.normalize.variance(state.reward_scaling.statistics)))
    assert 10.0 < spread < 1000.0
    assert_values(np.asarray(extras["value"]) * spread, 100.0 / (1 - GAMMA) * np.ones(1), 0.05)


@pytest.mark.parametrize(
    "choices",
    [{"n_step": 3}, {"prioritized": True}, {"polyak": True}, {"dueling": True, "double": False}],
    ids=str,
)
def test_every_refinement_of_dqn_keeps_the_value_of_the_truncation_probe(choices):
    probe = probes.TRUNCATION
    algo, state = train_dqn(probe.env, **choices)
    _, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    assert_values(extras["q"].max(-1), probe.value(GAMMA), 0.01)


@pytest.mark.parametrize("distribution", ["categorical", "implicit"])
def test_every_distribution_of_dqn_has_the_mean_of_the_truncation_probe(distribution):
    """The categorical one as part of Rainbow, evaluated without its noise."""
    probe = probes.TRUNCATION
    if distribution == "categorical":
        numbers = {"value_min": 0.0, "value_max": 20.0}
        algo, state = train_dqn(probe.env, numbers, rainbow, num_atoms=21)
    else:
        algo, state = train_dqn(probe.env, distribution=distribution, num_atoms=4, batch_size=16)
    _, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    assert_values(extras["q"].max(-1), probe.value(GAMMA), 0.02)


def test_munchausen_values_are_those_of_its_own_fixed_point():
    """Of quantiles. Both actions are worth the same: π = ½, so Q = r + α τ log ½ + γ (Q + τ log 2)."""
    probe, alpha, temperature = probes.TRUNCATION, 0.5, 0.5
    numbers = {"munchausen_coef": alpha, "munchausen_temperature": temperature, "munchausen_min": -10.0}
    algo, state = train_dqn(probe.env, numbers, munchausen=True, distribution="quantile", num_atoms=8)
    _, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    expected = (1.0 + (GAMMA - alpha) * temperature * np.log(2.0)) / (1.0 - GAMMA)
    assert_values(extras["q"].max(-1), np.array([expected]), 0.02)


@pytest.mark.parametrize(
    "probe", [probes.POLICY, probes.SUCCESSOR, probes.TRUNCATION, probes.BOTH_FLAGS], ids=lambda p: p.id
)
def test_pqn_learns_the_action_values(probe):
    """Windows of 8 steps are full of episode ends, of one kind, the other, or both at once."""
    config = pqn.Config(num_envs=16, unroll_length=8, num_minibatches=4, hidden_sizes=(16,))
    numbers = {"epsilon_end": 0.5, "epsilon_env_steps": 1.0}
    algo, state = trained(pqn, probe.env, config, 500, learning_rate=1e-2, **numbers)
    action, _, extras = algo.policy(state)(jax.random.key(0), jnp.asarray(probe.observations))
    assert_values(extras["q"], probe.q(GAMMA), 0.02)
    if probe.optimal_actions is not None:
        np.testing.assert_array_equal(action, probe.optimal_actions)


def train_r2d2(env, memory="gru", n_step=3):
    config = r2d2.Config(
        num_envs=16,
        unroll_length=4,
        num_updates=4,
        batch_size=16,
        burn_in=2,
        learn_length=6,
        capacity=4096,
        truncation_gap=1,
        warmup_env_steps=512,
        n_step=n_step,
        memory=memory,
        memory_size=8,
        hidden_sizes=(16,),
    )
    numbers = {"target_period": 192.0, "epsilon_end": 0.5, "epsilon_env_steps": 1.0}
    return trained(r2d2, env, config, 1000, learning_rate=1e-2, **numbers)


@pytest.mark.parametrize("memory", ["gru", "none"])
def test_only_with_a_memory_r2d2_answers_what_was_shown_before(memory):
    """The return is -1 or 1, so that a greedy policy without memory gets 0 on average, whatever it does.

    One-step targets: longer ones would hold the random actions that ε = ½ takes.
    """
    probe = probes.MEMORY
    algo, state = train_r2d2(probe.env, memory, n_step=1)
    policy = algo.policy(state)
    stats = jrl.evaluate(jax.random.key(1), probe.env, policy, num_episodes=256)
    if memory == "none":
        assert abs(stats.episode_return.mean()) < 0.25
        return
    assert stats.episode_return.min() == 1.0
    obs = jnp.asarray(probe.observations)
    _, _, extras = policy(jax.random.key(0), obs, policy.init_memory((2,)))
    assert_values(ops.unscale_value(extras["q"].max(-1)), probe.value(GAMMA), 0.05)


@pytest.mark.parametrize("probe", [probes.SUCCESSOR, probes.BOTH_FLAGS], ids=lambda probe: probe.id)
def test_r2d2_bootstraps_a_time_limit_from_what_its_episode_remembers(probe):
    """An observation after the other, as an episode shows them.

    Episodes of 8 steps: the step after a cut is never learned, and must look to the GRU like those before it.
    """
    algo, state = train_r2d2(probe.env if probe is probes.BOTH_FLAGS else probe.make({"max_steps": 8}))
    policy = algo.policy(state)
    memory, q = policy.init_memory((1,)), []
    for obs in jnp.asarray(probe.observations):
        _, memory, extras = policy(jax.random.key(0), obs[None], memory)
        q.append(ops.unscale_value(extras["q"][0]))
    assert_values(np.stack(q), probe.q(GAMMA), 0.05)


@pytest.mark.slow
def test_double_takes_the_overestimation_of_ten_equal_actions_away():
    """Rewards from N(0, 1) for ever, whatever one does: every value is 0. At most 20 % of it may be left."""

    def transition(key, state, action, params):
        return state, jnp.ones(1), jax.random.normal(key), False, False

    env = jrl.envs.from_functions(
        lambda key, params: ((), jnp.ones(1)), transition, (), jrl.Discrete(10), "ten actions of mean zero"
    )

    def overestimation(double):
        sizes = {"num_envs": 32, "unroll_length": 4, "num_updates": 4, "batch_size": 32, "capacity": 65_536}
        config = dqn.Config(
            **sizes, warmup_env_steps=2_048, hidden_sizes=(32,), layer_norm=False, double=double
        )
        algo = dqn.make(env, config)
        hparams = dqn.HParams(
            gamma=GAMMA, learning_rate=1e-2, anneal_env_steps=0.0, epsilon_end=1.0, target_period=6_400.0
        )
        state = jax.jit(algo.init)(jax.random.key(0), hparams)
        values = []
        for _ in range(10):
            state, _ = jrl.train(algo, state, hparams, num_steps=150)
            values.append(algo.policy(state)(jax.random.key(0), jnp.ones((1, 1)))[2]["q"].mean())
        return np.mean(values[5:])

    single = overestimation(double=False)
    assert single > 0.4
    assert abs(overestimation(double=True)) < 0.2 * single
