"""Episodes in gymnax, 0.0.9 or 1.x, for the libraries that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import EVAL_SEED, eval_episodes


def player(act: Callable[..., Any], work: Any) -> Callable[[Any, int], float]:
    """Return ``(learned, seed) -> mean return``, over members (a leading axis of ``learned``) and episodes.

    ``act(learned, obs, key) -> action``, of a batch of flat observations.
    """
    import jax
    import numpy as np

    episodes = eval_episodes(work.seeds)
    play = jax.jit(lambda learned, key: play_episodes(act, learned, key, work.env, episodes))

    def mean_return(learned: Any, seed: int) -> float:
        key = jax.random.PRNGKey(EVAL_SEED + seed)
        if work.seeds == 1:
            return float(play(learned, key).mean())
        members = (jax.tree.map(lambda leaf, at=at: leaf[at], learned) for at in range(work.seeds))
        return float(np.mean([play(one, jax.random.fold_in(key, at)) for at, one in enumerate(members)]))

    return mean_return


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
