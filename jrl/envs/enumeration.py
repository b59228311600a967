"""The finite process behind an environment: exact where it is known, else found by exploring it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.finite import FiniteModel, exact_model
from jrl.ops.mdp import TabularMDP
from jrl.types import Array, Discrete, Environment, Key

_CHUNK = 64  # states stepped at once


def to_mdp(
    env: Environment,
    gamma: Array | float,
    *,
    params: Any = None,
    key: Key | None = None,
    num_samples: int = 1,
    max_states: int = 10_000,
) -> FiniteModel:
    """Return the dense process of a finite environment.

    Where the environment was made by :func:`jrl.envs.from_outcomes` (jrl's own tabular ones) the result is
    exact and the function pure. Any other one is explored on the host from its resets: each state is stepped
    ``num_samples`` times with each action. That is exact for a deterministic environment, and elsewhere an
    estimate, ``P`` with a standard error of at most ``0.5 / sqrt(num_samples)``.

    States are the distinct observations, which must determine what happens next. Time limits are left out.

    Args:
        env: a single environment with Discrete actions.
        gamma: discount factor of the process.
        params: its parameters; None means ``env.params``.
        key: consumed by the exploration.
        num_samples: steps for each state and action, and resets.
        max_states: observations after which it gives up.

    Raises:
        TypeError: the actions are not Discrete.
        ValueError: more than ``max_states`` observations, or one that only a time limit ends on, so that what
            follows it is unknown.
    """
    if not isinstance(env.action, Discrete):
        raise TypeError(
            f"to_mdp({env.name}): actions are {env.action!r}; a finite process has Discrete ones."
        )
    exact = exact_model(env, gamma, params)
    if exact is not None:
        return exact
    if num_samples < 1:
        raise ValueError(f"to_mdp(num_samples={num_samples}): needs at least one.")
    params = env.params if params is None else params
    reset_key, step_key = jax.random.split(jax.random.key(0) if key is None else key)
    reset = jax.jit(jax.vmap(env.reset, (0, None)))
    num_actions = env.action.n

    def step_all(key: Key, env_states: Any) -> Any:
        def one(key: Key, env_state: Any, action: Array) -> Any:
            return env.step(key, env_state, action, params)

        actions = jnp.arange(num_actions, dtype=jnp.int32)
        keys = jax.random.split(key, (_CHUNK, num_actions, num_samples))
        sampled = jax.vmap(one, (0, None, None))
        return jax.vmap(jax.vmap(sampled, (0, None, 0)), (0, 0, None))(keys, env_states, actions)

    step = jax.jit(step_all)
    found = _Found(env.name, max_states)
    env_states, obs = _leaves(reset(jax.random.split(reset_key, num_samples), params))
    starts = [found.index(obs, i) for i in range(num_samples)]
    for i, state in enumerate(starts):
        found.reach(state, env_states, i)

    rows: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    state_spec = jax.eval_shape(env.reset, reset_key, params)[0]
    for count in range(max_states):
        frontier = [state for state in found.env_state if state not in rows][:_CHUNK]
        if not frontier:
            break
        padded = frontier + frontier[:1] * (_CHUNK - len(frontier))
        leaves = [np.stack(leaf) for leaf in zip(*(found.env_state[s] for s in padded), strict=True)]
        stepped, out = step(jax.random.fold_in(step_key, count), _from_leaves(leaves, state_spec))
        stepped_leaves, next_obs = _leaves((stepped, out.next_obs))
        out = jax.device_get(out._replace(obs=(), next_obs=()))
        for i, state in enumerate(frontier):
            successors = np.zeros((num_actions, num_samples), int)
            for where in np.ndindex(successors.shape):
                at = (i, *where)
                successor = successors[where] = found.index(next_obs, at)
                if not (out.terminated[at] or out.truncated[at]):
                    found.reach(successor, stepped_leaves, at)
                elif not out.terminated[at]:
                    found.cut.add(successor)
            rows[state] = (successors, out.reward[i], out.terminated[i])

    unknown = sorted(found.cut - rows.keys())
    if unknown:
        raise ValueError(
            f"to_mdp({env.name}): the time limit ended every episode that came to observation "
            f"{found.obs[unknown[0]]}, so that what follows it is unknown; raise the limit in params."
        )
    num_states = len(found.obs)
    P, R = np.zeros((num_states, num_actions, num_states), np.float32), np.zeros((num_states, num_actions))
    for state, (successors, reward, terminated) in rows.items():
        for a in range(num_actions):
            np.add.at(P[state, a], successors[a], (1.0 - terminated[a]) / num_samples)
        R[state] = reward.mean(-1)
    start = np.bincount(starts, minlength=num_states) / num_samples
    columns = [np.stack(leaf) for leaf in zip(*found.obs, strict=True)]
    return FiniteModel(
        TabularMDP(jnp.asarray(P), jnp.asarray(R, jnp.float32), jnp.asarray(gamma, jnp.float32)),
        jnp.asarray(start, jnp.float32),
        _from_leaves(columns, env.observation),
    )


class _Found:
    """The observations met so far, and for each that episodes go on from a state of the environment."""

    def __init__(self, name: str, max_states: int) -> None:
        self.name, self.max_states = name, max_states
        self.obs: list[tuple[np.ndarray, ...]] = []
        self.env_state: dict[int, list[Any]] = {}
        self.cut: set[int] = set()
        self._index: dict[bytes, int] = {}

    def index(self, leaves: list[np.ndarray], at: Any) -> int:
        """Return the number of an observation, a new one where it was not met before."""
        obs = tuple(np.asarray(leaf[at]) for leaf in leaves)
        identity = b"".join(leaf.tobytes() for leaf in obs)
        if identity not in self._index:
            if len(self.obs) >= self.max_states:
                raise ValueError(
                    f"to_mdp({self.name}): more than max_states={self.max_states} observations; raise it, or "
                    "make the environment smaller. Continuous observations have no table."
                )
            self._index[identity] = len(self.obs)
            self.obs.append(obs)
        return self._index[identity]

    def reach(self, state: int, leaves: list[Any], at: Any) -> None:
        """Note a state of the environment to step from; the first one is kept, the furthest from a limit."""
        self.env_state.setdefault(state, [leaf[at] for leaf in leaves])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _leaves(trees: tuple[Any, Any]) -> list[list[np.ndarray]]:
    """Return the leaves of both as NumPy arrays, of typed keys their data."""
    return [
        [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in jax.tree.leaves(tree)]
        for tree in trees
    ]


def _from_leaves(leaves: list[np.ndarray], spec: Any) -> Any:
    specs, structure = jax.tree.flatten(spec)
    arrays = [
        jax.random.wrap_key_data(jnp.asarray(leaf)) if _is_key(s) else jnp.asarray(leaf)
        for leaf, s in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)
