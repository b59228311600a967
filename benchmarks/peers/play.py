"""Episodes in gymnax, 0.0.9 or 1.x, for the libraries that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import EPSILON_END, EVAL_SEED, eval_episodes


def player(
    algorithm: str, head: Callable[[Any, Any], Any], work: Any
) -> Callable[[Any, int], dict[str, float | None]]:
    """Return ``(learned, seed) -> mean returns``, over members (a leading axis of ``learned``) and episodes.

    ``head(learned, obs)`` are the logits (PPO) or values (DQN) of a batch of flat observations. Half of the
    environments act greedily, half as in training: so there is one program to compile.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    episodes = eval_episodes(work.seeds)

    def act(learned: Any, obs: Any, key: Any) -> Any:
        scores = head(learned, obs)
        greedy = scores.argmax(-1)
        draw_key, explore_key = jax.random.split(key)
        if algorithm == "ppo":
            sampled = jax.random.categorical(draw_key, scores)
        else:
            anything = jax.random.randint(draw_key, greedy.shape, 0, scores.shape[-1])
            explores = jax.random.uniform(explore_key, greedy.shape) < EPSILON_END
            sampled = jnp.where(explores, anything, greedy)
        return jnp.where(jnp.arange(2 * episodes) < episodes, greedy, sampled)

    play = jax.jit(lambda learned, key: play_episodes(act, learned, key, work.env, 2 * episodes))

    def mean_returns(learned: Any, seed: int) -> dict[str, float | None]:
        key = jax.random.PRNGKey(EVAL_SEED + seed)
        rows = []
        for at in range(work.seeds):
            one = learned if work.seeds == 1 else jax.tree.map(lambda leaf, at=at: leaf[at], learned)
            rows.append(play(one, jax.random.fold_in(key, at)).reshape(2, episodes).mean(1))
        greedy, sampled = np.mean(rows, axis=0)
        return {"episode_return": float(greedy), "sampled_return": float(sampled)}

    return mean_returns


def play_episodes(act: Callable[..., Any], learned: Any, key: Any, env_id: str, episodes: int) -> Any:
    """Return the return of one episode in each of ``episodes`` environments.

    All that start count, so that short episodes have no advantage.
    """
    import gymnax
    import jax
    import jax.numpy as jnp

    env, env_params = gymnax.make(env_id)
    reset_key, step_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, episodes), env_params)

    def body(carry: tuple, key: Any) -> tuple:
        env_state, obs, total, going = carry
        action_key, env_key = jax.random.split(key)
        action = act(learned, obs.reshape(episodes, -1), action_key)
        keys = jax.random.split(env_key, episodes)
        # done (gymnax 0.0.9) or terminated, truncated (1.x) stand between the reward and the info.
        obs, env_state, reward, *flags, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            keys, env_state, action, env_params
        )
        total = total + jnp.where(going, reward, 0.0)
        for flag in flags:
            going = going & ~flag.astype(bool)
        return (env_state, obs, total, going), None

    start = (env_state, obs, jnp.zeros(episodes), jnp.ones(episodes, bool))
    keys = jax.random.split(step_key, env_params.max_steps_in_episode)
    (_, _, total, _), _ = jax.lax.scan(body, start, keys)
    return total
