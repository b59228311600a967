"""Action-value functions by a network: one value an action, or a distribution over returns an action.

:func:`make` builds the network and says how it is run; what its output means is a :class:`QHead`, a record of four
functions, so that :mod:`jrl.algos.dqn` reads the same for all of them. ``A`` actions, ``K`` atoms or quantiles, ``N``
minibatch. Greedy targets value one action of the successor; soft ones, of Munchausen learning, all of them under the
Boltzmann policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import networks, ops
from jrl.algos import checks
from jrl.native import categorical as native_categorical
from jrl.types import (
    Array,
    Discrete,
    Environment,
    Key,
    MaskedObservation,
    Memory,
    Params,
    PyTree,
    QuantileQuery,
)

DISTRIBUTIONS = ("none", "categorical", "quantile", "implicit")


class QHead(NamedTuple):
    """The meaning of a network's output.

    Attributes:
        mean: ``output -> q [..., A]``.
        target: ``(reward [N], discount [N], next_output, next_q [N, A], online_q [N, A]) -> target`` of the action
            taken. ``next_q`` is the mean of ``next_output``, disallowed actions masked; ``online_q``, unless None, is
            what chooses the next action in its place (Double).
        soft_target: ``(reward, discount, next_output, next_q, temperature) -> target``.
        loss: ``(output, action [N], target) -> (loss [N], error [N])``; priorities follow the error's size.
    """

    mean: Callable[[Any], Array]
    target: Callable[..., Any]
    soft_target: Callable[..., Any]
    loss: Callable[..., tuple[Array, Array]]


class Drawn(NamedTuple):
    """What is random of one evaluation: factors of the noise, and fractions ``[N, K]``; None where there are none.

    Several draws of the noise, ``[D, …]``, are each for as many rows, one after the other; then without fractions.
    """

    noise: Array | None
    fraction: Array | None


class QFunction(NamedTuple):
    """A network as an action-value function.

    Attributes:
        init: ``(key, obs, noise_scale) -> params``.
        draw: ``(key, params, num, batch_shape) -> num draws``: the noise of noisy layers and the fractions that an
            implicit quantile network is asked for, of so many evaluations at once.
        evaluate: ``(params, obs, drawn=None) -> output``. Without a draw there is no noise, and fractions are fixed.
        mean: ``(output, obs, support) -> q [..., A]``, disallowed actions masked.
        values: ``((params, support), obs, memory, drawn=None) -> (q [..., A], memory)``: both in one, in the form of a
            network's ``apply``, for :func:`jrl.algos.exploration.epsilon_greedy`.
        noise: ``(key, (params, support), obs) -> drawn``: the noise with which to act in ``obs``, of
            ``config.noise_draws`` draws.
        head: ``(support, huber_delta=1.0) -> QHead``; the support ``[K]`` is a categorical one's, else ``()``.
    """

    init: Callable[..., Params]
    draw: Callable[..., list[Drawn]]
    evaluate: Callable[..., Any]
    mean: Callable[..., Array]
    values: Callable[..., tuple[Array, Memory]]
    noise: Callable[..., Drawn]
    head: Callable[..., QHead]


def check_distribution(config: Any) -> None:
    """Raise ValueError for a distribution that there is not; for ``Config.__post_init__``."""
    checks.choice(config, "distribution", DISTRIBUTIONS)
    checks.sizes(config, "num_atoms")
    if config.distribution == "categorical" and config.num_atoms < 2:
        raise ValueError(
            f"num_atoms={config.num_atoms} with distribution='categorical': there must be at least 2."
        )


def make(env: Environment, config: Any, network: Any, name: str) -> QFunction:
    """Return the action-value function of ``network``, or of the one that ``config`` describes where it is None.

    Args:
        env: with Discrete actions.
        config: a ``dqn.Config``.
        network: as ``dqn.make`` takes it.
        name: of the algorithm, for messages.

    Raises:
        TypeError: ``network`` is none.
        ValueError: its width is not what the actions need, or it has a memory.
    """
    assert isinstance(env.action, Discrete)
    implicit = config.distribution == "implicit"
    num_atoms = None if config.distribution == "none" else config.num_atoms
    midpoints = ops.quantile_midpoints(config.num_atoms)
    if network is not None:
        network = networks.as_network(network)
    elif implicit:
        network = networks.implicit_q_network(env, config, dueling=config.dueling)
    else:
        network = networks.q_network(
            env, config, dueling=config.dueling, num_atoms=num_atoms, features_first=True
        )
    checks.feed_forward(network, name)
    spec = plain(env.observation)
    networks.check_q_output(
        network, QuantileQuery(spec, midpoints) if implicit else spec, env.action, num_atoms
    )
    rank = len(jax.tree.leaves(spec)[0].shape)

    def batch_shape(obs: PyTree) -> tuple[int, ...]:
        leaf = jax.tree.leaves(obs)[0]
        return leaf.shape[: leaf.ndim - rank]

    def query(obs: PyTree, fraction: Array | None = None) -> QuantileQuery:
        shape = (*batch_shape(obs), config.num_atoms)
        return QuantileQuery(obs, jnp.broadcast_to(midpoints, shape) if fraction is None else fraction)

    def init(key: Key, obs: PyTree, noise_scale: Array | float) -> Params:
        obs = plain(obs)
        params = network.init(key, query(obs) if implicit else obs, ())
        return networks.noisy.init(params, noise_scale) if config.noisy else params

    def draw(key: Key, params: Params, num: int, batch_shape: tuple[int, ...]) -> list[Drawn]:
        noise_key = fraction_key = key
        if config.noisy and implicit:
            noise_key, fraction_key = jax.random.split(key)
        noise = fraction = [None] * num
        if config.noisy:
            noise = list(networks.noisy.draw(noise_key, params, (num,), kernels=config.kernels))
        if implicit:
            fraction = list(
                jax.random.uniform(fraction_key, (num, *batch_shape, config.num_atoms), jnp.float32)
            )
        return [Drawn(*one) for one in zip(noise, fraction, strict=True)]

    def evaluate(params: Params, obs: PyTree, drawn: Drawn | None = None) -> Any:
        noise, fraction = (None, None) if drawn is None else drawn
        if noise is not None and noise.ndim == 2:
            grouped = jax.tree.map(lambda x: x.reshape(noise.shape[0], -1, *x.shape[1:]), obs)
            each = jax.vmap(lambda noise, obs: evaluate(params, obs, Drawn(noise, None)))(noise, grouped)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)
        if config.noisy:
            params = params.mean if noise is None else networks.noisy.perturb(params, noise)
        if implicit:
            asked = query(plain(obs), fraction)
            return Quantiles(network.apply(params, asked, ())[0], asked.fraction)
        output = network.apply(params, plain(obs), ())[0]
        if config.distribution != "quantile":
            return output
        return Quantiles(output, jnp.broadcast_to(midpoints, (*output.shape[:-2], config.num_atoms)))

    def mean(output: Any, obs: PyTree, support: PyTree) -> Array:
        q = head(support).mean(output)
        return ops.masked(q, obs.action_mask) if isinstance(obs, MaskedObservation) else q

    def values(
        acting: PyTree, obs: PyTree, memory: Memory, drawn: Drawn | None = None
    ) -> tuple[Array, Memory]:
        params, support = acting
        return mean(evaluate(params, obs, drawn), obs, support), memory

    def noise(key: Key, acting: PyTree, obs: PyTree) -> Drawn:
        # A policy may be run on another number of environments than it was trained on, or on one without an axis.
        lead = batch_shape(plain(obs))
        num = math.gcd(config.noise_draws, lead[0]) if lead else 1
        drawn = [jnp.asarray(one.noise) for one in draw(key, acting[0], num, ())]
        return Drawn(drawn[0] if num == 1 else jnp.stack(drawn), None)

    def head(support: PyTree, huber_delta: Array | float = 1.0) -> QHead:
        match config.distribution:
            case "none":
                return expected(huber_delta if config.huber else None)
            case "categorical":
                return categorical(support, config.kernels)
        return quantile(huber_delta)

    return QFunction(init, draw, evaluate, mean, values, noise, head)


def plain(obs: PyTree) -> PyTree:
    """Return the observation (or its specification) within a MaskedObservation."""
    return obs.obs if isinstance(obs, MaskedObservation) else obs


class Quantiles(NamedTuple):
    """Quantiles ``[..., A, K]`` at fractions τ ``[..., K]``."""

    value: Array
    fraction: Array


def expected(huber_delta: Array | float | None) -> QHead:
    """Return the head of plain DQN: the output is Q; the Huber loss, or for None half the squared error."""

    def target(
        reward: Array, discount: Array, _: Array, next_q: Array, online_q: Array | None = None
    ) -> Array:
        if online_q is None:
            return ops.q_target(reward, discount, next_q)
        return ops.double_q_target(reward, discount, online_q, next_q)

    def soft_target(
        reward: Array, discount: Array, _: Array, next_q: Array, temperature: Array | float
    ) -> Array:
        return jax.lax.stop_gradient(reward + discount * ops.soft_value(next_q, temperature))

    def loss(q: Array, action: Array, target: Array) -> tuple[Array, Array]:
        td_error = ops.td_error(q, action, target)
        return 0.5 * td_error**2 if huber_delta is None else ops.huber(td_error, huber_delta), td_error

    return QHead(lambda q: q, target, soft_target, loss)


def categorical(support: Array, kernels: str = "xla") -> QHead:
    """Return the head of C51: logits ``[..., A, K]`` of the atoms ``support [K]``; the error is a KL divergence.

    By XLA, or by :mod:`jrl.native.categorical` where ``kernels`` is ``"native"``, but for soft targets.
    """

    def project(reward: Array, discount: Array, shift: Array, probability: Array) -> Array:
        """Return the projection of ``r + discount (z + shift)``, ``shift`` being ``[N]``, or ``[N, A]``."""
        atoms = shift[..., None] + support.reshape((1,) * shift.ndim + support.shape)
        reward, discount = (x.reshape(x.shape + (1,) * (atoms.ndim - 1)) for x in (reward, discount))
        value = jnp.broadcast_to(reward + discount * atoms, probability.shape)
        value, probability = (x.reshape(x.shape[0], -1) for x in (value, probability))
        return jax.lax.stop_gradient(ops.categorical_projection(value, probability, support))

    def target(
        reward: Array, discount: Array, next_logits: Array, next_q: Array, online_q: Array | None = None
    ) -> Array:
        probability = ops.categorical_probability(_select(next_logits, _greedy(next_q, online_q)))
        return project(reward, discount, jnp.zeros_like(reward), probability)

    def soft_target(
        reward: Array, discount: Array, next_logits: Array, next_q: Array, temperature: Array | float
    ) -> Array:
        log_policy = ops.scaled_log_policy(next_q, temperature)
        policy = jnp.exp(log_policy / temperature)
        return project(
            reward, discount, -log_policy, policy[..., None] * ops.categorical_probability(next_logits)
        )

    def loss(logits: Array, action: Array, target: Array) -> tuple[Array, Array]:
        cross_entropy = ops.categorical_cross_entropy(_select(logits, action), target)
        # The entropy of the target moves no parameter, but without it the error would never be small.
        entropy = -jax.scipy.special.xlogy(target, target).T.sum(0)
        return cross_entropy, cross_entropy - entropy

    def native_target(
        reward: Array, discount: Array, next_logits: Array, next_q: Array, online_q: Array | None = None
    ) -> Array:
        q = next_q if online_q is None else online_q
        return native_categorical.target(next_logits, q, reward, discount, support)

    if kernels == "native":
        return QHead(
            lambda logits: native_categorical.mean(logits, support),
            native_target,
            soft_target,
            native_categorical.loss,
        )
    return QHead(lambda logits: ops.categorical_mean(logits, support), target, soft_target, loss)


def quantile(huber_delta: Array | float) -> QHead:
    """Return the head of QR-DQN and IQN: :class:`Quantiles`; the error is that of their mean."""

    def target(
        reward: Array,
        discount: Array,
        next_quantiles: Quantiles,
        next_q: Array,
        online_q: Array | None = None,
    ) -> Array:
        next_value = _select(next_quantiles.value, _greedy(next_q, online_q))
        return jax.lax.stop_gradient(reward[:, None] + discount[:, None] * next_value)

    def soft_target(
        reward: Array,
        discount: Array,
        next_quantiles: Quantiles,
        next_q: Array,
        temperature: Array | float,
    ) -> Array:
        log_policy = ops.scaled_log_policy(next_q, temperature)[..., None]
        next_value = (jnp.exp(log_policy / temperature) * (next_quantiles.value - log_policy)).sum(-2)
        return jax.lax.stop_gradient(reward[:, None] + discount[:, None] * next_value)

    def loss(quantiles: Quantiles, action: Array, target: Array) -> tuple[Array, Array]:
        taken = _select(quantiles.value, action)
        per_sample = ops.quantile_huber_loss(taken, quantiles.fraction, target, huber_delta)
        return per_sample, target.mean(-1) - taken.mean(-1)

    return QHead(lambda quantiles: quantiles.value.mean(-1), target, soft_target, loss)


def _greedy(next_q: Array, online_q: Array | None) -> Array:
    return jnp.argmax(next_q if online_q is None else online_q, axis=-1)


def _select(output: Array, action: Array) -> Array:
    """Return what ``output [N, A, K]`` says of ``action [N]``, ``[N, K]``."""
    # Batch last, as the network has it and the functions of distributions: a sum along the last axis is slow on a CPU.
    # The remainder changes nothing, but is what XLA computes once: else it would unpack the action from the replay, or
    # find it among the values, again for every atom.
    num_actions = output.shape[-2]
    action = jax.lax.rem(action.astype(jnp.int32), jnp.int32(2 * num_actions + 1))
    chosen = jax.nn.one_hot(action, num_actions, dtype=bool, axis=0)[:, None]
    return jnp.sum(jnp.where(chosen, jnp.moveaxis(output, 0, -1), 0), axis=0, dtype=output.dtype).T
