"""SBX (PyPI ``sbx-rl``): Stable-Baselines3 in JAX, ``PPO`` and ``DQN`` on gymnasium's environments.

Its PPO does not clip the value, its DQN has Huber's loss. Each new model compiles its updates anew: that is done
before the clock starts, by a short training of it, whose few updates the timed one then has in addition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.protocol import Training
from peers.sb3 import stable_baselines


def training(algorithm: str, work: Any, source: Path | None) -> Training:
    sizes = tuple(work.hidden_sizes)
    if algorithm == "dqn" and (len(sizes) != 2 or len(set(sizes)) > 1):
        raise ValueError(
            f"hidden_sizes={sizes}: SBX's DQN has two layers of one width, the first of these; so that both sides have "
            f"the same network, pass --hidden-sizes {sizes[0]} {sizes[0]}."
        )
    import flax.linen as nn
    import sbx

    def warm(one: Any) -> None:
        if algorithm == "ppo":
            one.learn(total_timesteps=work.num_envs * work.unroll_length)
            return
        one.learning_starts, starts = 0, one.learning_starts
        one.learn(total_timesteps=10 * work.num_envs)
        one.learning_starts = starts
        one.replay_buffer.reset()

    model = {"ppo": sbx.PPO, "dqn": sbx.DQN}[algorithm]
    return stable_baselines(algorithm, work, model, {"activation_fn": getattr(nn, work.activation)}, {}, warm)
