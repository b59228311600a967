"""Many members in one program: all side by side, or in groups one after the other.

A CPU gains nothing from computing members side by side: a member's matrices are large enough, and those of many
no longer fit its caches. So a group may be as small as one member, and then each member is computed by the very
program of a run alone, to the last bit. An accelerator wants all side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.sweep import members
from jrl.types import Algorithm, Array, Key, Metrics, Policy, PyTree


def batch(algo: Algorithm, *, width: int | None = None) -> Algorithm:
    """Return an algorithm whose keys, states, hyperparameters and metrics have a leading axis of members ``[M]``.

    It is still an :class:`~jrl.types.Algorithm`: ``jrl.train`` and one's own ``lax.scan`` take it as it is::

        keys, hparams = sweep.product(sweep.seeds(64), sweep.grid(ppo.HParams(), learning_rate=[1e-4, 1e-3]))
        many = sweep.batch(ppo.make(env))
        state, metrics = jrl.train(many, many.init(keys, hparams), hparams, num_steps=100)   # metrics [100, 128]

    ``policy(state)`` takes observations with a leading axis of members, ``[M, ...]``; ``env_steps_per_step`` is
    that of one member.

    Args:
        algo: the algorithm of one member.
        width: members computed side by side, static; the groups follow one another. None computes all at once;
            1 computes each as it would be computed alone. Must divide the number of members.
    """

    def init(keys: Key, hparams: PyTree) -> Any:
        return over_members(algo.init, width)(keys, hparams)

    def step(state: Any, hparams: PyTree) -> tuple[Any, Metrics]:
        return update_members(algo.step, width)(state, hparams)

    def policy(state: Any, *, greedy: bool = True) -> Policy:
        single = algo.policy(_take(state, 0), greedy=greedy)
        params = jax.vmap(lambda state: algo.policy(state, greedy=greedy).params)(state)
        return Policy(_act_side_by_side(single.apply), params, single.init_memory)

    return algo._replace(init=init, step=step, policy=policy)


@functools.cache
def _act_side_by_side(apply: Callable[..., Any]) -> Callable[..., Any]:
    # Cached: a Policy's function is static, and a new one a call would recompile each time.
    def act(params: PyTree, key: Key, obs: PyTree, memory: PyTree) -> tuple[Array, PyTree, PyTree]:
        return jax.vmap(apply)(params, jax.random.split(key, members.size(params)), obs, memory)

    return act


def over_members(function: Callable[..., Any], width: int | None) -> Callable[..., Any]:
    """Return ``function`` over the leading axis of all its arguments, in groups of ``width``."""

    def mapped(*arguments: PyTree) -> Any:
        num = members.size(arguments)
        if width is None or width == num > 1:
            return jax.vmap(function)(*arguments)
        grouped = split_groups(arguments, num, width)
        results = jax.lax.map(lambda group: _of_group(function, width)(*group), grouped)
        return merge_groups(results, width)

    return mapped


def update_members(
    function: Callable[..., tuple[Any, Any]], width: int | None
) -> Callable[..., tuple[Any, Any]]:
    """Return ``(state, *rest) -> (state, out)`` over members, the states updated in place.

    As :func:`over_members`; but the states are carried, so that the program holds them once. The function returned
    also takes ``num_groups=``, a traced number: the members of later groups keep their state, and cost nothing.
    (Where all are one group it is computed in any case.)
    """

    def mapped(state: PyTree, *rest: PyTree, num_groups: Array | None = None) -> tuple[Any, Any]:
        num = members.size((state, *rest))
        size = num if width is None else width
        if size == num > 1:
            return jax.vmap(function)(state, *rest)  # not a loop of one round, which would copy the states
        of_group = _of_group(function, size)
        states, others = split_groups(state, num, size), split_groups(rest, num, size)
        out_shape = jax.eval_shape(of_group, _take((states, others), 0)[0], *_take((states, others), 0)[1])[1]
        outs = jax.tree.map(lambda leaf: jnp.zeros((num // size, *leaf.shape), leaf.dtype), out_shape)

        def body(index: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            states, outs = carry
            new, out = of_group(_take(states, index), *_take(others, index))
            return _put(states, index, new), _put(outs, index, out)

        last = num // size if num_groups is None else num_groups
        states, outs = loop(0, last, body, (states, outs))
        return merge_groups(states, size), merge_groups(outs, size)

    return mapped


def loop(
    start: Array | int, stop: Array | int, body: Callable[[Array, PyTree], PyTree], carry: PyTree
) -> PyTree:
    """``jax.lax.fori_loop``, which carries no array without elements.

    Within ``shard_map`` the compiler of jaxlib 0.11 crashes on a loop that does.
    """
    leaves, structure = jax.tree.flatten(carry)

    def full(leaves: list[Array]) -> list[Array]:
        return [leaf for leaf in leaves if leaf.size]

    def restored(kept: list[Array]) -> PyTree:
        rest = iter(kept)
        # made anew: one from outside would be carried too
        whole = [next(rest) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        return jax.tree.unflatten(structure, whole)

    kept = jax.lax.fori_loop(
        start, stop, lambda index, kept: full(jax.tree.leaves(body(index, restored(kept)))), full(leaves)
    )
    return restored(kept)


def split_groups(tree: PyTree, num: int, width: int) -> PyTree:
    """Return leaves ``[M, ...]`` as ``[M / width, width, ...]``, or ``[M, ...]`` as it is for a width of 1.

    Raises:
        ValueError: ``width`` does not divide the number of members.
    """
    if width < 1 or num % width:
        raise ValueError(
            f"width={width} does not divide the {num} members: groups are of one size. Use a divisor of {num}, or "
            "None for all side by side."
        )
    if width == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.reshape(num // width, width, *leaf.shape[1:]), tree)


def merge_groups(tree: PyTree, width: int) -> PyTree:
    """Undo :func:`split_groups`."""
    if width == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), tree)


def _of_group(function: Callable[..., Any], width: int) -> Callable[..., Any]:
    return function if width == 1 else jax.vmap(function)


def _take(tree: PyTree, index: Array | int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _put(tree: PyTree, index: Array, values: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, value: leaf.at[index].set(value), tree, values)


# Names of JAX's primitives that a library for linear algebra computes on a CPU.
_FACTORIZATIONS = {"qr", "geqrf", "householder_product", "lu", "cholesky", "eigh", "eig", "svd", "schur"}


def factorizes_batches(function: Callable[..., Any], *arguments: Any) -> bool:
    """Tell whether a program factorises several matrices at once: XLA's CPU pool may be too small for that.

    :mod:`jrl.xla` says why. jrl's own networks are initialised by one factorisation at a time.
    """
    return _has_batch(jax.make_jaxpr(function)(*arguments).jaxpr)


def _has_batch(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [v.aval for v in equation.invars]
        if name in _FACTORIZATIONS and any(getattr(aval, "ndim", 0) > 2 for aval in operands):
            return True
        parameters = jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns"))
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in parameters]
        if any(_has_batch(one) for one in inner if hasattr(one, "eqns")):
            return True
    return False
