"""rejax (https://github.com/keraJLi/rejax, PyPI ``rejax``): ``PPO.create(...).train(key)``, and DQN's.

Runs with gymnax 0.0.9. Two of its ways cannot be set and differ from the others': its PPO clips each element
of the gradient instead of the global norm, and Adam's ε is 1e-8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
from peers import play
from peers.protocol import Training, compile_program


def training(algorithm: str, work: Any, source: Path | None) -> Training:
    import flax.linen as nn
    import jax
    import optax
    import rejax

    common = {
        "env": work.env,
        "num_envs": work.num_envs,
        "total_timesteps": work.env_steps,
        "eval_freq": work.env_steps,
        "skip_initial_evaluation": True,
        "gamma": peers.GAMMA,
    }
    activation = getattr(nn, work.activation)
    if algorithm == "ppo":
        gradient_steps = peers.updates(work) * work.num_epochs * work.num_minibatches
        algo = rejax.PPO.create(
            **common,
            num_steps=work.unroll_length,
            num_epochs=work.num_epochs,
            num_minibatches=work.num_minibatches,
            learning_rate=optax.linear_schedule(work.learning_rate, 0.0, gradient_steps),
            max_grad_norm=peers.MAX_GRAD_NORM,
            gae_lambda=peers.GAE_LAMBDA,
            clip_eps=peers.CLIP_EPS,
            ent_coef=peers.ENTROPY_COEF,
            vf_coef=peers.VALUE_COEF,
            agent_kwargs={"activation": work.activation, "hidden_layer_sizes": tuple(work.hidden_sizes)},
        )

        def head(ts: Any, obs: Any) -> Any:
            return algo.actor.apply(ts.actor_ts.params, obs, method="_action_dist").logits

    else:
        algo = rejax.DQN.create(
            **common,
            buffer_size=work.capacity,
            fill_buffer=work.warmup_env_steps,
            batch_size=work.batch_size,
            learning_rate=work.learning_rate,
            num_epochs=1,
            target_update_freq=work.target_period,
            polyak=0.0,  # the target is the network itself
            eps_start=1.0,
            eps_end=peers.EPSILON_END,
            exploration_fraction=peers.EXPLORATION,
            ddqn=False,
        )
        # DQN.create takes no widths: its own (64, 64) cannot be overridden there.
        agent = algo.agent.clone(hidden_layer_sizes=tuple(work.hidden_sizes), activation=activation)
        algo = algo.replace(agent=agent)

        def head(ts: Any, obs: Any) -> Any:
            return algo.agent.apply(ts.q_ts.params, obs)

    # Its evaluation is part of its training program; the command evaluates afterwards, untimed.
    algo = algo.replace(eval_callback=lambda algo, ts, key: ())

    def prepare(seed: int) -> Any:
        key = jax.random.PRNGKey(seed)
        return key if work.seeds == 1 else jax.random.split(key, work.seeds)

    def train(key: Any) -> Any:
        return algo.train(key)[0]

    compiled, facts = compile_program(
        jax.jit(train if work.seeds == 1 else jax.vmap(train)), jax.eval_shape(prepare, 0)
    )
    mean_returns = play.player(algorithm, head, work)

    def returns(ts: Any, seed: int) -> dict[str, float | None]:
        acting = ts.replace(replay_buffer=()) if algorithm == "dqn" else ts
        return {**mean_returns(acting, seed), "training_return": None}  # it logs no episodes of its training

    return Training(prepare, lambda key: jax.block_until_ready(compiled(key)), returns, facts)
