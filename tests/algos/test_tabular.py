"""Tabular learners: known answers, identities between them, and slow loops written from the equations."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import cli, monte_carlo, tabular
from jrl.envs import counterexamples, grid_world, to_mdp
from jrl.ops import mdp
from jrl.types import FiniteObservation

LEARNERS = 16
GRID = jrl.make("GridWorld-jrl", raw=True)


def start(algo, hparams, learners=LEARNERS, seed=0):
    keys = jax.random.split(jax.random.key(seed), learners)
    return jax.jit(jax.vmap(algo.init, (0, None)))(keys, hparams)


def learn(env, config, num_steps, *, learners=LEARNERS, module=tabular, make=None, **numbers):
    """The final states of many independent learners, and their metrics ``[learners, num_steps]``."""
    algo = module.make(env, config, **(make or {}))
    hparams = module.HParams(**numbers)

    def one(key):  # one program, of whose two parts each would take its time to compile
        return jrl.train(algo, algo.init(key, hparams), hparams, num_steps=num_steps)

    return jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), learners)))


def optimum(env, gamma):
    return jax.device_get(mdp.policy_iteration(jax.jit(lambda: to_mdp(env, gamma).mdp)()))


@functools.cache
def optimum_of_the_grid():
    return optimum(GRID, 0.9)


# ------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"trace": "replacing"},
        {"target": "double_q"},
        {"planning_updates": 5},
        {"exploration": "boltzmann"},
    ],
    ids=str,
)
def test_the_grid_of_the_articles(choices):
    solution = optimum_of_the_grid()
    num_steps = 100 if "planning_updates" in choices else 800
    state, _ = learn(
        GRID, tabular.Config(**choices), num_steps, gamma=0.9, learning_rate=0.5, epsilon_start=1.0
    )
    q = state.params.mean(1) if choices.get("target") == "double_q" else state.params
    assert np.abs(q - solution.q).max() <= 1e-3
    np.testing.assert_allclose(q.max(-1)[:, [0, 10, 11]], [[0.59049, 0.9, 1.0]] * LEARNERS, atol=1e-3)


@pytest.mark.parametrize("target", ["sarsa", "expected_sarsa"])
def test_on_policy_learners_become_optimal_as_their_policy_does(target):
    """ε goes to 0: what they learn is the value of the policy they follow, and that becomes greedy."""
    state, _ = learn(
        GRID, tabular.Config(target=target), 800, gamma=0.9, learning_rate=0.5, epsilon_start=1.0,
        epsilon_end=1e-6, epsilon_env_steps=30_000.0,
    )  # fmt: skip
    np.testing.assert_allclose(state.params.max(-1)[:, 0], 0.59049, atol=1e-3)


def test_the_traffic_light_of_the_articles_is_not_fooled_by_its_time_limit():
    """Every fifth step is a truncation; taken for an end it would make these values far too small."""
    light = jrl.make("TrafficLight-jrl", raw=True, params={"max_steps": 5})
    state, _ = learn(light, tabular.Config(), 200, gamma=0.9, learning_rate=0.5, epsilon_start=0.5)
    np.testing.assert_allclose(state.params, [[[10, 9], [9, 10]]] * LEARNERS, atol=1e-3)
    spoken = jrl.make("TrafficLight-jrl", raw=True, reward="forward_at_green")
    state, _ = learn(
        spoken, tabular.Config(step_size="visits"), 1000, gamma=0.9, learning_rate=1.0,
        step_size_exponent=0.7, epsilon_start=0.5,
    )  # fmt: skip
    value = state.params.max(-1)
    np.testing.assert_allclose(value.mean(0), [4.5, 5.5], atol=0.05)
    np.testing.assert_allclose(value, [[4.5, 5.5]] * LEARNERS, atol=0.2)


def greedy_path(q):
    """Cells of CliffWalking that the greedy policy comes through."""
    cell, cells = 36, []
    while cell != 47 and len(cells) < 60:
        row, column = divmod(cell, 12)
        move = int(np.argmax(q[cell]))
        row = min(max(row + (move == 2) - (move == 0), 0), 3)
        column = min(max(column + (move == 1) - (move == 3), 0), 11)
        cell = row * 12 + column
        cells.append(cell)
    return cells


def test_cliff_walking():
    """Sutton and Barto, example 6.6: Q-learning takes the edge, SARSA with ε = 0.1 the way around."""
    cliff = jrl.make("CliffWalking-jrl", raw=True)
    numbers = {"gamma": 1.0, "epsilon_start": 0.1}
    q_state, q_learning = learn(cliff, tabular.Config(), 800, learning_rate=0.5, **numbers)
    assert [len(greedy_path(q)) for q in q_state.params] == [13] * LEARNERS
    sarsa_state, sarsa = learn(cliff, tabular.Config(target="sarsa"), 800, learning_rate=0.5, **numbers)
    # One noisy table may loop; the mean of sixteen shows the way that all of them take.
    safe = greedy_path(sarsa_state.params.mean(0))
    assert len(safe) == 17
    assert min(safe) < 12  # along the upper edge
    # "Q-learning's online performance is worse": its walks along the edge fall off.
    returns = [
        np.average(m["episode_return"][:, 400:], weights=m["num_episodes"][:, 400:])
        for m in (sarsa, q_learning)
    ]
    assert returns[0] > returns[1] + 10


def epsilon_soft(process, epsilon):
    """The process in which an action is replaced by a random one with chance ε: its Q* is that of SARSA."""

    def soften(x):
        return (1 - epsilon) * x + epsilon * x.mean(1, keepdims=True)

    return process._replace(P=soften(process.P), R=soften(process.R))


def test_sarsa_goes_to_the_best_of_all_policies_as_random_as_its_own():
    """Exactly known: among policies with ε = 0.3 the longest way around the cliff is the best."""
    cliff = jrl.make("CliffWalking-jrl", raw=True)
    best = mdp.policy_iteration(epsilon_soft(to_mdp(cliff, 1.0).mdp, 0.3))
    assert len(greedy_path(np.asarray(best.q))) == 17
    state, _ = learn(
        cliff, tabular.Config(target="expected_sarsa"), 1500, gamma=1.0, learning_rate=0.2, epsilon_start=0.3
    )
    assert [len(greedy_path(q)) for q in state.params] == [17] * LEARNERS
    # Q of SARSA is that of one free action, then the policy: the soft value is their ε-mixture.
    value = 0.7 * state.params.max(-1) + 0.3 * state.params.mean(-1)
    np.testing.assert_allclose(value.mean(0)[36], best.value[36], rtol=0.1)


def test_double_q_is_not_lured():
    """Sutton and Barto, example 6.7: share of left in the first 300 episodes, α = 0.1, ε = 0.1, γ = 1."""
    env = jrl.make("MaximizationBias-jrl", raw=True)
    left = {}
    for target in ("q_learning", "double_q"):
        algo = tabular.make(
            env, tabular.Config(target=target, unroll_length=8), action_mask=counterexamples.BIAS_MASK
        )
        hparams = tabular.HParams(gamma=1.0, learning_rate=0.1, epsilon_start=0.1)
        run = jax.jit(jax.vmap(lambda state: jrl.train(algo, state, hparams, num_steps=64)))  # noqa: B023
        _, metrics = run(start(algo, hparams, 1024))
        count = np.asarray(metrics["num_episodes"])
        # An episode is one step long, or two when it went left.
        wanders = np.asarray(metrics["episode_length"] - 1) * count
        episodes = np.cumsum(count, 1)
        early, late = episodes <= 100, (episodes > 250) & (episodes <= 300)
        left[target] = [(wanders * part).sum() / (count * part).sum() for part in (early, late)]
    # The book's figure: Q-learning first goes left in most episodes; 5 % is what ε = 0.1 cannot avoid.
    assert left["q_learning"][0] > 0.5
    assert left["double_q"][0] < 0.45
    assert left["double_q"][1] < left["q_learning"][1] - 0.02
    assert 0.05 <= left["double_q"][1] < 0.12


def test_dyna_finds_the_shortest_way_by_the_fifth_episode():
    """Sutton and Barto, figure 8.2: 50 planning updates, α = 0.1, γ = 0.95, ε = 0.1; 14 steps."""
    maze = jrl.make("GridWorld-jrl", raw=True, params={"max_steps": 100_000}, **grid_world.DYNA_MAZE)
    process = to_mdp(maze, 1 - 1e-4).mdp
    process = process._replace(R=jnp.ones_like(process.R))  # values are then numbers of steps

    def steps_of_the_greedy_way(planning):
        algo = tabular.make(maze, tabular.Config(planning_updates=planning, unroll_length=8))
        hparams = tabular.HParams(gamma=0.95, learning_rate=0.1, epsilon_start=0.1)

        def until_the_fifth(state):
            def body(carry):
                state, metrics = algo.step(carry[0], hparams)
                return state, carry[1] + metrics["num_episodes"]

            state, _ = jax.lax.while_loop(lambda carry: carry[1] < 5, body, (state, jnp.float32(0)))
            return mdp.evaluate_policy(process, jax.nn.one_hot(state.params.argmax(-1), 4))[18]

        return np.round(jax.jit(jax.vmap(until_the_fifth))(start(algo, hparams, 30)), 1)

    book = steps_of_the_greedy_way(50)
    assert np.median(book) == 14
    assert (book <= 20).all()
    # What is left is a way of 16 where the shorter one was not tried yet, not a lack of planning.
    assert np.mean(book == 14) > 0.5
    assert np.mean(steps_of_the_greedy_way(0) == 14) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("visit", ["first", "every"])
def test_monte_carlo_plays_blackjack(visit):
    """The policies learned are worth what dynamic programming's is, but for 0.02."""
    env = jrl.make("Blackjack-jrl", raw=True)
    model, solution = to_mdp(env, 1.0), optimum(env, 1.0)
    best = float(model.start @ solution.value)
    state, _ = learn(
        env, monte_carlo.Config(visit=visit, unroll_length=64), 3000, learners=64, module=monte_carlo,
        gamma=1.0, epsilon_start=0.5, epsilon_end=0.05, epsilon_env_steps=150_000.0,
    )  # fmt: skip
    policies = jax.nn.one_hot(jnp.argmax(jnp.asarray(state.params), -1), 2)
    worth = jax.vmap(lambda policy: mdp.evaluate_policy(model.mdp, policy))(policies) @ model.start
    assert np.mean(worth) > best - 0.02
    assert np.max(worth) <= best + 1e-5


@pytest.mark.slow
def test_q_learning_plays_blackjack():
    """One learner's policy and the mean of 64 tables, steps 1/n^0.7, against dynamic programming."""
    env = jrl.make("Blackjack-jrl", raw=True)
    model, solution = to_mdp(env, 1.0), optimum(env, 1.0)
    best = float(model.start @ solution.value)
    state, _ = learn(
        env, tabular.Config(step_size="visits"), 3000, learners=64, gamma=1.0, learning_rate=1.0,
        step_size_exponent=0.7, epsilon_start=1.0,
    )  # fmt: skip
    policies = jax.nn.one_hot(jnp.argmax(jnp.asarray(state.params), -1), 2)
    worth = jax.vmap(lambda policy: mdp.evaluate_policy(model.mdp, policy))(policies) @ model.start
    assert np.min(worth) > best - 0.02
    value = state.params.mean(0).max(-1)
    assert abs(float(model.start @ value) - best) < 0.02
    dealt = np.asarray(model.start) > 1e-3
    assert np.abs(value - solution.value)[dealt].mean() < 0.02


# ----------------------------------------------------------------------------------------------- identities


def final(config, num_steps=3, env=GRID, **numbers):
    return learn(
        env, config, num_steps, **{"gamma": 0.9, "learning_rate": 0.5, "initial_scale": 1.0, **numbers}
    )[0]


def test_with_lambda_0_a_trace_changes_nothing():
    plain = final(tabular.Config())
    for trace in ("replacing", "accumulating"):
        np.testing.assert_allclose(
            final(tabular.Config(trace=trace), lam=0.0).params, plain.params, rtol=1e-5
        )
    assert np.abs(final(tabular.Config(trace="replacing"), lam=0.9).params - plain.params).max() > 0.1


def test_a_greedy_expected_sarsa_is_q_learning():
    greedy = {"epsilon_start": 0.0}
    q = final(tabular.Config(), **greedy)
    expected = final(tabular.Config(target="expected_sarsa"), **greedy)
    np.testing.assert_allclose(expected.params, q.params, rtol=1e-5)


@pytest.mark.parametrize("target", ["q_learning", "double_q"])
def test_one_over_n_is_the_mean_of_the_targets(target):
    """γ = 0: each entry is then the mean of its rewards, of each of two tables too (van Hasselt 2010, section 4)."""
    env = jrl.make("RiverSwim-jrl", raw=True)
    config = tabular.Config(step_size="visits", target=target)
    state, _ = learn(env, config, 40, gamma=0.0, learning_rate=1.0, epsilon_start=1.0, initial_value=7.0)
    reward = np.asarray(to_mdp(env, 0.9).mdp.R)
    seen = state.visits > 0
    np.testing.assert_allclose(state.params[~seen], 7.0)
    exact = np.broadcast_to(reward, seen.shape)
    certain = seen & ((exact == 0) | (exact == np.float32(0.005)))
    np.testing.assert_allclose(state.params[certain], exact[certain], atol=1e-6)
    assert state.visits.reshape(LEARNERS, -1).sum(1).tolist() == [40 * 64] * LEARNERS


def test_optimism_tries_everything():
    env = jrl.make("DeepSea-jrl", size=6, raw=True)
    numbers = {"gamma": 1.0, "learning_rate": 1.0, "epsilon_start": 0.0}
    hopeful, _ = learn(env, tabular.Config(), 100, initial_value=2.0, **numbers)
    blind, _ = learn(env, tabular.Config(), 100, **numbers)
    np.testing.assert_allclose(hopeful.params[:, 0].max(-1), 0.99, atol=1e-4)
    assert (blind.params[:, 0].max(-1) < 0.5).mean() > 0.5


def test_confidence_bounds_lead_through_the_deep_sea():
    env = jrl.make("DeepSea-jrl", size=6, raw=True)
    config = tabular.Config(exploration="ucb")
    state, _ = learn(env, config, 200, gamma=1.0, learning_rate=0.5, ucb_coef=1.0)
    found = np.asarray(state.params)[:, [0, 7, 14, 21, 28, 35], 1] > 0.5
    assert found.all(1).mean() > 0.8


def test_a_count_bonus_shrinks_with_the_root_of_the_count():
    """γ = 0 and steps 1/n: each entry is the mean of reward + β / √k over its visits k."""
    env = jrl.make("RiverSwim-jrl", raw=True)
    config = tabular.Config(exploration="count_bonus", step_size="visits")
    state, _ = learn(env, config, 5, gamma=0.0, learning_rate=1.0, epsilon_start=1.0, bonus_coef=0.3)
    root = np.concatenate([[0.0], np.cumsum(1 / np.sqrt(np.arange(1, 1000)))])
    bonus = 0.3 * root[state.visits.astype(int)] / np.maximum(state.visits, 1)
    bonus[:, 0, 0] += 0.005 * (state.visits[:, 0, 0] > 0)  # drifting at the left bank
    np.testing.assert_allclose(state.params[:, :-1], bonus[:, :-1], rtol=1e-4)


def test_plans_keep_the_count_bonus():
    """γ = 0 and α = 1: an entry is reward + β / √n, whether it was visited last or planned."""
    config = tabular.Config(exploration="count_bonus", planning_updates=3)
    state, _ = learn(GRID, config, 5, gamma=0.0, learning_rate=1.0, epsilon_start=1.0, bonus_coef=0.3)
    seen = state.visits > 0
    expected = state.model.reward[seen] + 0.3 / np.sqrt(state.visits[seen])
    np.testing.assert_allclose(state.params[seen], expected, rtol=1e-5)


def test_an_action_that_is_masked_is_never_taken():
    mask = np.ones((16, 4), bool)
    mask[:, 0] = mask[:, 3] = False  # right and down only
    for choices in ({"target": "sarsa", "exploration": "ucb"}, {"planning_updates": 3}):
        state, _ = learn(
            GRID, tabular.Config(step_size="visits", **choices), 10, make={"action_mask": mask},
            gamma=0.9, initial_value=1.0, learning_rate=1.0,
        )  # fmt: skip
        assert state.visits[..., [1, 2]].sum() == LEARNERS * 640
        np.testing.assert_array_equal(state.params[..., [0, 3]], 1.0)


def test_learning_stops_when_nothing_changes_and_not_before():
    algo = tabular.make(GRID, tabular.Config())
    numbers = {"gamma": 0.9, "learning_rate": 0.5, "epsilon_start": 1.0, "tolerance_env_steps": 2000.0}
    hparams = tabular.HParams(tolerance=1e-4, **numbers)
    run = jax.jit(jax.vmap(lambda s: tabular.train_until_converged(algo, s, hparams, max_steps=2000)))
    state = jax.device_get(run(start(algo, hparams)))
    assert state.converged.all()
    assert np.abs(state.params - optimum_of_the_grid().q).max() < 5e-3
    taken = state.env_steps[:, 0]
    assert (taken < 2000 * 64).all()
    assert len(set(taken.tolist())) > 1  # each stops by itself
    # Frozen from then on.
    more, _ = jax.jit(jax.vmap(lambda s: jrl.train(algo, s, hparams, num_steps=5)))(state)
    np.testing.assert_array_equal(more.params, state.params)
    # A sea without treasure found yet: no change at all is not convergence.
    sea = tabular.make(jrl.make("DeepSea-jrl", size=20, raw=True, params={"move_cost": 0.0}))
    state, metrics = jrl.train(sea, jax.jit(sea.init)(jax.random.key(0), hparams), hparams, num_steps=100)
    assert metrics["largest_change"].max() == 0
    assert not state.converged
    with pytest.raises(ValueError, match=r"train_until_converged\(max_steps=0\): must be at least 1"):
        tabular.train_until_converged(algo, state, hparams, max_steps=0)


# ----------------------------------------------------------------------------------------------- slow loops


def slow_returns(rewards, terminated, truncated, value, gamma):
    """From the definition, one sum for each step."""
    returns = []
    for t in range(len(rewards)):
        total, weight = 0.0, 1.0
        for k in range(t, len(rewards)):
            total += weight * rewards[k]
            weight *= gamma
            if terminated[k]:
                break
            if truncated[k] or k == len(rewards) - 1:
                total += weight * value[k]
                break
        returns.append(total)
    return returns


@pytest.mark.parametrize("visit", ["first", "every"])
@pytest.mark.parametrize("step_size", ["visits", "constant"])
def test_monte_carlo_against_a_slow_loop(visit, step_size):
    env = jrl.make(
        "GridWorld-jrl", raw=True, rows=2, columns=2, goals=(3,), traps=(), params={"max_steps": 6}
    )
    config = monte_carlo.Config(visit=visit, step_size=step_size, unroll_length=40)
    algo = monte_carlo.make(env, config)
    hparams = monte_carlo.HParams(gamma=0.8, learning_rate=0.5, epsilon_start=0.9, initial_scale=1.0)
    before = jax.jit(algo.init)(jax.random.key(2), hparams)
    after, _ = jax.jit(algo.step)(before, hparams)

    # The same steps again, recorded: the algorithm's own unroll with its own key.
    seen = replay(env, before, hparams, 40)
    q, visits = np.array(before.params, float), np.zeros((4, 4))
    value = np.asarray(before.params).max(-1)[seen.next_obs]
    returns = slow_returns(seen.reward, seen.terminated, seen.truncated, value, 0.8)
    already = set()
    for t in range(40):
        pair = (int(seen.obs[t]), int(seen.action[t]))
        if visit == "every" or pair not in already:
            visits[pair] += 1
            q[pair] += (0.5 / visits[pair] if step_size == "visits" else 0.5) * (returns[t] - q[pair])
        already.add(pair)
        if seen.terminated[t] or seen.truncated[t]:
            already = set()
    assert seen.truncated.any()
    assert seen.terminated.any()
    np.testing.assert_allclose(after.params, q, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.visits, visits)


def replay(env, state, hparams, length):
    from jrl import ops, rollout
    from jrl.envs import vectorize
    from jrl.types import Policy

    def explore(params, key, obs, memory):
        return ops.draw_action(key, ops.epsilon_greedy_policy(params[obs], hparams.epsilon_start)), memory, ()

    _, unroll_key = jax.random.split(state.key)
    _, seen, _ = rollout.unroll(
        unroll_key, vectorize(env, 1), env.params, Policy(explore, state.params), state.rollout, length
    )
    return jax.device_get(jax.tree.map(lambda leaf: leaf[:, 0], seen))


# -------------------------------------------------------------------------------------------------- errors


def test_what_is_wrong_is_named():
    with pytest.raises(
        ValueError, match=r"target='q': must be one of q_learning, sarsa, expected_sarsa, double_q"
    ):
        tabular.Config(target="q")
    with pytest.raises(ValueError, match=r"trace='replacing' with target='double_q': .* one table"):
        tabular.Config(trace="replacing", target="double_q")
    with pytest.raises(
        ValueError, match=r"planning_updates=5 with target='sarsa'.*Dyna-Q plans with target='q_l"
    ):
        tabular.Config(planning_updates=5, target="sarsa")
    with pytest.raises(ValueError, match=r"visit='last': must be one of first, every"):
        monte_carlo.Config(visit="last")
    for module in (tabular, monte_carlo):
        with pytest.raises(TypeError, match=r"on CartPole-v1 with observations .*transform_observation"):
            module.make(jrl.make("CartPole-v1"))
        with pytest.raises(TypeError, match=r"on Pendulum-v1 with actions .*discretize_actions"):
            module.make(jrl.make("Pendulum-v1"))
        with pytest.raises(
            ValueError, match=r"action_mask has shape \(4, 4\) and dtype bool: .* bool \[16, 4\]"
        ):
            module.make(GRID, action_mask=np.ones((4, 4), bool))


def test_an_observation_of_ones_own_becomes_an_index():
    """What the message about CartPole says works."""
    cart = jrl.make("CartPole-v1")
    env = jrl.envs.transform_observation(cart, lambda obs: (obs[2] > 0).astype(jnp.int32))
    env = env._replace(observation=FiniteObservation(2, one_hot=False))
    state, _ = learn(env, tabular.Config(), 20, learners=2)
    assert state.params.shape == (2, 2, 2)
    assert np.isfinite(state.params).all()


def test_one_hot_and_index_learn_the_same():
    one_hot = final(tabular.Config(), env=jrl.make("GridWorld-jrl"))
    np.testing.assert_array_equal(one_hot.params, final(tabular.Config()).params)


def test_numbers_are_swept():
    algo = tabular.make(GRID)
    swept = dataclasses.replace(tabular.HParams(), gamma=jnp.array([0.5, 0.9]))
    axes = tabular.HParams(gamma=0, **{name: None for name in vars(swept) if name != "gamma"})
    keys = jnp.stack([jax.random.key(0)] * 2)
    states = jax.jit(jax.vmap(algo.init, (0, axes)))(keys, swept)
    run = jax.jit(jax.vmap(lambda s, h: jrl.train(algo, s, h, num_steps=100)[0], (0, axes)))
    value = np.asarray(run(states, swept).params).max(-1)
    assert value[0, 10] < 0.51
    assert value[1, 10] > 0.5


@pytest.mark.parametrize("raw", ["true", "false"])
def test_the_command_trains_a_table(tmp_path, monkeypatch, raw):
    """Whether the observation is an index or one-hot."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "NPROC"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    options = [
        "--env-kwarg",
        f"raw={raw}",
        "--env-steps",
        "6400",
        "--epsilon-start",
        "0.5",
        "--progress",
        "none",
    ]
    out = tmp_path / "run"
    assert cli.main(["train", "tabular", "--env", "GridWorld-jrl", *options, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluation"]["episode_return_mean"] == 1.0
    assert summary["evaluation"]["episode_length_mean"] == 6.0
