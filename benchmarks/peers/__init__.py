"""The two sides of ``against_peers.py``: one file a library, and the protocol between the processes.

Each library runs in an interpreter of its own, which may lack jrl and be older: nothing here imports more than
the standard library at its top. An adapter has one function, ``training(algorithm, work, source)``, that returns
a :class:`peers.protocol.Training`; it imports the library, calls it with settings, and changes of it only what a
comment gives a reason for. None of the libraries' code is in this repository.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library's algorithm: jrl's name of it, the adapter's file, and what a clone must hold (None: PyPI)."""

    algorithm: str
    module: str
    file: str | None = None


PEERS = {
    "purejaxrl-ppo": Peer("ppo", "purejaxrl", "purejaxrl/ppo.py"),
    "purejaxrl-dqn": Peer("dqn", "purejaxrl", "purejaxrl/dqn.py"),
    "purejaxrl-dqn-independent": Peer("dqn", "purejaxrl_independent", "purejaxrl/dqn.py"),
    "purejaxql-pqn": Peer("pqn", "purejaxql", "purejaxql/pqn_gymnax.py"),
    "rejax-ppo": Peer("ppo", "rejax"),
    "rejax-dqn": Peer("dqn", "rejax"),
    "stoix-ppo": Peer("ppo", "stoix", "stoix/systems/ppo/anakin/ff_ppo.py"),
    "sb3-ppo": Peer("ppo", "sb3"),
    "sb3-dqn": Peer("dqn", "sb3"),
    "sbx-ppo": Peer("ppo", "sbx"),
    "sbx-dqn": Peer("dqn", "sbx"),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one repeat computes; everything a side needs to know to do the same as the other."""

    env: str = "CartPole-v1"
    env_steps: int = 262_144
    """Of one member."""
    seeds: int = 1
    """Members that train side by side, vmapped."""
    at_once: int = 0
    """Of jrl's members, how many at a time on each device; the others follow. 0: all."""
    devices: int = 1
    """CPU devices over which jrl's members, or the environments of its one run, are sharded; the other side has one."""
    num_envs: int = 64
    unroll_length: int = 128
    num_epochs: int = 4
    num_minibatches: int = 4
    batch_size: int = 128
    capacity: int = 10_000
    warmup_env_steps: int = 10_000
    target_period: int = 0
    """Environment steps between two target copies; 0: about 500, a multiple of one round's steps."""
    learning_rate: float = 2.5e-4
    activation: str = "tanh"
    hidden_sizes: tuple[int, ...] = (64, 64)
    prng: str = "threefry"
    """jrl's generator, or hashed; the other side has JAX's own."""
    kernels: str = "xla"
    """What computes jrl's network, xla or native; the other side has XLA."""
    compiler: str = "full"
    """How XLA compiles jrl's program, full or quick; the other side's is compiled as by default."""
    replay_dtype: str = "same"
    """What jrl's replay keeps observations in, see dqn.Config; the other side's are float32."""
    num_microbatches: int = 1
    """Parts of a minibatch of jrl's PPO, one after the other; the other side has it in one."""

    def __post_init__(self) -> None:
        if self.prng not in ("threefry", "hashed"):
            raise ValueError(f"prng={self.prng!r}: expected threefry or hashed.")
        if self.compiler not in ("full", "quick"):
            raise ValueError(f"compiler={self.compiler!r}: expected full or quick.")
        if not self.target_period:
            object.__setattr__(self, "target_period", self.num_envs * max(1, 500 // self.num_envs))


DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dqn": {
        "env_steps": 100_000,
        "num_envs": 10,
        "unroll_length": 1,
        "activation": "relu",
        "hidden_sizes": (120, 84),
    },
    # purejaxql's own for CartPole, but the number of environments.
    "pqn": {
        "num_envs": 128,
        "unroll_length": 64,
        "num_minibatches": 16,
        "learning_rate": 1e-4,
        "activation": "relu",
        "hidden_sizes": (256, 256),
    },
}

# What all libraries are told alike, and no flag changes.
GAMMA = 0.99
GAE_LAMBDA = 0.95
Q_LAMBDA = 0.95
CLIP_EPS = 0.2
ENTROPY_COEF = 0.01
VALUE_COEF = 0.5
MAX_GRAD_NORM = 0.5  # PPO; the DQNs clip nothing
ADAM_EPS = 1e-5  # PPO
REWARD_SCALE = 0.1  # PQN
EPSILON_END = 0.05
EXPLORATION = 0.5  # share of the environment steps over which ε falls

# The training return is that of the episodes that ended in this last share of the environment steps.
LAST = 0.25
EVAL_EPISODES = 128
EVAL_SEED = 10_000  # evaluation keys are those of seeds that no training uses


def eval_episodes(seeds: int) -> int:
    """Return the number of episodes that each member is evaluated on."""
    return max(16, EVAL_EPISODES // seeds)


def updates(work: Any) -> int:
    """Return the number of PPO's updates."""
    return work.env_steps // (work.num_envs * work.unroll_length)
