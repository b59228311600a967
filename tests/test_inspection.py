"""Attributions that add up, values along an episode, maps of a grid."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import cli, dqn, grpo, inspection, inspection_plots, maml, networks, ops, ppo, r2d2, reinforce, td3
from jrl.envs import to_mdp
from jrl.language import models, tasks, token_q
from jrl.ops import mdp
from jrl.types import MaskedObservation


@pytest.mark.parametrize(("activation", "num_points"), [("tanh", 256), ("relu", 16_384)])
def test_integrated_gradients_are_complete(activation, num_points):
    config = dqn.Config(hidden_sizes=(32, 32), activation=activation, layer_norm=activation == "relu")
    network = networks.q_network(jrl.make("CartPole-v1"), config)
    params = network.init(jax.random.key(0), jnp.zeros(4), ())
    obs, baseline = jax.random.normal(jax.random.key(1), (2, 20, 4))

    def q(obs):
        return network.apply(params, obs, ())[0][..., 0]

    def attribute(obs, baseline):
        return inspection.integrated_gradients(q, obs, baseline, num_points=num_points)

    attributed = jax.jit(jax.vmap(attribute))(obs, baseline)
    assert attributed.shape == (20, 4)
    np.testing.assert_allclose(attributed.sum(-1), q(obs) - q(baseline), atol=1e-3)


def test_attributions_of_a_known_function():
    obs, zero = {"x": jnp.array([2.0, -1.0])}, {"x": jnp.zeros(2)}

    def function(obs):
        return obs["x"][0] ** 2 - 3.0 * obs["x"][1]

    np.testing.assert_allclose(inspection.saliency(function, obs)["x"], [4.0, 3.0])
    np.testing.assert_allclose(
        inspection.integrated_gradients(function, obs, zero, num_points=8)["x"], [4.0, 3.0], rtol=1e-5
    )


def test_what_cannot_be_attributed():
    board = jnp.zeros((2, 2), bool)
    with pytest.raises(TypeError, match="observations are bool; cast them to float32"):
        inspection.integrated_gradients(lambda obs: obs.sum(), board, board)
    with pytest.raises(ValueError, match=r"num_points=0\): must be at least 1"):
        inspection.integrated_gradients(lambda obs: obs.sum(), jnp.ones(2), jnp.zeros(2), num_points=0)


def test_following_a_policy_gives_the_advantages_of_its_rewards():
    env = jrl.make("ProbeMemory-jrl")
    algo = ppo.make(
        env, ppo.Config(num_envs=4, unroll_length=4, hidden_sizes=(4,), memory="gru", memory_size=3)
    )
    state = algo.init(jax.random.key(0), ppo.HParams())
    seen = inspection.follow(
        jax.random.key(1), env, algo.policy(state), num_steps=9, gamma=0.9, gae_lambda=1.0
    )
    # Episodes of three steps: a Monte Carlo advantage is the discounted return less the value.
    np.testing.assert_array_equal(np.flatnonzero(seen.terminated), [2, 5, 8])
    for end in (2, 5, 8):
        for t in range(end - 2, end + 1):
            expected = 0.9 ** (end - t) * seen.reward[end] - seen.value[t]
            np.testing.assert_allclose(seen.advantage[t], expected, rtol=1e-5, atol=1e-6)


def test_values_are_brought_to_the_unit_of_rewards():
    """Reward 1 for ever, γ = 0.9: values are 10 and no step has an advantage, whatever unit was learned in."""
    env = jrl.make("ProbeTruncation-jrl")
    config = ppo.Config(
        num_envs=16, unroll_length=16, hidden_sizes=(16,), normalize_rewards=True, clip_value=False
    )
    hparams = ppo.HParams(gamma=0.9, learning_rate=1e-2, anneal_env_steps=256.0 * 200)
    algo = ppo.make(env, config)
    state, _ = jrl.train(algo, jax.jit(algo.init)(jax.random.key(0), hparams), hparams, num_steps=200)
    seen = inspection.follow(
        jax.random.key(1), env, algo.policy(state), num_steps=8, gamma=0.9,
        params=env.params._replace(max_steps=2), in_rewards=inspection_plots._unit(hparams, state),
    )  # fmt: skip
    np.testing.assert_array_equal(np.flatnonzero(seen.truncated), [1, 3, 5, 7])
    np.testing.assert_allclose(seen.value, 10.0, rtol=0.05)
    np.testing.assert_allclose(seen.advantage, 0.0, atol=0.5)
    told = inspection_plots._unit(r2d2.HParams(), None)(ops.rescale_value(jnp.float32(7.0)))
    np.testing.assert_allclose(told, 7.0, rtol=1e-4)


def test_a_policy_that_tells_no_value():
    env = jrl.make("Pendulum-v1")
    algo = td3.make(env, td3.Config(capacity=256, warmup_env_steps=8, hidden_sizes=(4,)))
    policy = algo.policy(algo.init(jax.random.key(0), td3.HParams()))
    with pytest.raises(ValueError, match="of which none is a value; take the policy of ppo"):
        inspection.follow(jax.random.key(1), env, policy, num_steps=2, gamma=0.9)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce", "maml"])
def test_values_that_nothing_was_fitted_to_are_not_told(name):
    if name in ("grpo", "rloo"):
        env = tasks.random_rewards(3, 2)
        algo = grpo.make(env, grpo.Config(variant=name, num_prompts=1, group_size=2, hidden_sizes=(4,)))
        hparams: Any = grpo.HParams()
    elif name == "reinforce":
        env, hparams = jrl.make("CartPole-v1"), reinforce.HParams()
        algo = reinforce.make(env, reinforce.Config(baseline="mean", num_envs=2, hidden_sizes=(4,)))
    else:
        env, hparams = jrl.make("Navigation2D-jrl"), maml.HParams()
        algo = maml.make(env, maml.Config(num_tasks=1, num_envs=2, hidden_sizes=(4,)))
    policy = algo.policy(algo.init(jax.random.key(0), hparams))
    with pytest.raises(ValueError, match="of which none is a value"):
        inspection.follow(jax.random.key(1), env, policy, num_steps=2, gamma=0.9)


def test_ilql_tells_its_value_and_token_dqn_only_what_may_be_said():
    env = tasks.random_rewards(3, 2)
    small = {"num_envs": 2, "warmup_texts": 2, "batch_size": 2, "capacity": 4, "hidden_sizes": (4,)}
    config, hparams = token_q.Config(variant="ilql", **small), token_q.HParams()
    state = token_q.make(env, config).init(jax.random.key(0), hparams)
    obs = jnp.array([[0, -1, -1], [0, 2, -1]])
    told = token_q.make(env, config).policy(state)(jax.random.key(1), obs, ())[2]
    model = models.of_config(env, config, num_q=2)
    np.testing.assert_allclose(told["value"], model.prefix(state.target_params, obs).value, rtol=1e-6)
    assert "q" not in told
    allowed = jnp.array([[True, False, True], [False, True, True]])
    algo = token_q.make(env, token_q.Config(**small))
    policy = algo.policy(algo.init(jax.random.key(0), hparams))
    q = policy(jax.random.key(1), MaskedObservation(obs, allowed), ())[2]["q"]
    np.testing.assert_array_equal(q > -1e30, allowed)


def test_maps_of_a_grid():
    model = to_mdp(jrl.make("GridWorld-jrl"), 0.9)
    maps = inspection.grid_maps(mdp.value_iteration(model.mdp).q, 4, 4)
    np.testing.assert_allclose(
        [maps.value[2, 3], maps.value[2, 2], maps.value[0, 0]], [1.0, 0.9, 0.59049], atol=1e-5
    )
    np.testing.assert_array_equal(maps.arrows[2, 3], [0.0, 1.0])  # down into the goal
    np.testing.assert_array_equal(maps.arrows[0, 0], [0.5, 0.5])  # right and down are equally good
    with pytest.raises(ValueError, match=r"shape \(15, 4\), where 4 × 4 cells with 4 actions need \(16, 4\)"):
        inspection.grid_maps(jnp.zeros((15, 4)), 4, 4)


def test_the_command_draws_an_episode_and_a_grid(tmp_path, capsys):
    out = tmp_path / "run"
    jrl.run("tabular", "GridWorld-jrl", env_steps=2_000, out=out, eval_episodes=1, progress="none")
    assert cli.main(["inspect", str(out), "--steps", "20"]) == 0
    assert capsys.readouterr().out.split()[-2:] == [str(out / name) for name in ("episode.png", "grid.png")]
    for name in ("episode.png", "grid.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(out), "--steps", "0"]) != 0


@pytest.mark.parametrize("raw", [False, True])
def test_the_command_draws_the_grid_that_the_run_was_on(tmp_path, monkeypatch, raw):
    kwargs = {"rows": 2, "columns": 3, "goals": [5], "traps": [2], "walls": [1], "raw": raw}
    out = tmp_path / "run"
    common = {"out": out, "eval_episodes": 0, "progress": "none"}
    result = jrl.run("tabular", "GridWorld-jrl", env_kwargs=kwargs, env_steps=4_000, **common)
    drawn, draw = [], inspection_plots.grid_figure
    monkeypatch.setattr(
        inspection_plots, "grid_figure", lambda value, arrows, out: drawn.append((value, arrows))
    )
    inspection_plots.inspect(out, num_steps=5)
    ((value, arrows),) = drawn
    table = np.asarray(result.state.params)
    assert np.ptp(table.max(-1)) > 0
    # In the wall, the trap and the goal nobody acts.
    nobody = np.reshape([False, True, True, False, False, True], (2, 3))
    np.testing.assert_array_equal(value, np.where(nobody, np.nan, table.max(-1).reshape(2, 3)))
    shown = inspection.ARROWS[table.argmax(-1)].reshape(2, 3, 2)
    np.testing.assert_array_equal(arrows, np.where(nobody[..., None], np.nan, shown))
    (axes, _) = draw(value, arrows).axes
    assert axes.get_xlabel() == "grey: walls, goals, traps"
    assert axes.images[0].get_clim() == (np.nanmin(value), np.nanmax(value))
