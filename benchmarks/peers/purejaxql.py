"""purejaxql (https://github.com/mttga/purejaxql): ``make_train(config)`` of its clone's ``pqn_gymnax.py``.

Runs with gymnax 0.0.9 under a current JAX. Settings are those of its CartPole file, at the number of environments of
the work, rewards are scaled alike; it has RAdam, jrl has Adam, which costs neither side anything that shows.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import peers
from peers import play
from peers.protocol import Training, compile_program
from peers.stubs import allow_missing


def training(algorithm: str, work: Any, source: Path) -> Training:
    import jax

    if len(set(work.hidden_sizes)) != 1 or work.activation != "relu" or work.seeds != 1:
        raise ValueError(
            f"hidden_sizes={work.hidden_sizes}, activation={work.activation!r}, seeds={work.seeds}: purejaxql has "
            "layers of one width and relu; compared for one seed."
        )
    config = {
        "TOTAL_TIMESTEPS": work.env_steps,
        "TOTAL_TIMESTEPS_DECAY": work.env_steps,
        "NUM_ENVS": work.num_envs,
        "NUM_STEPS": work.unroll_length,
        "EPS_START": 1.0,
        "EPS_FINISH": peers.EPSILON_END,
        "EPS_DECAY": peers.EXPLORATION,
        "NUM_MINIBATCHES": work.num_minibatches,
        "NUM_EPOCHS": work.num_epochs,
        "HIDDEN_SIZE": work.hidden_sizes[0],
        "NUM_LAYERS": len(work.hidden_sizes),
        "NORM_TYPE": "layer_norm",
        "LR": work.learning_rate,
        "MAX_GRAD_NORM": 10,
        "LR_LINEAR_DECAY": True,
        "REW_SCALE": peers.REWARD_SCALE,
        "GAMMA": peers.GAMMA,
        "LAMBDA": peers.Q_LAMBDA,
        "ENV_NAME": work.env,
        "TEST_DURING_TRAINING": False,
        "WANDB_MODE": "disabled",
    }
    allow_missing("omegaconf", "safetensors", "wandb")
    if importlib.util.find_spec("hydra") is None:  # reads the command line, which there is none of here
        hydra: Any = types.ModuleType("hydra")
        hydra.main = lambda **_: lambda function: function
        sys.modules["hydra"] = hydra
    spec = importlib.util.spec_from_file_location("purejaxql_pqn", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def prepare(seed: int) -> Any:
        return jax.random.PRNGKey(seed)

    compiled, facts = compile_program(jax.jit(module.make_train(config)), jax.eval_shape(prepare, 0))

    def head(learned: Any, obs: Any) -> Any:
        return learned.apply_fn(
            {"params": learned.params, "batch_stats": learned.batch_stats}, obs, train=False
        )

    mean_returns = play.player(algorithm, head, work)

    def returns(out: Any, seed: int) -> dict[str, float | None]:
        return {**mean_returns(out["runner_state"][0], seed), "training_return": None}

    return Training(prepare, lambda key: jax.block_until_ready(compiled(key)), returns, facts)
