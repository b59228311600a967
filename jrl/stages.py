"""One stage of learning after another: a network is fitted to data, and a run starts from its parameters.

Behaviour cloning before PPO::

    params, losses = stages.fit(key, cloning_loss, network_params, (obs, action), num_steps=500, batch_size=64)
    state = stages.warm_start(algo.init(key, hparams), params)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import ops
from jrl.networks import distribution, mask_aware
from jrl.optim import adam
from jrl.types import (
    ActionSpace,
    Array,
    Discrete,
    Key,
    MaskedObservation,
    Network,
    Params,
    PyTree,
)


def warm_start(state: Any, params: Params) -> Any:
    """Return a state that acts and learns from ``params`` on; target networks start there too, as does the reference
    that a policy of texts is kept near.

    Everything else stays: take a state fresh from ``init``, whose optimiser knows nothing yet. The parameters are
    copied, so that the state can be donated.

    Args:
        state: of any algorithm with ``params``.
        params: the same pytree with arrays of the same shapes and dtypes; or, where these are named parts
            (``actor`` and ``critic``), a dictionary of some of them.

    Raises:
        ValueError: another structure, shape or dtype, named with its place.
    """
    own = state.params
    if isinstance(own, dict) and isinstance(params, dict) and set(params) < set(own):
        params = own | params
    _check_equal_specs(own, params)
    changes = {"params": _copy(params)}
    if hasattr(state, "target_params"):
        changes["target_params"] = _copy(params)
    if hasattr(state, "target_critic"):
        changes["target_critic"] = _copy(params["critic"])
    if jax.tree.leaves(getattr(state, "reference", ())):  # () where nothing is kept near it
        changes["reference"] = _copy(params)
    return dataclasses.replace(state, **changes)


def fit(
    key: Key,
    loss: Callable[[Params, PyTree], Array],
    params: Params,
    data: PyTree,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: Array | float = 1e-3,
    max_grad_norm: Array | float = 1e4,
) -> tuple[Params, Array]:
    """Minimise a loss over a data set by Adam, on batches drawn with replacement. Pure: jit and vmap as you like.

    Args:
        key: consumed.
        loss: ``(params, batch) -> scalar``, such as :func:`cloning_loss` or :func:`distillation_loss` give.
        params: where to start.
        data: leaves ``[M, ...]``, M ≥ 1.
        num_steps: gradient steps, static, at least 1.
        batch_size: rows of each, static, at least 1.
        learning_rate: Adam's step size, annealed linearly to 0.
        max_grad_norm: gradients are clipped to this global norm.

    Returns:
        The parameters, and the loss at every step, ``[num_steps]``.

    Raises:
        ValueError: ``data`` is empty or its leaves differ in length; ``num_steps`` or ``batch_size`` is no integer
            of at least 1.
    """
    for name, size in (("num_steps", num_steps), ("batch_size", batch_size)):
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"fit({name}={size!r}): must be an integer of at least 1.")
    rows = _num_rows(data)

    def step(carry: tuple[Params, PyTree], now: tuple[Key, Array]) -> tuple[tuple[Params, PyTree], Array]:
        params, opt_state = carry
        batch_key, remaining = now
        index = jax.random.randint(batch_key, (batch_size,), 0, rows)
        value, grads = jax.value_and_grad(loss)(params, jax.tree.map(lambda leaf: leaf[index], data))
        optimizer = adam(learning_rate * remaining, max_grad_norm=max_grad_norm)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), value

    start = (params, adam(learning_rate, max_grad_norm=max_grad_norm).init(params))
    remaining = 1.0 - jnp.arange(num_steps, dtype=jnp.float32) / num_steps
    (params, _), losses = jax.lax.scan(step, start, (jax.random.split(key, num_steps), remaining))
    return params, losses


def cloning_loss(network: Network, action: ActionSpace) -> Callable[[Params, PyTree], Array]:
    """Return the loss of behaviour cloning, ``−mean log π(a|s)`` over a batch ``(obs, action)``.

    Source: Pomerleau 1991, "Efficient Training of Artificial Neural Networks for Autonomous Navigation",
    https://doi.org/10.1162/neco.1991.3.1.88.

    Args:
        network: ``obs ↦ (policy head, value)`` without memory, as PPO's. Of a
            :class:`~jrl.types.MaskedObservation` it sees the observation, and π leaves out what the mask forbids.
        action: the space that the head is for. Of actions that are not in it, where there are finitely many, the loss
            is nan.
    """
    policy = distribution(action)
    count = action.n if isinstance(action, Discrete) else getattr(action, "ns", None)
    network = mask_aware(network, lambda output, mask: (ops.masked(output[0], mask), *output[1:]))

    def loss(params: Params, batch: PyTree) -> Array:
        obs, action = batch
        (head, _), _ = network.apply(params, obs, ())
        log_prob = policy(head).log_prob(action)
        if count is not None:
            inside = ((action >= 0) & (action < jnp.asarray(count))).reshape(*log_prob.shape, -1).all(-1)
            log_prob = jnp.where(inside, log_prob, jnp.nan)  # log_prob takes it for the likeliest one
        return -log_prob.mean()

    return loss


def distillation_loss(network: Network, temperature: float = 0.01) -> Callable[[Params, PyTree], Array]:
    """Return the loss of distilling action values, ``mean KL(softmax(q/τ) ‖ softmax(student))``.

    Over a batch ``(obs, q [N, A])`` of a teacher's values; the student gives logits, whose greedy action is its own.

    Source: Rusu et al. 2016, "Policy Distillation", https://arxiv.org/abs/1511.06295, equation 3.

    Args:
        network: the student, ``obs ↦ [..., A]``, without memory. Of a :class:`~jrl.types.MaskedObservation` it sees the
            observation, and both distributions leave out what the mask forbids.
        temperature: τ, in units of the values; small, as values of actions differ little.
    """
    network = mask_aware(network, ops.masked)

    def loss(params: Params, batch: PyTree) -> Array:
        obs, q = batch
        student, _ = network.apply(params, obs, ())
        teacher = q / temperature
        if isinstance(obs, MaskedObservation):
            teacher = ops.masked(teacher, obs.action_mask)
        return ops.Categorical(teacher).kl(ops.Categorical(student)).mean()

    return loss


def _num_rows(data: PyTree) -> int:
    shapes = {
        jax.tree_util.keystr(p): jnp.shape(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(data)
    }
    lengths = {shape[:1] for shape in shapes.values()}
    # JAX clamps an index past the end: rows that do not belong together would be learned without a word.
    if len(lengths) != 1 or lengths & {(), (0,)}:
        found = ", ".join(f"data{path} {list(shape)}" for path, shape in shapes.items())
        raise ValueError(
            f"fit(data) with leaves of shapes {found or '(none)'}: all need one leading axis of the same length, at "
            "least 1; give each row of one leaf its row of every other."
        )
    return int(lengths.pop()[0])


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _check_equal_specs(own: PyTree, other: PyTree) -> None:
    specs, others = (
        {jax.tree_util.keystr(path): (jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (own, other))
    )
    for path in [*specs, *others]:
        if specs.get(path) != others.get(path):
            here, there = (
                f"{table[path][1]}{list(table[path][0])}" if path in table else "missing"
                for table in (specs, others)
            )
            raise ValueError(
                f"warm_start(params): params{path} is {there}, where the algorithm has {here}: the networks must be "
                "built alike; give both the same network or the same sizes in Config."
            )
