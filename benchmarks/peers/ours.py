"""jrl's side: one run, or members as a sweep computes them; either sharded over CPU devices."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peers import EPSILON_END, EVAL_SEED, EXPLORATION, GAMMA, LAST, Q_LAMBDA, REWARD_SCALE, eval_episodes
from peers.protocol import Training, compile_program


def training(algorithm: str, work: Any, source: Path | None) -> Training:
    import jax
    import numpy as np

    import jrl
    from jrl import sweep
    from jrl.sweep import batching, planning, program

    devices = jax.devices()[: work.devices]
    if len(devices) < work.devices:
        raise ValueError(f"devices={work.devices}: this process has {len(devices)}.")
    env, algo, hparams, num_steps = build(algorithm, work)
    # Arrays, not Python numbers: jit must not fold them into the program as constants.
    hparams = jax.tree.map(np.float32, hparams)

    def train(key: Any, hparams: Any) -> Any:
        return jrl.train(algo, algo.init(key, hparams), hparams, num_steps=num_steps)

    def prepare(seed: int) -> Any:
        key = jax.random.key(seed)
        if work.prng == "hashed":
            key = jrl.ops.hashed(key)
        return key if work.seeds == 1 else jax.random.split(key, work.seeds)

    whole = train
    if work.seeds > 1:
        mesh = program.mesh(devices)
        hparams = sweep.broadcast(hparams, work.seeds)
        whole = program.sharded(
            batching.over_members(train, work.at_once or planning.choose_width("auto", devices)), mesh
        )
    compiled, facts = compile_program(jax.jit(whole), prepare(0), hparams)

    def returns(result: Any, seed: int) -> dict[str, float | None]:
        state, metrics = jax.device_get(result)
        late = jax.tree.map(lambda leaf: leaf[..., -max(1, int(num_steps * LAST)) :], metrics)
        ended = late["num_episodes"].sum()
        rows = []
        for member in range(work.seeds):
            one = state if work.seeds == 1 else jax.tree.map(lambda leaf, at=member: leaf[at], state)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(EVAL_SEED + seed), member))
            policies = algo.policy(one), algo.policy(one, greedy=False)
            for key, policy in zip(keys, policies, strict=True):
                stats = jrl.evaluate(key, env, policy, num_episodes=eval_episodes(work.seeds))
                rows.append(np.mean(stats.episode_return))
        return {
            "episode_return": float(np.mean(rows[::2])),
            "sampled_return": float(np.mean(rows[1::2])),
            "training_return": float((late["episode_return"] * late["num_episodes"]).sum() / ended)
            if ended
            else None,
        }

    def run(keys: Any) -> Any:
        return jax.block_until_ready(compiled(keys, hparams))

    return Training(prepare, run, returns, facts)


def build(algorithm: str, work: Any) -> tuple[Any, Any, Any, int]:
    """Return ``(env, algo, hparams, num_steps)`` for ``work``: the settings of the peers, nothing tuned."""
    import jax
    import optax

    import jrl
    from jrl import envs, parallel

    env = jrl.make(work.env)
    if len(env.observation.shape) > 1:
        env = envs.flatten_observation(env)  # the peers' networks are fully connected
    shared = {"hidden_sizes": tuple(work.hidden_sizes), "activation": work.activation}
    if work.kernels != "xla":
        shared["kernels"] = work.kernels
    warmup = 0
    if algorithm == "ppo":
        config = jrl.ppo.Config(
            num_envs=work.num_envs,
            unroll_length=work.unroll_length,
            num_epochs=work.num_epochs,
            num_minibatches=work.num_minibatches,
            num_microbatches=work.num_microbatches,
            **shared,
        )
        hparams = jrl.ppo.HParams(
            learning_rate=work.learning_rate, anneal_env_steps=work.env_steps, gamma=GAMMA
        )
        make = functools.partial(jrl.ppo.make, env, config)
    elif algorithm == "pqn":
        config = jrl.pqn.Config(
            num_envs=work.num_envs,
            unroll_length=work.unroll_length,
            num_epochs=work.num_epochs,
            num_minibatches=work.num_minibatches,
            **shared,
        )
        hparams = jrl.pqn.HParams(
            learning_rate=work.learning_rate,
            anneal_env_steps=work.env_steps,
            gamma=GAMMA,
            q_lambda=Q_LAMBDA,
            epsilon_end=EPSILON_END,
            epsilon_env_steps=work.env_steps * EXPLORATION,
        )
        # Scaled as purejaxql's are; returns are those of the environment as it is.
        make = functools.partial(jrl.pqn.make, envs.scale_reward(env, REWARD_SCALE), config)
    else:
        config = jrl.dqn.Config(
            num_envs=work.num_envs,
            unroll_length=work.unroll_length,
            batch_size=work.batch_size,
            capacity=work.capacity,
            warmup_env_steps=work.warmup_env_steps,
            replay_dtype=work.replay_dtype,
            double=False,
            layer_norm=False,
            **shared,
        )
        hparams = jrl.dqn.HParams(
            learning_rate=work.learning_rate,
            anneal_env_steps=0.0,
            epsilon_end=EPSILON_END,
            epsilon_env_steps=work.env_steps * EXPLORATION,
            target_period=work.target_period,
            gamma=GAMMA,
        )

        # Plain Adam: the DQNs this is compared with clip no gradients.
        def adam(hparams: Any, learning_rate: Any) -> optax.GradientTransformation:
            return jrl.optim.adam(learning_rate, max_grad_norm=None, eps=1e-8, kernels=work.kernels)

        make = functools.partial(jrl.dqn.make, env, config, optimizer=adam)
        warmup = work.warmup_env_steps
    one_run_sharded = work.devices > 1 and work.seeds == 1
    devices = jax.devices()[: work.devices]
    algo = parallel.data_parallel(make, devices, kernels=work.kernels) if one_run_sharded else make()
    warmup = -(-warmup // algo.env_steps_per_step) * algo.env_steps_per_step
    if (work.env_steps - warmup) % algo.env_steps_per_step or work.env_steps <= warmup:
        raise ValueError(
            f"env_steps={work.env_steps}: must exceed the warm-up of {warmup} by a multiple of "
            f"{algo.env_steps_per_step}, so that all that are compared take the same number of steps."
        )
    return env, algo, hparams, (work.env_steps - warmup) // algo.env_steps_per_step
