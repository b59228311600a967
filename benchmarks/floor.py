"""How much of a training step is the network alone: what is left to gain beside XLA's matrix products.

    python benchmarks/floor.py ppo --core 0
    python benchmarks/floor.py ppo --num-envs 2048 --unroll-length 16 --core 0
    python benchmarks/floor.py ppo --env Breakout-MinAtar --num-minibatches 8 --activation relu --core 0
    python benchmarks/floor.py dqn --core 0
    python benchmarks/floor.py pqn --core 0

The steps of the training and, in turn with them in one process, the forward and backward passes that such a step takes
of the same network in the same layout at the same batch sizes: no environment, loss, replay, shuffle or optimiser, and
of the random numbers none. ``share`` is the network's time over the step's: what a faster step would have to be faster
at. It is no strict bound, as XLA compiles the passes anew; near 1, little else is left. One JSON line a command is
appended to ``benchmarks/results/floor.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import against_peers
import throughput
from peers import DEFAULTS, Work


def network_steps(algorithm: str, work: Work, env: Any, steps: int) -> tuple[Callable[..., Any], Any, Any]:
    """Return ``(run, params, obs)``: ``run(params, obs)`` takes the network's passes of ``steps`` training steps.

    It returns what they shift the observations by, and the last gradients.
    """
    import jax
    import jax.numpy as jnp

    from jrl import dqn, networks, ppo, pqn

    described = {"hidden_sizes": tuple(work.hidden_sizes), "activation": work.activation}
    rollout = work.unroll_length * work.num_envs
    if algorithm == "ppo":
        network = networks.actor_critic(env, ppo.Config(**described), features_first=True)
    elif algorithm == "pqn":
        network = networks.q_network(env, pqn.Config(**described), features_first=True)
    else:
        network = networks.q_network(env, dqn.Config(layer_norm=False, **described), features_first=True)
    if algorithm == "dqn":
        num_gradients, batch, forwards = 1, work.batch_size, (work.batch_size,)
    else:
        num_gradients, batch = work.num_epochs * work.num_minibatches, rollout // work.num_minibatches
        # PPO's values and probabilities after the rollout, and the values of the last observations.
        forwards = (rollout, work.num_envs) if algorithm == "ppo" else (work.num_envs,)

    key = jax.random.key(0)
    obs = jax.random.uniform(key, (max(batch, rollout), *env.observation.shape))
    params = network.init(key, obs[:1], ())

    def total(params: Any, obs: Any) -> Any:
        output, _ = network.apply(params, obs, ())
        return sum(leaf.mean() for leaf in jax.tree.leaves(output))

    # A pass shifts the observations of the next by next to nothing: so all of them are computed, and none is the one
    # before. The parameters stay, as moving them is the optimiser's work.
    def forward(params: Any, obs: Any, shift: Any) -> Any:
        return 1e-12 * total(params, obs + shift)

    def gradient(params: Any, obs: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        grads = jax.grad(total)(params, obs + carry[0])
        return 1e-12 * jax.tree.leaves(grads)[0].reshape(-1)[0], grads

    def step(params: Any, obs: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        shift, grads = carry
        shift = jax.lax.fori_loop(
            0, work.unroll_length, lambda _, shift: forward(params, obs[: work.num_envs], shift), shift
        )
        for size in forwards:
            shift = forward(params, obs[:size], shift)
        return jax.lax.fori_loop(
            0, num_gradients, lambda _, carry: gradient(params, obs[:batch], carry), (shift, grads)
        )

    def run(params: Any, obs: Any) -> Any:
        return jax.lax.fori_loop(
            0, steps, lambda _, carry: step(params, obs, carry), (jnp.float32(0), params)
        )

    return jax.jit(run).lower(params, obs).compile(), params, obs


def measure(algorithm: str, work: Work, steps: int, repeats: int) -> dict[str, Any]:
    """Time the training and its network in turn."""
    import jax
    import numpy as np
    from peers import ours

    import jrl

    env, algo, hparams, _ = ours.build(algorithm, work)
    hparams = jax.tree.map(np.float32, hparams)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)

    def chunk(state: Any, hparams: Any) -> Any:
        return jrl.train(algo, state, hparams, num_steps=steps)[0]

    training = jax.jit(chunk, donate_argnums=0).lower(state, hparams).compile()
    network, params, obs = network_steps(algorithm, work, env, steps)
    pairs = []
    for pair in range(repeats + 1):
        state, wall, _ = throughput.timed(lambda state=state: training(state, hparams))
        _, network_wall, _ = throughput.timed(lambda: network(params, obs))
        if pair > 0:  # the first warms up
            pairs.append([round(seconds / steps * 1e6, 3) for seconds in (wall, network_wall)])
    return {
        "algorithm": algorithm,
        "steps": steps,
        "env_steps_per_step": algo.env_steps_per_step,
        "microseconds_per_step": throughput.spread([pair[0] for pair in pairs]),
        "network_microseconds_per_step": throughput.spread([pair[1] for pair in pairs]),
        "share": throughput.spread([network / whole for whole, network in pairs]),
        "machine": throughput.machine(),
        "pairs": pairs,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algorithm", choices=tuple(DEFAULTS))
    against_peers.add_work_flags(parser)
    parser.add_argument(
        "--steps", type=throughput.count, help="training steps a repeat (default: 20, DQN 5,000)"
    )
    parser.add_argument("--repeats", type=throughput.count, default=7)
    parser.add_argument("--core", type=throughput.cores, default=[0])
    parser.add_argument("--out", type=Path, default=throughput.RESULTS)
    arguments = parser.parse_args(argv)
    arguments.memory = False
    work = against_peers.work_from(arguments, arguments.algorithm)
    throughput.pin(arguments.core)
    steps = arguments.steps or (5000 if arguments.algorithm == "dqn" else 20)
    record = {
        **throughput.header("floor", work),
        **measure(arguments.algorithm, work, steps, arguments.repeats),
    }
    throughput.append(arguments.out / "floor.jsonl", record)
    whole, network = (
        record[name]["median"] for name in ("microseconds_per_step", "network_microseconds_per_step")
    )
    print(f"a step {whole:,.0f} µs, its network {network:,.0f} µs: {record['share']['median']:.0%}")


if __name__ == "__main__":
    main()
