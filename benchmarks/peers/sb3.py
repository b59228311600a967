"""Stable-Baselines3 (PyPI ``stable-baselines3``): ``PPO`` and ``DQN`` on gymnasium's environments.

Its DQN has Huber's loss, and draws once a step whether all environments explore; neither can be set.
``stable_baselines`` serves SBX too, whose classes have the same interface.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from peers.protocol import Training


def training(algorithm: str, work: Any, source: Path | None) -> Training:
    import os

    import stable_baselines3
    import torch

    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[work.activation]
    extra = {"device": "cpu"}
    if algorithm == "ppo":
        extra["clip_range_vf"] = peers.CLIP_EPS
    else:
        extra["max_grad_norm"] = float("inf")
    model = {"ppo": stable_baselines3.PPO, "dqn": stable_baselines3.DQN}[algorithm]
    return stable_baselines(algorithm, work, model, {"activation_fn": activation}, extra)


def stable_baselines(
    algorithm: str,
    work: Any,
    model: Any,
    policy: dict,
    extra: dict,
    warm: Callable[[Any], None] = lambda one: None,
) -> Training:
    """Return the training of a class with Stable-Baselines3's interface.

    ``extra`` are settings that only this class has; ``warm`` makes a new model compile what it will run.
    """
    import numpy as np
    from stable_baselines3.common.env_util import make_vec_env

    if work.seeds > 1:
        raise ValueError(f"seeds={work.seeds}: this library trains one at a time.")
    sizes = list(work.hidden_sizes)
    if algorithm == "ppo":
        net = {"net_arch": {"pi": sizes, "vf": sizes}}
        settings = {
            "n_steps": work.unroll_length,
            "batch_size": work.num_envs * work.unroll_length // work.num_minibatches,
            "n_epochs": work.num_epochs,
            "learning_rate": lambda remaining: work.learning_rate * remaining,
            "gae_lambda": peers.GAE_LAMBDA,
            "clip_range": peers.CLIP_EPS,
            "ent_coef": peers.ENTROPY_COEF,
            "vf_coef": peers.VALUE_COEF,
            "max_grad_norm": peers.MAX_GRAD_NORM,
        }
    else:
        net = {"net_arch": sizes}
        settings = {
            "learning_rate": work.learning_rate,
            "buffer_size": work.capacity,
            "learning_starts": work.warmup_env_steps,
            "batch_size": work.batch_size,
            "train_freq": 1,  # of a step of all environments
            "gradient_steps": 1,
            "target_update_interval": work.target_period,
            "exploration_fraction": peers.EXPLORATION,
            "exploration_initial_eps": 1.0,
            "exploration_final_eps": peers.EPSILON_END,
        }

    def prepare(seed: int) -> Any:
        one = model(
            "MlpPolicy",
            make_vec_env(work.env, n_envs=work.num_envs, seed=seed),
            gamma=peers.GAMMA,
            seed=seed,
            policy_kwargs={**net, **policy},
            **settings,
            **extra,
        )
        warm(one)
        return one

    def run(one: Any) -> Any:
        return one.learn(total_timesteps=work.env_steps)

    def play(one: Any, seed: int, greedy: bool) -> float:
        env = make_vec_env(work.env, n_envs=peers.EVAL_EPISODES, seed=seed)
        obs, total, going = env.reset(), np.zeros(env.num_envs), np.ones(env.num_envs, bool)
        while going.any():
            action, _ = one.predict(obs, deterministic=greedy)
            obs, reward, done, _ = env.step(action)
            total += np.where(going, reward, 0.0)
            going &= ~done
        return float(total.mean())

    def returns(one: Any, seed: int) -> dict[str, float | None]:
        last = [episode["r"] for episode in one.ep_info_buffer]  # its own log: the last 100
        return {
            "episode_return": play(one, peers.EVAL_SEED + seed, greedy=True),
            "sampled_return": play(one, peers.EVAL_SEED + seed, greedy=False),
            "training_return": float(np.mean(last)) if last else None,
        }

    return Training(prepare, run, returns)
