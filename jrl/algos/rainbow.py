"""Rainbow (Hessel et al., 2018, https://arxiv.org/abs/1710.02298): DQN with six refinements at once.

Double, dueling, prioritised replay, 3-step targets, a categorical distribution over returns, and noisy layers in place
of ε-greedy: :mod:`jrl.algos.dqn` with other defaults, each of which can be changed. Deviations beside those of DQN:
layer normalisation; the support is wide enough for undiscounted rewards of 1 (set ``value_min`` and ``value_max``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import struct

from jrl.algos import checks, dqn
from jrl.algos.dqn import State
from jrl.optim import default_optimizer
from jrl.types import Algorithm, Array, Environment

__all__ = ["Config", "HParams", "State", "make"]


@dataclasses.dataclass(frozen=True)
class Config(dqn.Config):
    """Static choices of DQN, with Rainbow's as defaults."""

    n_step: int = 3
    """Steps of reward before the target bootstraps."""
    dueling: bool = True
    """Split the network's head into a value and advantages."""
    prioritized: bool = True
    """Draw transitions in proportion to their last error instead of uniformly."""
    distribution: str = "categorical"
    """What is learned of the return: 'none', 'categorical' (C51), 'quantile' (QR-DQN) or 'implicit' (IQN)."""
    noisy: bool = True
    """Explore by noise on the weights, whose scale is learned."""


@struct.dataclass
class HParams(dqn.HParams):
    """Numbers of DQN, with Rainbow's as defaults."""

    epsilon_start: float = 0.0
    """Chance of a random action at env step 0; noisy layers explore."""
    epsilon_end: float = 0.0
    """Chance of a random action after epsilon_env_steps."""
    priority_exponent: float = 0.5
    """α of prioritised replay; 0 is uniform."""


def make(
    env: Environment,
    config: Config | None = None,
    *,
    network: Any = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return Rainbow on ``env``; see :func:`jrl.algos.dqn.make`."""
    checks.environment(env)
    checks.discrete(env, "rainbow")
    return dqn.make(env, checks.config(config, Config), network=network, optimizer=optimizer)
