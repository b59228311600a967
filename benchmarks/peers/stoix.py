"""Stoix (https://github.com/EdanToledo/Stoix): ``learner_setup`` of its clone's ``ff_ppo.py``, its configuration.

Runs with gymnax 0.0.9 and stoa-env. Its networks and environments are set up outside of the program that is
compiled and timed, op by op, so that this is not counted here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peers
from peers import play
from peers.protocol import Training, compile_program
from peers.stubs import allow_missing


def training(algorithm: str, work: Any, source: Path) -> Training:
    import hydra
    import jax
    import numpy as np

    if work.seeds > 1:
        raise ValueError(
            f"seeds={work.seeds}: Stoix's learner is a pmap, which is not vmapped over seeds here."
        )
    clone = source.parents[4]
    sys.path.insert(0, str(clone))
    # Loggers and checkpoints, which training itself does not use.
    allow_missing("wandb", "neptune", "tensorboard_logger", "marl_eval")
    from stoix.systems.ppo.anakin import ff_ppo
    from stoix.utils import make_env
    from stoix.utils.total_timestep_checker import check_total_timesteps

    network = [
        f"network.{side}_network.pre_torso.{setting}"
        for side in ("actor", "critic")
        for setting in (f"layer_sizes={list(work.hidden_sizes)}", f"activation={work.activation}")
    ]
    with hydra.initialize_config_dir(str(clone / "stoix/configs/default/anakin"), version_base="1.2"):
        config = hydra.compose(
            "default_ff_ppo.yaml",
            [
                f"hydra.searchpath=[file://{clone}/stoix/configs]",
                f"env.scenario.name={work.env}",
                f"arch.total_num_envs={work.num_envs}",
                f"arch.total_timesteps={work.env_steps}",
                "arch.num_evaluation=1",
                "arch.absolute_metric=False",
                f"system.rollout_length={work.unroll_length}",
                f"system.epochs={work.num_epochs}",
                f"system.num_minibatches={work.num_minibatches}",
                f"system.actor_lr={work.learning_rate}",
                f"system.critic_lr={work.learning_rate}",
                f"system.gamma={peers.GAMMA}",
                f"system.gae_lambda={peers.GAE_LAMBDA}",
                f"system.clip_eps={peers.CLIP_EPS}",
                f"system.ent_coef={peers.ENTROPY_COEF}",
                f"system.vf_coef={peers.VALUE_COEF}",
                f"system.max_grad_norm={peers.MAX_GRAD_NORM}",
                "system.decay_learning_rates=True",
                *network,
            ],
        )
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    from omegaconf import OmegaConf

    OmegaConf.set_struct(config, False)
    config.num_devices = 1
    config = check_total_timesteps(config)
    env, _ = make_env.make(config)

    def setup(seed: int) -> Any:
        return ff_ppo.learner_setup(env, jax.random.split(jax.random.PRNGKey(seed), 3), config)

    learn, actor, first = setup(0)
    compiled, facts = compile_program(learn, first)

    def head(params: Any, obs: Any) -> Any:
        return actor.apply(params, obs).logits

    mean_returns = play.player(algorithm, head, work)

    def returns(out: Any, seed: int) -> dict[str, float | None]:
        # Leading axes: device and batch, one each; then the updates.
        params = jax.tree.map(lambda leaf: leaf[0, 0], out.learner_state.params.actor_params)
        log = {name: np.asarray(leaf)[0] for name, leaf in out.episode_metrics.items()}
        late = {name: leaf[-max(1, int(len(leaf) * peers.LAST)) :] for name, leaf in log.items()}
        ended = late["is_terminal_step"]
        return {
            **mean_returns(params, seed),
            "training_return": float(late["episode_return"][ended].mean()) if ended.any() else None,
        }

    def prepare(seed: int) -> Any:
        return jax.block_until_ready(setup(seed)[2])

    return Training(prepare, lambda state: jax.block_until_ready(compiled(state)), returns, facts)
