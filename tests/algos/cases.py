"""Every algorithm and each of its static choices, at toy size. A new algorithm adds its cases here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jrl
from jrl import (
    a2c,
    dqn,
    grpo,
    linear,
    maml,
    monte_carlo,
    ppo,
    pqn,
    r2d2,
    rainbow,
    reinforce,
    sac,
    tabular,
    td3,
    token_dqn,
)
from jrl.envs import action_mask, from_functions
from jrl.language import grammar
from jrl.language.environments import Prompts, gain, token_mdp
from jrl.types import Environment, MultiDiscrete


@dataclasses.dataclass(frozen=True)
class Case:
    """One algorithm with one Config on one environment."""

    name: str
    module: Any
    env: str
    config: Any
    hparams: tuple[tuple[str, float], ...] = ()

    def make(self) -> jrl.Algorithm:
        return self.module.make(environment(self.env), self.config)


@functools.cache
def environment(name: str) -> Environment:
    match name:
        case "masked":
            # Only action 1 is allowed left of the middle.
            return action_mask(
                jrl.make("CartPole-v1"), lambda obs, params: jnp.stack([obs[0] > 0.0, jnp.bool_(True)])
            )
        case "multi-discrete":
            return multi_discrete()
        case "pixels":
            return pixels()
        case "grammar":
            return in_grammar()
        case "grid" | "grid-raw":
            return jrl.make("GridWorld-jrl", rows=16, columns=16, start=-1, raw=name == "grid-raw")
    return jrl.make(name)


def multi_discrete() -> Environment:
    """Reward 1 for each of two choices that equals its half of the observation."""

    def observe(key):
        return jax.random.bernoulli(key, 0.5, (2,)).astype(jnp.float32)

    def reset(key, params):
        obs = observe(key)
        return obs, obs

    def transition(key, state, action, params):
        observe_key, end_key = jax.random.split(key)
        reward = (action == state.astype(jnp.int32)).sum()
        obs = observe(observe_key)
        return obs, obs, reward, jax.random.bernoulli(end_key, 0.2), False

    return from_functions(reset, transition, (), MultiDiscrete((2, 3)), "two choices")


def in_grammar() -> Environment:
    """Texts of the grammar a(b|c)*: 1 for every b. Tokens a, b, c and the end; prompts a and c."""
    return token_mdp(
        Prompts([[0], [2]], [1, 1]),
        gain(lambda text: (text.tokens == 1).sum().astype(jnp.float32)),
        vocab_size=4,
        max_new_tokens=4,
        eos=3,
        grammar=grammar.compile("a(b|c)*", ["a", "b", "c", "<eos>"]),
    )


def pixels() -> Environment:
    """A 4×4×1 uint8 image with one bright column; reward 1 for naming its half. Episodes of 5 steps."""

    def draw(key):
        column = jax.random.randint(key, (), 0, 4)
        return column, (255 * (jnp.arange(4) == column)[None, :, None] * jnp.ones((4, 4, 1))).astype(
            jnp.uint8
        )

    def reset(key, params):
        column, obs = draw(key)
        return (column, 0), obs

    def transition(key, state, action, params):
        column, time = state
        reward = (action == column // 2).astype(jnp.float32)
        column, obs = draw(key)
        return (column, time + 1), obs, reward, False, time + 1 >= params["limit"]

    return from_functions(reset, transition, {"limit": 5}, jrl.Discrete(2), "pixels")


def _ppo(name: str, env: str = "CartPole-v1", **choices: Any) -> Case:
    sizes = {"num_envs": 4, "unroll_length": 8, "num_epochs": 2, "num_minibatches": 2, "hidden_sizes": (8,)}
    return Case(f"ppo-{name}", ppo, env, ppo.Config(**sizes | choices))


def _dqn(name: str, env: str = "CartPole-v1", module: Any = dqn, **choices: Any) -> Case:
    sizes = {"num_envs": 4, "batch_size": 8, "capacity": 64, "warmup_env_steps": 32, "hidden_sizes": (8,)}
    return Case(f"dqn-{name}", module, env, module.Config(**sizes | choices))


def _on_policy(name: str, module: Any, env: str, **choices: Any) -> Case:
    sizes = {"num_envs": 4, "unroll_length": 8, "hidden_sizes": (8,)}
    return Case(name, module, env, module.Config(**sizes | choices))


def _replay(name: str, module: Any, env: str, **choices: Any) -> Case:
    sizes = {"num_envs": 4, "batch_size": 8, "capacity": 64, "warmup_env_steps": 32, "hidden_sizes": (8,)}
    return Case(name, module, env, module.Config(**sizes | choices))


def _tabular(name: str, env: str = "grid", **choices: Any) -> Case:
    # Tables that start at one value would be the same for every key.
    return Case(
        f"tabular-{name}", tabular, env, tabular.Config(unroll_length=8, **choices), (("initial_scale", 1.0),)
    )


def _monte_carlo(name: str, **choices: Any) -> Case:
    config = monte_carlo.Config(unroll_length=16, **choices)
    return Case(f"monte-carlo-{name}", monte_carlo, "grid-raw", config, (("initial_scale", 1.0),))


def _linear(name: str, env: str = "MountainCar-v0", **choices: Any) -> Case:
    config = linear.Config(unroll_length=8, num_tilings=2, tiles=2, **choices)
    return Case(f"linear-{name}", linear, env, config, (("initial_scale", 1.0), ("epsilon_start", 0.1)))


PQN = {"num_envs": 4, "unroll_length": 8, "num_epochs": 2, "num_minibatches": 2, "hidden_sizes": (8,)}
R2D2 = {
    "num_envs": 4,
    "unroll_length": 3,
    "num_updates": 2,
    "batch_size": 4,
    "burn_in": 2,
    "learn_length": 5,
    "capacity": 80,
    "warmup_env_steps": 36,
    "hidden_sizes": (8,),
    "memory_size": 8,
}


def _grpo(name: str, env: str, **choices: Any) -> Case:
    sizes = {"num_prompts": 4, "group_size": 2, "hidden_sizes": (8,)}
    return Case(f"grpo-{name}", grpo, env, grpo.Config(**sizes | choices), (("kl_coef", 0.1),))


def _token_dqn(name: str, env: str, **choices: Any) -> Case:
    sizes = {"num_envs": 4, "num_updates": 2, "batch_size": 4, "capacity": 16, "warmup_texts": 8}
    config = token_dqn.Config(hidden_sizes=(8,), **sizes | choices)
    return Case(f"token-dqn-{name}", token_dqn, env, config, (("cql_coef", 0.1),))


CASES = [
    _ppo("discrete"),
    _ppo("multi-discrete", "multi-discrete", shared_torso=True),
    _ppo("continuous", "Pendulum-v1", normalize_observations=True, normalize_rewards=True),
    _ppo("cnn", "pixels", channels=(2,), num_epochs=1),
    _ppo("masked", "masked", normalize_observations=True, layer_norm=True),
    _ppo("target-kl", stop_at_target_kl=True, clip_value=False, standardize_advantages=False),
    _ppo("gru", memory="gru", memory_size=8, objective="adaptive_kl"),
    _ppo("transformer", "masked", memory="transformer", memory_size=8, memory_window=4, objective="kl"),
    _dqn("double"),
    _dqn("plain", double=False, huber=True, dueling=True, layer_norm=False),
    _dqn("polyak", polyak=True, num_updates=2, unroll_length=2),
    _dqn("n-step", n_step=3, unroll_length=4, replay_dtype="float16"),
    _dqn("prioritized", prioritized=True, num_updates=2),
    _dqn("rainbow", module=rainbow, num_atoms=5, persistent=True),
    _dqn("quantile", "masked", distribution="quantile", num_atoms=5, munchausen=True),
    _dqn("implicit", distribution="implicit", num_atoms=4, dueling=True),
    _dqn("cnn", "pixels", channels=(2,)),
    _dqn("masked", "masked"),
    _on_policy("a2c", a2c, "masked", vtrace=True, num_updates=2),
    _on_policy("reinforce", reinforce, "multi-discrete"),
    _on_policy("maml", maml, "Navigation2D-jrl", num_tasks=2),
    _replay("sac-continuous", sac, "Pendulum-v1"),
    _replay("sac-discrete", sac, "masked", learn_temperature=False, num_updates=1),
    _replay("td3", td3, "Pendulum-v1", replay_dtype="float16"),
    Case("pqn", pqn, "masked", pqn.Config(**PQN)),
    Case("r2d2", r2d2, "masked", r2d2.Config(**R2D2, replay_dtype="bfloat16")),
    _tabular("q-learning"),
    _tabular("sarsa", "grid-raw", target="sarsa", exploration="boltzmann", step_size="visits"),
    _tabular("expected-sarsa", "grid-raw", target="expected_sarsa", exploration="ucb"),
    _tabular("double-q", "grid-raw", target="double_q"),
    _tabular("q-lambda", "grid-raw", trace="replacing", exploration="count_bonus"),
    _tabular("sarsa-lambda", "grid-raw", target="sarsa", trace="accumulating"),
    _tabular("dyna-q", "grid-raw", planning_updates=3),
    _monte_carlo("first-visit"),
    _monte_carlo("every-visit", visit="every", step_size="constant"),
    _grpo("grpo", "RandomWalks-jrl"),
    _grpo(
        "ppo",
        "grammar",
        variant="ppo",
        adaptive_kl=True,
        num_epochs=2,
        num_minibatches=2,
        model="transformer",
        num_layers=1,
        num_heads=1,
        width=8,
        cache=True,
    ),
    _token_dqn("double", "RandomWalks-jrl", dueling=True),
    _token_dqn("ilql", "grammar", variant="ilql"),
    _linear("sarsa-lambda"),
    _linear("q-learning", "grid-raw", target="q_learning", trace="accumulating"),
    _linear("target-network", target="q_learning", trace="none", target_network=True),
]
