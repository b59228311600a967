"""A tiny algorithm and environment that compile at once: what the driver's tests run on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
from flax import struct

from jrl.envs import from_functions
from jrl.ops import counter
from jrl.types import Algorithm, Discrete, Policy


def environ(**changes):
    """Return the variables of a subprocess: it finds jrl, and compiles as tests do."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return conftest.quickly_compiled(os.environ | {"PYTHONPATH": path} | changes)


def environment(limit: int = 5):
    """Return an environment whose episodes last ``limit`` steps; the reward is the action."""

    def transition(key, env_state, action, params):
        time = env_state + 1
        return time, time[None] * 1.0, action * params["reward"], False, time >= limit

    def reset(key, params):
        return jnp.int32(0), jnp.zeros(1)

    return from_functions(reset, transition, {"reward": 1.0, "limit": 7}, Discrete(2), "Fake-v0")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices."""

    num_envs: int = 2
    """Environments."""
    sizes: tuple[int, ...] = (3,)
    """Widths."""
    warmup: int = 0
    """Environment steps taken in init."""

    def __post_init__(self):
        if self.num_envs < 1:
            raise ValueError(f"num_envs={self.num_envs}: must be at least 1.")


@struct.dataclass
class HParams:
    """Numbers."""

    learning_rate: float = 0.1
    """Step size."""
    nan_at: float = -1.0
    """Algorithm step from which the loss is NaN."""
    nan_params_at: float = -1.0
    """Algorithm step from which the parameters are NaN, but not the loss."""
    work: float = 0.0
    """Sines computed in each step, to make it slow."""
    env: object = None
    """The environment's own parameters."""


@struct.dataclass
class State:
    params: dict
    step: jax.Array
    env_steps: jax.Array
    key: jax.Array
    nothing: jax.Array
    """[0], as what another choice would need."""


def make(env, config):
    """Return a random walk dressed up as an algorithm."""
    num_env_steps = config.num_envs * 4

    def init(key, hparams):
        params_key, state_key = jax.random.split(key)
        params = {"w": jax.random.normal(params_key, config.sizes)}
        env_steps = counter.add(counter.zero(), config.warmup)
        return State(params, jnp.int32(0), env_steps, state_key, jnp.zeros(0))

    def step(state, hparams):
        key, noise_key = jax.random.split(state.key)
        w = state.params["w"]
        w = w - hparams.learning_rate * (w + jax.random.normal(noise_key, w.shape))
        w = jnp.where(state.step == hparams.nan_params_at, jnp.nan, w)
        w = jax.lax.fori_loop(0, hparams.work.astype(int), lambda _, w: jnp.sin(w) + w, w)
        loss = jnp.where(state.step == hparams.nan_at, jnp.nan, jnp.mean(jnp.square(state.params["w"])))
        ended = (state.step % 3 == 2).astype(jnp.float32)
        score = state.step.astype(jnp.float32) * ended
        metrics = {
            "num_episodes": 2 * ended,
            "episode_return": score,
            "episode_length": 5 * ended,
            "episode_return_min": score - ended,
            "episode_return_max": score + ended,
            "loss": jnp.nan_to_num(loss, nan=jnp.nan),
        }
        env_steps = counter.add(state.env_steps, num_env_steps)
        return State({"w": w}, state.step + 1, env_steps, key, state.nothing), metrics

    def act(params, key, obs, memory):
        return jnp.ones(obs.shape[:-1], jnp.int32), memory, ()

    def sample(params, key, obs, memory):
        return jax.random.randint(key, obs.shape[:-1], 0, 2), memory, ()

    def policy(state, *, greedy=True):
        return Policy(act if greedy else sample, state.params)

    return Algorithm(init, step, policy, num_env_steps)


class Ranked:
    """The same with the learning rate as its return, so that the best setting is known."""

    Config, HParams = Config, HParams

    @staticmethod
    def make(env, config):
        algo = make(env, config)

        def step(state, hparams):
            state, metrics = algo.step(state, hparams)
            return state, {**metrics, "episode_return": hparams.learning_rate * (metrics["num_episodes"] > 0)}

        return algo._replace(step=step)
