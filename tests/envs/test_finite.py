"""Environments of finitely many states: what is sampled against the exact process, and known values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl.envs import (
    blackjack,
    counterexamples,
    finite,
    from_functions,
    from_mdp,
    grid_world,
    time_limit,
    to_mdp,
)
from jrl.envs.wrappers import vectorize
from jrl.ops import mdp
from jrl.types import Discrete, FiniteObservation

IDS = {
    "GridWorld-jrl": {"slip": 0.2},
    "TrafficLight-jrl": {"params": {"switch": 0.3}},
    "CliffWalking-jrl": {},
    "RiverSwim-jrl": {},
    "DeepSea-jrl": {"size": 4, "seed": 1},
    "Blackjack-jrl": {},
    "RandomMDP-jrl": {"num_states": 6, "num_actions": 2, "branching": 3},
    "Baird-jrl": {},
}


def process_of(env, gamma, params=None):
    """``to_mdp`` of an environment that knows its process, as one program: op by op it is a hundred small ones."""
    return jax.jit(lambda params: to_mdp(env, gamma, params=params))(env.params if params is None else params)


@functools.cache
def sampled(env_id):
    """4,096 copies for 50 steps with random actions; arrays of NumPy."""
    env = jrl.make(env_id, raw=True, **IDS[env_id])
    many = vectorize(env, 4096)

    @jax.jit
    def run(params):
        env_state, first = many.reset(jax.random.key(0), params)

        def step(carry, key):
            env_state, obs = carry
            action_key, key = jax.random.split(key)
            action = jax.random.randint(action_key, (4096,), 0, env.action.n)
            env_state, out = many.step(key, env_state, action, params)
            return (env_state, out.obs), (obs, action, out)

        return first, jax.lax.scan(step, (env_state, first), jax.random.split(jax.random.key(1), 50))[1]

    return env, jax.device_get(run(env.params))


@pytest.mark.parametrize("env_id", IDS)
def test_what_is_sampled_is_the_exact_process(env_id):
    env, (first, (obs, action, out)) = sampled(env_id)
    model = process_of(env, 0.9)
    P, R = np.asarray(model.mdp.P), np.asarray(model.mdp.R)
    num_states = len(R)
    np.testing.assert_allclose(np.bincount(first, minlength=num_states) / 4096, model.start, atol=0.04)

    pair = (obs * R.shape[1] + action).ravel()
    count = np.bincount(pair, minlength=R.size)
    often = count >= 400
    assert often.sum() >= min(R.size // 3, 20)
    reward = np.bincount(pair, out.reward.ravel(), R.size)[often] / count[often]
    spread = 4 * max(np.abs(out.reward).max(), 1e-9)
    assert (np.abs(reward - R.ravel()[often]) <= spread / np.sqrt(count[often]) + 1e-5).all()
    for state in range(num_states):
        going = (out.next_obs == state) & ~out.terminated
        share = np.bincount(pair, going.ravel(), R.size)[often] / count[often]
        assert (np.abs(share - P[..., state].ravel()[often]) <= 2.5 / np.sqrt(count[often])).all()


@pytest.mark.parametrize("env_id", IDS)
def test_the_default_observation_is_one_hot(env_id):
    env = jrl.make(env_id, **IDS[env_id])
    raw = jrl.make(env_id, raw=True, **IDS[env_id])
    n = env.observation.n
    assert isinstance(env.observation, FiniteObservation)
    assert env.observation == jax.ShapeDtypeStruct((n,), jnp.float32)
    assert raw.observation == jax.ShapeDtypeStruct((), jnp.int32)
    assert raw.observation.n == n
    assert env.name == env_id
    key = jax.random.key(0)
    _, obs = jax.jit(env.reset)(key, env.params)
    _, index = jax.jit(raw.reset)(key, raw.params)
    np.testing.assert_array_equal(obs, np.eye(n)[index])
    model, raw_model = process_of(env, 0.9), process_of(raw, 0.9)
    np.testing.assert_array_equal(model.obs, np.eye(n))
    np.testing.assert_array_equal(raw_model.obs, np.arange(n))
    jax.tree.map(np.testing.assert_array_equal, model.mdp, raw_model.mdp)


@pytest.mark.parametrize("env_id", ["CliffWalking-jrl", "DeepSea-jrl", "RandomMDP-jrl"])
def test_exploring_finds_the_same_process(env_id):
    """A wrapper hides the exact dynamics; the rest is found by stepping. Estimates where steps are random."""
    env = jrl.make(env_id, raw=True, **IDS[env_id])
    exact = process_of(env, 0.9)
    deterministic = env_id != "RandomMDP-jrl"
    num_samples = 1 if deterministic else 400
    found = to_mdp(time_limit(env, 10_000), 0.9, num_samples=num_samples)
    order = np.asarray(found.obs)
    P = np.asarray(exact.mdp.P)[order][:, :, order]
    tolerance = 1e-6 if deterministic else 0.1
    np.testing.assert_allclose(found.mdp.P, P, atol=tolerance)
    np.testing.assert_allclose(found.start, exact.start[order], atol=tolerance)
    np.testing.assert_allclose(found.mdp.R, exact.mdp.R[order], atol=1e-5)
    # Cells of the sea above its diagonal and of the cliff cannot be reached.
    assert len(order) == {"CliffWalking-jrl": 38, "DeepSea-jrl": 10, "RandomMDP-jrl": 6}[env_id]


def test_the_grid_of_the_articles():
    model = to_mdp(jrl.make("GridWorld-jrl"), 0.9)
    solution = mdp.policy_iteration(model.mdp)
    known = {0: 0.59049, 10: 0.9, 11: 1.0, 13: 0.9**3, 14: 0.0, 15: 0.0}
    for state, value in known.items():
        np.testing.assert_allclose(solution.value[state], value, rtol=1e-6)
    np.testing.assert_allclose(solution.q[13, 1], -1.0)  # into the trap
    np.testing.assert_allclose(solution.q[10, 2], -1.0)
    assert model.start[0] == 1


def test_the_traffic_light_of_the_articles():
    coded = mdp.policy_iteration(to_mdp(jrl.make("TrafficLight-jrl"), 0.9).mdp)
    np.testing.assert_allclose(coded.q, [[10, 9], [9, 10]], rtol=1e-5)
    spoken = to_mdp(jrl.make("TrafficLight-jrl", reward="forward_at_green"), 0.9).mdp
    np.testing.assert_allclose(mdp.policy_iteration(spoken).q, [[4.5, 4.5], [4.5, 5.5]], rtol=1e-5)


def test_a_start_may_be_a_parameter():
    sizes = {"rows": 2, "columns": 2, "goals": (3,), "traps": ()}
    drawn = jrl.make("GridWorld-jrl", **sizes, params={"start": -1})
    np.testing.assert_allclose(process_of(drawn, 0.9).start, [1 / 3, 1 / 3, 1 / 3, 0])
    given = drawn.params._replace(start=2)
    np.testing.assert_array_equal(process_of(drawn._replace(params=given), 0.9).start, [0, 0, 1, 0])
    obs = jax.jit(jax.vmap(drawn.reset, (0, None)))(jax.random.split(jax.random.key(0), 16), given)[1]
    np.testing.assert_array_equal(obs, np.tile(np.eye(4)[2], (16, 1)))
    fixed = jrl.make("GridWorld-jrl", **sizes, start=-1, params={"start": 1})
    np.testing.assert_array_equal(process_of(fixed, 0.9).start, [0, 1, 0, 0])


def test_parameters_of_another_shape_or_range_are_refused():
    refused = {
        "GridWorld-jrl": [({"cells": [0, 0, 0, 1]}, r"params.cells has shape \(4,\), where \(16,\)"),
                          ({"cells": [3] * 16}, "leaves no free cell"), ({"start": 2.5}, "start=2.5 is no whole"),
                          ({"max_steps": 0}, "max_steps=0: must be at least 1")],
        "TrafficLight-jrl": [({"switch": 1.5}, r"switch=1.5: must be in \[0, 1\]"),
                             ({"max_steps": float("nan")}, "max_steps=nan: must be at least 1")],
        "RiverSwim-jrl": [({"advance": 0.9, "retreat": 0.5}, r"advance \+ retreat=1.4: must be in \[0, 1\]")],
        "ProbeMemory-jrl": [({"delay": -1}, "ProbeMemory-jrl: delay=-1: must be at least 1")],
        "ProbeTruncation-jrl": [({"max_steps": 0}, "max_steps=0: must be at least 1")],
        "Navigation2D-jrl": [({"max_steps": 0}, "max_steps=0: must be at least 1")],
        "RandomMDP-jrl": [({"start": np.ones(3)}, r"params.start has shape \(3,\)"),
                          ({"start": np.zeros(50)}, r"start has shape \(50,\) and sum 0"),
                          ({"mdp": mdp.random_mdp(jax.random.key(0), 3, 2, 0.9)}, r"params.mdp.P has shape \(3, "),
                          ({"max_steps": 0}, "max_steps=0: must be at least 1")],
        "MaximizationBias-jrl": [({"max_steps": 0}, "MaximizationBias-jrl: max_steps=0: must be at least 1")],
    }  # fmt: skip
    for name, cases in refused.items():
        for params, message in cases:
            with pytest.raises(ValueError, match=message):
                jrl.make(name, params=params)
    with pytest.raises(
        TypeError, match=r"CliffWalking-jrl: params is a builtins\.int: expected a .*CliffParams"
    ):
        jrl.make("CliffWalking-jrl", params=5)
    with pytest.raises(ValueError, match=r"params.cells has shape \(9,\), where \(16,\)"):
        jrl.make("GridWorld-jrl", params=jrl.envs.grid_world.GridParams(np.zeros(9, int)))
    given = jrl.make("GridWorld-jrl", params={"cells": [0] * 15 + [1]})
    assert to_mdp(given, 0.9).mdp.R.max() == 1.0
    with pytest.raises(ValueError, match=r"P.* has entries down to nan"):
        from_mdp(mdp.TabularMDP(np.full((2, 1, 2), np.nan), np.zeros((2, 1)), 0.9))


@pytest.mark.parametrize("whole", [0, np.int32(0), "record"])
def test_a_whole_number_given_for_a_real_one_stays_real(whole):
    """Or a sweep over that parameter would compute with what is left of -0.5 as an integer: 0."""
    default = jrl.make("GridWorld-jrl").params
    params = default._replace(step_reward=0) if whole == "record" else {"step_reward": whole}
    env = jrl.make("GridWorld-jrl", params=params)
    assert jnp.result_type(env.params.step_reward) == jnp.float32

    def first_reward(step_reward):
        params = env.params._replace(step_reward=step_reward)
        env_state, _ = env.reset(jax.random.key(0), params)
        return env.step(jax.random.key(1), env_state, 1, params)[1].reward

    np.testing.assert_array_equal(jax.jit(jax.vmap(first_reward))(jnp.array([-0.5, 0.25])), [-0.5, 0.25])
    assert jrl.make("GridWorld-jrl", params={"max_steps": 7}).params.max_steps == 7


def test_walls_slips_and_random_starts():
    env = jrl.make("GridWorld-jrl", rows=2, columns=2, goals=(3,), traps=(), walls=(1,), start=-1, slip=0.2)
    model = process_of(env, 0.9)
    np.testing.assert_allclose(model.start, [0.5, 0, 0.5, 0])
    # From 0 to the right is a wall, up the edge; down with half the slip.
    np.testing.assert_allclose(model.mdp.P[0, 1], [0.9, 0, 0.1, 0], atol=1e-7)
    np.testing.assert_allclose(model.mdp.R[2], [0.1, 0.8, 0.1, 0.0], atol=1e-7)
    np.testing.assert_allclose(model.mdp.P[2, 1], [0.1, 0, 0.1, 0], atol=1e-7)


def test_parameters_are_traced_and_swept():
    env = jrl.make("GridWorld-jrl")

    @jax.jit
    @jax.vmap
    def start_value(slip):
        return mdp.value_iteration(to_mdp(env, 0.9, params=env.params._replace(slip=slip)).mdp).value[0]

    values = start_value(jnp.array([0.0, 0.1, 0.3]))
    np.testing.assert_allclose(values[0], 0.59049, rtol=1e-5)
    assert (np.diff(values) < -0.01).all()


def test_the_maze_of_dyna():
    """Fourteen steps from the start; the cell below the goal is one step away from it."""
    solution = mdp.value_iteration(process_of(jrl.make("GridWorld-jrl", **grid_world.DYNA_MAZE), 0.95).mdp)
    np.testing.assert_allclose(solution.value[18], 0.95**13, rtol=1e-5)
    np.testing.assert_allclose(solution.value[17], 1.0)


def test_cliff_walking():
    solution = mdp.value_iteration(process_of(jrl.make("CliffWalking-jrl"), 1.0).mdp)
    assert solution.value[36] == -13
    assert solution.q[36, 1] == -100 - 13
    assert solution.value[47] == 0


def test_deep_sea_pays_only_the_one_way():
    for seed in (None, 3):
        env = jrl.make("DeepSea-jrl", size=5, seed=seed)
        solution = mdp.value_iteration(process_of(env, 1.0).mdp)
        np.testing.assert_allclose(solution.value[0], 1.0 - 0.01, rtol=1e-5)
        best = np.asarray(solution.policy).argmax(1).reshape(5, 5)
        np.testing.assert_array_equal(np.diag(best), np.diag(env.params.right))


def test_river_swim():
    process = process_of(jrl.make("RiverSwim-jrl"), 0.99).mdp
    assert (mdp.policy_iteration(process).policy.argmax(1) == 1).all()
    drift = jnp.eye(2)[jnp.zeros(6, int)]
    np.testing.assert_allclose(mdp.evaluate_policy(process, drift)[0], 0.5, rtol=1e-4)


def play_blackjack(rng, hands):
    """Hands played card by card with the player's optimal policy; the mean reward."""
    model = process_of(jrl.make("Blackjack-jrl"), 1.0)
    solution = mdp.policy_iteration(model.mdp)
    policy = np.asarray(solution.policy).argmax(1)
    expected = float((model.start * solution.value).sum())

    def best(cards):
        total = sum(cards)
        return (total + 10, 1) if 1 in cards and total + 10 <= 21 else (total, 0)

    def card():
        return min(int(rng.integers(1, 14)), 10)

    total = 0
    for _ in range(hands):
        player, dealer = [card(), card()], [card()]
        while (hand := best(player))[0] <= 21:
            if not policy[blackjack.blackjack_state(hand[0], dealer[0], hand[1])]:
                break
            player.append(card())
        mine = best(player)[0]
        if mine > 21:
            total -= 1
            continue
        dealer.append(card())
        while best(dealer)[0] < 17:
            dealer.append(card())
        theirs = best(dealer)[0]
        total += 1 if theirs > 21 or mine > theirs else -1 if mine < theirs else 0
    return total / hands, expected


def test_blackjack_against_hands_played_card_by_card():
    mean, expected = play_blackjack(np.random.default_rng(0), 40_000)
    assert abs(mean - expected) < 4 * 0.95 / np.sqrt(40_000)
    np.testing.assert_allclose(expected, -0.0466, atol=5e-4)


def test_bairds_features_hold_every_value():
    assert np.linalg.matrix_rank(counterexamples.BAIRD_FEATURES) == 7
    np.testing.assert_array_equal(counterexamples.BAIRD_FEATURES[0], [2, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(counterexamples.BAIRD_FEATURES[6], [0, 0, 0, 0, 0, 0, 1, 2])


def test_maximization_bias():
    env = jrl.make("MaximizationBias-jrl", raw=True)
    many = vectorize(env, 20_000)
    env_state, _ = jax.jit(many.reset)(jax.random.key(0), env.params)
    step = jax.jit(many.step)
    env_state, out = step(jax.random.key(1), env_state, jnp.ones(20_000, int), env.params)
    assert not (out.terminated | (out.reward != 0)).any()
    _, out = step(jax.random.key(2), env_state, jnp.full(20_000, 7), env.params)
    assert out.terminated.all()
    np.testing.assert_allclose(out.reward.mean(), -0.1, atol=0.03)
    np.testing.assert_allclose(out.reward.std(), 1.0, atol=0.03)
    np.testing.assert_allclose(np.mean(out.reward < -0.1), 0.5, atol=0.02)


def test_a_process_becomes_an_environment_and_comes_back():
    process = mdp.random_mdp(jax.random.key(0), 5, 3, 0.9)
    process = process._replace(P=process.P * jnp.array([1.0, 0.5, 1.0])[:, None])
    model = process_of(from_mdp(process, start=np.eye(5)[2]), 0.9)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), model.mdp, process)
    np.testing.assert_array_equal(model.start, np.eye(5)[2])


def test_a_time_limit_truncates():
    env = jrl.make("TrafficLight-jrl", params={"max_steps": 3})
    env_state, _ = env.reset(jax.random.key(0), env.params)
    step, flags = jax.jit(env.step), []
    for i in range(6):
        env_state, out = step(jax.random.key(i), env_state, 0, env.params)
        flags.append((bool(out.terminated), bool(out.truncated)))
    assert flags == [(False, False), (False, False), (False, True)] * 2


def test_drawing_never_takes_what_is_impossible():
    words = jnp.array([0, 2**32 - 1, 2**31, 2**9], jnp.uint32)
    chosen = finite.draw(words, jnp.array([0.0, 0.4, 0.0, 0.6, 0.0]))
    np.testing.assert_array_equal(chosen, [1, 3, 3, 1])


def test_what_is_wrong_is_named():
    with pytest.raises(
        ValueError, match=r"GridWorld-jrl: goals has cell 16; .* 4 rows and 4 columns .*0 to 15"
    ):
        jrl.make("GridWorld-jrl", goals=(16,))
    with pytest.raises(ValueError, match=r"cell 14 of walls is in another list too"):
        jrl.make("GridWorld-jrl", walls=(14,))
    for wrong in ({"start": 15}, {"params": {"start": 15}}):
        with pytest.raises(ValueError, match=r"start=15 is not a free cell; give one, or -1"):
            jrl.make("GridWorld-jrl", **wrong)
    with pytest.raises(ValueError, match=r"slip=2.0: must be in \[0, 1\]"):
        jrl.make("GridWorld-jrl", params={"slip": 2.0})
    with pytest.raises(ValueError, match=r"slip=1.5: must be in \[0, 1\]"):
        jrl.make("GridWorld-jrl", slip=1.5)
    with pytest.raises(ValueError, match=r"rows=0, columns=4 leaves no free cell"):
        jrl.make("GridWorld-jrl", rows=0, goals=(), traps=())
    with pytest.raises(ValueError, match=r"reward='said'; it is one of right_action, forward_at_green"):
        jrl.make("TrafficLight-jrl", reward="said")
    with pytest.raises(ValueError, match=r"RiverSwim-jrl: num_states=2; a river has at least 3"):
        jrl.make("RiverSwim-jrl", num_states=2)
    with pytest.raises(ValueError, match=r"DeepSea-jrl: size=1; a sea has at least 2 rows"):
        jrl.make("DeepSea-jrl", size=1)
    for env_id, wrong in (
        ("GridWorld-jrl", {"rows": 4.0}), ("GridWorld-jrl", {"columns": "4"}), ("DeepSea-jrl", {"size": 2.5}),
        ("DeepSea-jrl", {"seed": 0.5}), ("RiverSwim-jrl", {"num_states": 6.0}), ("RandomMDP-jrl", {"num_actions": 2.0}),
    ):  # fmt: skip
        ((field, value),) = wrong.items()
        with pytest.raises(
            ValueError, match=rf"{env_id}: {field}={value!r}: must be a whole number, written"
        ):
            jrl.make(env_id, **wrong)
    with pytest.raises(ValueError, match=r"GridWorld-jrl: a cell of walls=1.5: must be a whole number"):
        jrl.make("GridWorld-jrl", walls=(1.5,))
    with pytest.raises(
        ValueError, match=r"GridWorld-jrl: goals=15: must be a list of cells, such as \(15,\)"
    ):
        jrl.make("GridWorld-jrl", goals=15)
    with pytest.raises(
        ValueError, match=r"random_mdp\(branching=1.5\): .* successors, a whole number of them"
    ):
        jrl.make("RandomMDP-jrl", branching=1.5)
    for env_id in IDS:
        with pytest.raises(ValueError, match=rf"{env_id}: params has no field 'limit'; it has \("):
            jrl.make(env_id, params={"limit": 3})
    process = mdp.random_mdp(jax.random.key(0), 3, 2, 0.9)
    with pytest.raises(ValueError, match=r"P\[s, a\] has entries down to .* sums up to 2"):
        from_mdp(process._replace(P=2 * process.P))
    with pytest.raises(ValueError, match=r"start has shape \(2,\) and sum 1; it must be \[S=3\]"):
        from_mdp(process, start=np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"P has shape \(3, 2, 2\) and R \(3, 2\)"):
        from_mdp(process._replace(P=process.P[..., :2]))


def test_exploring_refuses():
    with pytest.raises(
        TypeError, match=r"to_mdp\(Pendulum-v1\): actions are Box.*finite process has Discrete"
    ):
        to_mdp(jrl.make("Pendulum-v1"), 0.9)
    with pytest.raises(ValueError, match=r"more than max_states=20 observations; raise it.*Continuous"):
        to_mdp(jrl.make("CartPole-v1"), 0.9, max_states=20)

    def transition(key, state, action, params):
        return state + 1, state + 1, 0.0, False, state + 1 >= params

    chain = from_functions(
        lambda key, params: (jnp.int32(0), jnp.int32(0)), transition, 3, Discrete(1), "Chain"
    )
    with pytest.raises(
        ValueError, match=r"to_mdp\(Chain\): the time limit ended every episode that came to .*3"
    ):
        to_mdp(chain, 0.9)
    with pytest.raises(ValueError, match=r"num_samples=0\): needs at least one"):
        to_mdp(chain, 0.9, num_samples=0)


def test_finite_observation():
    with pytest.raises(ValueError, match=r"FiniteObservation\(n=0\)"):
        FiniteObservation(0, one_hot=True)
    assert isinstance(jrl.make("FrozenLake-misc").observation, FiniteObservation)
    assert jrl.make("FrozenLake-misc", raw=True).observation.n == 16
