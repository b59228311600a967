"""PureJaxRL (https://github.com/luchris429/purejaxrl): ``make_train(config)`` of its clone's ``ppo.py``, ``dqn.py``.

Runs with gymnax 0.0.9, distrax and flashbax under a current JAX. Its DQN draws everything but the first
observations from a constant key: vmapped seeds share their networks' start, their exploration and their batches'
indices, which spares it work that independent seeds would have. ``purejaxrl-dqn`` leaves that as it is;
``purejaxrl-dqn-independent`` gives each seed a key of its own, see :func:`with_own_keys`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from peers import LAST, play
from peers.protocol import Training, compile_program
from peers.stubs import allow_missing


def ppo_config(work: Any) -> dict[str, Any]:
    return {
        "LR": work.learning_rate,
        "NUM_ENVS": work.num_envs,
        "NUM_STEPS": work.unroll_length,
        "TOTAL_TIMESTEPS": work.env_steps,
        "UPDATE_EPOCHS": work.num_epochs,
        "NUM_MINIBATCHES": work.num_minibatches,
        "GAMMA": peers.GAMMA,
        "GAE_LAMBDA": peers.GAE_LAMBDA,
        "CLIP_EPS": peers.CLIP_EPS,
        "ENT_COEF": peers.ENTROPY_COEF,
        "VF_COEF": peers.VALUE_COEF,
        "MAX_GRAD_NORM": peers.MAX_GRAD_NORM,
        "ACTIVATION": work.activation,
        "ENV_NAME": work.env,
        "ANNEAL_LR": True,
        "DEBUG": False,
    }


def dqn_config(work: Any) -> dict[str, Any]:
    return {
        "NUM_ENVS": work.num_envs,
        "BUFFER_SIZE": work.capacity,
        "BUFFER_BATCH_SIZE": work.batch_size,
        "TOTAL_TIMESTEPS": work.env_steps,
        "EPSILON_START": 1.0,
        "EPSILON_FINISH": peers.EPSILON_END,
        "EPSILON_ANNEAL_TIME": work.env_steps * peers.EXPLORATION,
        "TARGET_UPDATE_INTERVAL": work.target_period,
        "LR": work.learning_rate,
        "LEARNING_STARTS": work.warmup_env_steps,
        "TRAINING_INTERVAL": work.num_envs,  # one update an iteration, as jrl does
        "LR_LINEAR_DECAY": False,
        "GAMMA": peers.GAMMA,
        "TAU": 1.0,
        "ENV_NAME": work.env,
        "WANDB_MODE": "disabled",
    }


NETWORKS = {"ppo": ((64, 64), ("tanh", "relu")), "dqn": ((120, 84), ("relu",))}  # written into its files


def training(algorithm: str, work: Any, source: Path, own_keys: bool = False) -> Training:
    import jax

    sizes, activations = NETWORKS[algorithm]
    if tuple(work.hidden_sizes) != sizes or work.activation not in activations:
        raise ValueError(
            f"hidden_sizes={work.hidden_sizes}, activation={work.activation!r}: PureJaxRL's {algorithm} has "
            f"{sizes} and {' or '.join(activations)} only."
        )
    config = {"ppo": ppo_config, "dqn": dqn_config}[algorithm](work)
    train = load(source).make_train(config)
    if own_keys:
        train = with_own_keys(train)

    def prepare(seed: int) -> Any:
        key = jax.random.PRNGKey(seed)
        return key if work.seeds == 1 else jax.random.split(key, work.seeds)

    compiled, facts = compile_program(
        jax.jit(train if work.seeds == 1 else jax.vmap(train)), jax.eval_shape(prepare, 0)
    )

    def head(learned: Any, obs: Any) -> Any:
        out = learned.apply_fn(learned.params, obs)
        return out[0].logits if algorithm == "ppo" else out

    mean_returns = play.player(algorithm, head, work)

    def returns(out: Any, seed: int) -> dict[str, float | None]:
        learned, log = out["runner_state"][0], out["metrics"]
        return {**mean_returns(learned, seed), "training_return": training_return(log, work.seeds)}

    return Training(prepare, lambda key: jax.block_until_ready(compiled(key)), returns, facts)


def with_own_keys(train: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let the constant keys that ``train`` makes while it is traced depend on the key it is given."""
    import jax

    def independent(key: Any) -> Any:
        constant = jax.random.PRNGKey
        jax.random.PRNGKey = lambda seed: jax.random.fold_in(key, seed)
        try:
            return train(key)
        finally:
            jax.random.PRNGKey = constant

    return independent


def training_return(metrics: dict[str, Any], seeds: int) -> float | None:
    import numpy as np

    def late(name: str) -> Any:
        leaf = np.asarray(metrics[name])
        leaf = leaf if seeds > 1 else leaf[None]  # [members, updates, ...]
        return leaf[:, -max(1, int(leaf.shape[1] * LAST)) :]

    if (
        "returns" in metrics
    ):  # DQN logs, at each step, the mean over environments of their last episode's return
        return float(late("returns").mean())
    ended = late("returned_episode")
    return float((late("returned_episode_returns") * ended).sum() / ended.sum()) if ended.any() else None


def load(file: Path) -> Any:
    """Import the file as it is, under a JAX newer than the one it was written for."""
    import jax

    # Removed from jax's top level since; the same function.
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree_util.tree_map
    allow_missing("brax", "navix", "wandb")
    sys.path.insert(0, str(file.parent))  # its siblings are imported by bare name
    spec = importlib.util.spec_from_file_location(f"purejaxrl_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
