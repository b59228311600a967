"""Environments of finitely many states, written once as what may happen: sampled, and solved exactly.

::

    def outcomes(state, action, params):        # what may happen, K possibilities
        ...
        return Outcomes(probability, next_state, reward, terminated)

    env = from_outcomes(outcomes, start, num_states, params, Discrete(4), "MyGrid")
    model = to_mdp(env, gamma=0.9)              # exact, from the same function
    jrl.ops.mdp.policy_iteration(model.mdp)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.batched import OneOf, from_batched_functions, uniform
from jrl.ops.distributions import inverse_cdf
from jrl.ops.mdp import TabularMDP
from jrl.types import Array, Discrete, Environment, FiniteObservation, PyTree

_MAX_CHAIN = 16


class Outcomes(NamedTuple):
    """The ``K`` things that may happen; those of probability 0 never do.

    Attributes:
        probability: float32 ``[K]``; sums to 1.
        next_state: int32 ``[K]``; where the episode terminates, what is observed last.
        reward: float32 ``[K]``.
        terminated: bool ``[K]``.
    """

    probability: Array
    next_state: Array
    reward: Array
    terminated: Array


class Start(NamedTuple):
    """Where an episode may start: ``probability`` float32 ``[K]``, sums to 1; ``state`` int32 ``[K]``."""

    probability: Array
    state: Array


class FiniteModel(NamedTuple):
    """What :func:`to_mdp` returns.

    Attributes:
        mdp: the dynamics, states in the order of the observations.
        start: float32 ``[S]``, how likely an episode starts in each state.
        obs: the observation of each state, leaves ``[S, ...]``.
    """

    mdp: TabularMDP
    start: Array
    obs: PyTree


class FiniteState(NamedTuple):
    """``state``: int32 ``[]``; ``time``: int32 ``[]``, steps taken in this episode."""

    state: Array
    time: Array


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteStep(OneOf):
    """The step of :func:`from_outcomes`; a wrapper that replaces it hides the dynamics, as it should."""

    outcomes: Callable[..., Outcomes]
    start: Callable[[Any], Start]


def from_outcomes(
    outcomes: Callable[[Array, Array, Any], Outcomes],
    start: Callable[[Any], Start],
    num_states: int,
    params: Any,
    action: Discrete,
    name: str,
    *,
    raw: bool = False,
) -> Environment:
    """Make an environment of the probabilities of what may happen.

    Args:
        outcomes: ``(state int32 [], action int32 [], params) -> Outcomes``.
        start: ``params -> Start``.
        num_states: ``S``.
        params: a record with a field ``max_steps``, after which an episode is truncated; traced.
        action: the action space.
        name: for messages and records.
        raw: observe the state as an int32 index, instead of one-hot float32 ``[S]``.

    Raises:
        ValueError: ``max_steps`` is below 1.
    """
    check_count(name, max_steps=params.max_steps)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    arrays = jax.tree.map(jnp.asarray, params)
    random_steps = jax.eval_shape(outcomes, index, index, arrays).probability.shape[0] > 1
    random_starts = jax.eval_shape(start, arrays).probability.shape[0] > 1

    def reset(words: Array, params: Any) -> FiniteState:
        possible = start(params)
        chosen = draw(words[0], possible.probability) if random_starts else jnp.zeros(words.shape[1], int)
        state = possible.state[chosen].astype(jnp.int32)
        return FiniteState(state, jnp.zeros_like(state))

    def transition(words: Array, state: FiniteState, action: Array, params: Any) -> tuple[Any, ...]:
        possible = jax.vmap(outcomes, (0, 0, None))(state.state, action, params)
        if random_steps:
            chosen = draw(words[0], possible.probability)
            happened = jax.tree.map(lambda x: pick(x, chosen), possible)
        else:
            happened = jax.tree.map(lambda x: x[:, 0], possible)
        stepped = FiniteState(happened.next_state.astype(jnp.int32), state.time + 1)
        return stepped, happened.reward, happened.terminated, stepped.time >= params.max_steps

    def observe(state: FiniteState) -> Array:
        return state.state if raw else jax.nn.one_hot(state.state, num_states, dtype=jnp.float32)

    env = from_batched_functions(
        reset,
        transition,
        observe,
        params,
        action,
        name,
        reset_words=int(random_starts),
        step_words=int(random_steps),
    )
    step = FiniteStep(env.step.single, env.step.batched, outcomes, start)  # type: ignore[attr-defined]
    return env._replace(step=step, observation=FiniteObservation(num_states, one_hot=not raw))


def draw(words: Array, probability: Array) -> Array:
    """Draw an index by inverting the distribution function; one of probability 0 is never drawn.

    Args:
        words: uint32 ``[B]``.
        probability: ``[B, K]``, or ``[K]`` for all.

    Returns:
        int32 ``[B]``.
    """
    probability = jnp.broadcast_to(probability, (len(words), probability.shape[-1]))
    return inverse_cdf(probability, uniform(words, 0.0, 1.0))


def pick(values: Array, index: Array) -> Array:
    """Return ``values[b, index[b]]``, ``[B]``, of few values by a chain of selections, which XLA fuses."""
    num_values = values.shape[1]
    if num_values > _MAX_CHAIN:
        return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
    return functools.reduce(
        lambda chosen, k: jnp.where(index == k, values[:, k], chosen), range(1, num_values), values[:, 0]
    )


def exact_model(env: Environment, gamma: Array | float, params: Any = None) -> FiniteModel | None:
    """Return the dynamics of an environment made by :func:`from_outcomes`, None of any other.

    Pure: ``jax.vmap`` over ``params`` gives many processes at once.
    """
    if not isinstance(env.step, FiniteStep) or not isinstance(env.observation, FiniteObservation):
        return None
    assert isinstance(env.action, Discrete)
    params = jax.tree.map(jnp.asarray, env.params if params is None else params)
    num_states, num_actions = env.observation.n, env.action.n
    states = jnp.arange(num_states, dtype=jnp.int32)
    pairs = jax.vmap(jax.vmap(env.step.outcomes, (None, 0, None)), (0, None, None))
    possible = pairs(states, jnp.arange(num_actions, dtype=jnp.int32), params)
    continuing = possible.probability * (1.0 - possible.terminated)
    rows = jnp.arange(num_states)[:, None, None], jnp.arange(num_actions)[None, :, None]
    P = jnp.zeros((num_states, num_actions, num_states)).at[(*rows, possible.next_state)].add(continuing)
    R = jnp.sum(possible.probability * possible.reward, axis=-1)
    first = env.step.start(params)
    obs = jax.nn.one_hot(states, num_states) if env.observation.shape else states
    return FiniteModel(
        TabularMDP(P, R, jnp.asarray(gamma, R.dtype)),
        jnp.zeros((num_states,)).at[first.state].add(first.probability),
        obs,
    )


class ProcessParams(NamedTuple):
    """``mdp``: the process; ``start``: float32 ``[S]``, probabilities; ``max_steps``: int32, time limit."""

    mdp: TabularMDP
    start: Any
    max_steps: Any


def from_mdp(
    mdp: TabularMDP,
    *,
    start: Any = None,
    max_steps: int = 1_000,
    raw: bool = False,
    name: str = "TabularMDP",
) -> Environment:
    """Make an environment of a process: ``P`` and ``R`` are its parameters, traced.

    The reward is the expected one, ``R[s, a]``. With the probability that a row lacks the episode terminates;
    the state observed last is then the one acted in. ``mdp.gamma`` is left to the algorithm.

    Args:
        mdp: the process.
        start: probabilities ``[S]`` of starting in each state; None is uniform.
        max_steps: steps after which an episode is truncated.
        raw: observe the state as an int32 index, instead of one-hot float32 ``[S]``.
        name: for messages and records.

    Raises:
        ValueError: shapes do not fit, or a probability is below 0 or a sum of them above 1.
    """
    transition = np.asarray(mdp.P)
    num_states, num_actions = np.shape(mdp.R) if np.ndim(mdp.R) == 2 else (0, 0)
    if transition.shape != (num_states, num_actions, num_states) or not transition.size:
        raise ValueError(
            f"from_mdp: P has shape {transition.shape} and R {np.shape(mdp.R)}; they must be [S, A, S] and "
            "[S, A]."
        )
    start = np.full(num_states, 1.0 / num_states, np.float32) if start is None else np.asarray(start)
    for what, rows in (("P[s, a]", transition), ("start", start)):
        if not (rows.min() >= 0 and rows.sum(-1).max() <= 1 + 1e-4):  # NaN is neither
            raise ValueError(
                f"from_mdp: {what} has entries down to {rows.min():.4g} and sums up to "
                f"{rows.sum(-1).max():.4g}; probabilities are at least 0 and sum to at most 1."
            )
    if start.shape != (num_states,) or not start.sum() >= 1 - 1e-4:
        raise ValueError(
            f"from_mdp: start has shape {start.shape} and sum {start.sum():.4g}; it must be [S={num_states}] "
            "and sum to 1."
        )

    def outcomes(state: Array, action: Array, params: ProcessParams) -> Outcomes:
        going_on = params.mdp.P[state, action]
        ending = jnp.maximum(1.0 - going_on.sum(), 0.0)
        ending = jnp.where(ending > 1e-5, ending, 0.0)  # rows that sum to 1 but for rounding never end
        return Outcomes(
            probability=jnp.append(going_on, ending),
            next_state=jnp.append(jnp.arange(num_states), state),
            reward=jnp.full((num_states + 1,), params.mdp.R[state, action]),
            terminated=jnp.arange(num_states + 1) == num_states,
        )

    def first(params: ProcessParams) -> Start:
        return Start(params.start, jnp.arange(num_states))

    params = ProcessParams(jax.tree.map(jnp.asarray, mdp), jnp.asarray(start, jnp.float32), max_steps)
    return from_outcomes(outcomes, first, num_states, params, Discrete(num_actions), name, raw=raw)


def replace_params(params: Any, changes: Any, name: str) -> Any:
    """Return a record with some fields changed; what is no mapping of fields must be such a record itself.

    What is a real number in ``params`` stays one, whatever is given: of an integer, as which 10 for 9.8 would come,
    other values are cut to whole ones (:func:`jrl.envs.strict`).

    Raises:
        TypeError: it is neither.
        ValueError: a field that does not exist, one that is no number, or an array of another shape.
    """
    if changes is None:
        return params
    if isinstance(changes, type(params)):
        changed = changes
    elif isinstance(changes, Mapping):
        unknown = sorted(set(changes) - set(fields := _fields(params)))
        if unknown:
            raise ValueError(f"{name}: params has no field {unknown[0]!r}; it has {fields}.")
        values = {
            field: np.asarray(value) if isinstance(value, list | tuple) and _is_leaf(params, field) else value
            for field, value in changes.items()
        }
        is_tuple = hasattr(params, "_replace")
        changed = params._replace(**values) if is_tuple else dataclasses.replace(params, **values)
    else:
        raise TypeError(
            f"{name}: params is a {_qualified(changes)}: expected a {_qualified(params)}, or a mapping of its "
            f"fields {_fields(params)}."
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(changed)
    defaults = jax.tree_util.tree_leaves_with_path(params)
    if [path for path, _ in leaves] != [path for path, _ in defaults]:
        raise ValueError(
            f"{name}: params have the structure {structure}, the environment's own {jax.tree.structure(params)}."
        )
    kept = [
        _kept(leaf, default, f"{name}: params{jax.tree_util.keystr(path)}")
        for (path, leaf), (_, default) in zip(leaves, defaults, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def _qualified(value: Any) -> str:
    # With its module, as gymnax calls all of its parameters EnvParams.
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _fields(params: Any) -> tuple[str, ...]:
    """Of a NamedTuple, or of a dataclass as gymnax has them."""
    return getattr(params, "_fields", None) or tuple(vars(params))


def _is_leaf(params: Any, field: str) -> bool:
    return jax.tree_util.all_leaves([getattr(params, field)])  # a number or an array, no record


def _kept(value: Any, default: Any, what: str) -> Any:
    """Return a value of a parameter, a real number where the default is one."""
    if not isinstance(value, jax.Array) and np.asarray(value).dtype.kind not in "biuf":
        raise ValueError(f"{what} is {value!r}, which is no number.")
    if jnp.shape(value) != jnp.shape(default):
        raise ValueError(f"{what} has shape {jnp.shape(value)}, where {jnp.shape(default)} is expected.")
    real, given = jnp.result_type(default), jnp.result_type(value)
    if not jnp.issubdtype(real, jnp.floating) or jnp.issubdtype(given, jnp.inexact):
        return value
    return float(value) if isinstance(value, int) else jnp.asarray(value, real)


def check_count(name: str, **values: Any) -> None:
    """Raise ValueError for a parameter below 1, where it is known already."""
    for field, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not np.asarray(value) >= 1:  # NaN is not
            raise ValueError(f"{name}: {field}={np.asarray(value):g}: must be at least 1.")


def check_probability(name: str, **values: Any) -> None:
    """Raise ValueError for a parameter that is no probability, where it is known already."""
    for field, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not 0.0 <= float(value) <= 1.0:
            raise ValueError(f"{name}: {field}={float(value):g}: must be in [0, 1].")
