"""Memories of a policy: a gated recurrent unit, and attention over a window of the past.

Each *core* is a module that maps features and a memory to features and the next memory, in two forms that agree:
``core(x, memory)`` for one step of acting, ``core.sequence(x, memory, reset)`` for the loss over a stored sequence.
:func:`recurrent_network` puts a torso before and a head behind it. Shapes: ``T`` steps, ``...`` any batch axes,
``F`` features in, ``H`` features out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jrl.networks.mlp import Dense, batch_first, features_first, orthogonal, prefers_features_first
from jrl.ops.keys import hashed
from jrl.rollout import reset_memory
from jrl.types import Array, Memory, Network, PyTree


class GRU(nn.Module):
    """A gated recurrent unit; its memory is its output, float32 ``[..., H]``, zero at the start of an episode.

    ``r = σ(W_r x + U_r h)``, ``z = σ(W_z x + U_z h)``, ``n = tanh(W_n x + r ⊙ U_n h)``, ``h' = (1 − z) ⊙ n + z ⊙ h``,
    with a bias on each product.

    Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder",
    https://arxiv.org/abs/1406.1078; ``r`` after the product with ``U_n``, as cuDNN has it.
    """

    size: int

    def setup(self) -> None:
        """Declare the parameters, which both forms use."""
        self.inputs = Dense(3 * self.size, 1.0)
        self.recurrent = self.param("recurrent", self._orthogonal_gates)
        self.bias = self.param("bias", nn.initializers.zeros_init(), (3 * self.size,), jnp.float32)

    def init_memory(self, batch_shape: tuple[int, ...]) -> Array:
        """Return the memory at the start of an episode, ``[*batch_shape, H]``."""
        return jnp.zeros((*batch_shape, self.size), jnp.float32)

    def __call__(self, x: Array, memory: Array) -> tuple[Array, Array]:
        """Return the output ``[..., H]`` and the memory after one step with ``x [..., F]``."""
        memory, _ = _gru_cell(self.recurrent, self.bias, self.inputs(x), memory)
        return memory, memory

    def sequence(self, x: Array, memory: Array, reset: Array) -> tuple[Array, Array]:
        """Return the outputs ``[T, ..., H]`` and the last memory; differentiable in reverse mode only."""
        outputs = gru_sequence(self.recurrent, self.bias, self.inputs(x), memory, reset)
        return outputs, outputs[-1]

    def _orthogonal_gates(self, key: jax.Array) -> Array:
        square = (self.size, self.size)
        return jnp.concatenate([orthogonal(1.0)(key, square) for key in jax.random.split(key, 3)], axis=1)


def _gru_cell(recurrent: Array, bias: Array, inputs: Array, memory: Array) -> tuple[Array, tuple[Array, ...]]:
    """Return the memory after a step, of the input's products ``[..., 3H]``, and what its derivative needs."""
    size = memory.shape[-1]
    products = memory @ recurrent + bias
    gates = jax.nn.sigmoid(inputs[..., : 2 * size] + products[..., : 2 * size])
    r, z, u = gates[..., :size], gates[..., size:], products[..., 2 * size :]
    n = jnp.tanh(inputs[..., 2 * size :] + r * u)
    return n + z * (memory - n), (memory, r, z, n, u)


@jax.custom_vjp
def gru_sequence(recurrent: Array, bias: Array, inputs: Array, memory: Array, reset: Array) -> Array:
    """Return the memories ``[T, ..., H]`` after each step, of the products ``[T, ..., 3H]`` of all inputs.

    Its derivative by the recurrent weights is one product after the loop over time, not a sum within it: half the
    time of a gradient.
    """
    return _gru_forward(recurrent, bias, inputs, memory, reset)[0]


def _gru_forward(
    recurrent: Array, bias: Array, inputs: Array, memory: Array, reset: Array
) -> tuple[Array, tuple]:
    def step(memory: Array, now: tuple[Array, Array]) -> tuple[Array, tuple]:
        inputs, reset = now
        memory, saved = _gru_cell(recurrent, bias, inputs, jnp.where(reset[..., None], 0.0, memory))
        return memory, (memory, saved)

    _, (outputs, saved) = jax.lax.scan(step, memory, (inputs, reset))
    return outputs, (recurrent, saved, reset)


def _gru_backward(residuals: tuple, grad: Array) -> tuple[Array, Array, Array, Array, None]:
    recurrent, saved, reset = residuals
    transposed = jax.lax.optimization_barrier(recurrent.T)  # once, not at every step

    def step(grad: Array, now: tuple) -> tuple[Array, tuple[Array, Array]]:
        from_output, (memory, r, z, n, u), reset = now
        grad = grad + from_output
        grad_n = grad * (1.0 - z) * (1.0 - n * n)
        grad_z = grad * (memory - n) * z * (1.0 - z)
        grad_r = grad_n * u * r * (1.0 - r)
        products = jnp.concatenate([grad_r, grad_z, grad_n * r], axis=-1)
        grad = grad * z + products @ transposed
        return jnp.where(reset[..., None], 0.0, grad), (products, grad_n)

    start = jnp.zeros_like(grad[0])
    grad_memory, (products, grad_n) = jax.lax.scan(step, start, (grad, saved, reset), reverse=True)
    rows, memories = products.reshape(-1, products.shape[-1]), saved[0].reshape(-1, recurrent.shape[0])
    inputs = jnp.concatenate([products[..., : -recurrent.shape[0]], grad_n], axis=-1)
    return memories.T @ rows, rows.sum(0), inputs, grad_memory, None


gru_sequence.defvjp(_gru_forward, _gru_backward)


class WindowTransformer(nn.Module):
    """Causal attention over the last ``window`` steps of the episode and the present one, in small pre-norm layers.

    In each layer, with ``u`` the normalised inputs of the layer now and at the steps in reach:
    ``x ← x + W_o Σ_k softmax_k(q(u) · k(u_k) / √d + b_{t−k}) v(u_k)``, ``x ← x + W_2 relu(W_1 norm(x))``; ``b`` is a
    learned bias for each distance. The memory holds each layer's inputs at the last steps, so that layer upon layer
    sees further back, as in Transformer-XL (Dai et al. 2019, https://arxiv.org/abs/1901.02860). The norm stands
    before each sublayer, without which such networks are hard to train by reinforcement (Parisotto et al. 2019,
    https://arxiv.org/abs/1910.06764); their gates are left out.
    """

    size: int
    window: int = 16
    num_layers: int = 1
    num_heads: int = 2

    def init_memory(self, batch_shape: tuple[int, ...]) -> dict[str, Array]:
        """Return ``inputs [*batch_shape, L, W, H]`` of each layer, and how many of the ``W``, ``count``, are in use."""
        inputs = jnp.zeros((*batch_shape, self.num_layers, self.window, self.size), jnp.float32)
        return {"inputs": inputs, "count": jnp.zeros(batch_shape, jnp.int32)}

    def __call__(self, x: Array, memory: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the output ``[..., H]`` and the memory after one step with ``x [..., F]``."""
        outputs, memory = self.sequence(x[None], memory, jnp.zeros((1, *x.shape[:-1]), bool))
        return outputs[0], memory

    @nn.compact
    def sequence(self, x: Array, memory: dict[str, Array], reset: Array) -> tuple[Array, dict[str, Array]]:
        """Return the outputs ``[T, ..., H]`` and the last memory."""
        if self.size % self.num_heads:
            raise ValueError(
                f"size={self.size} cannot be split over num_heads={self.num_heads}: use a multiple."
            )
        length, window = x.shape[0], self.window
        x = Dense(self.size, 1.0)(jnp.moveaxis(x, 0, -2))  # [..., T, H]
        # The steps in reach, W remembered ones and then the T of the sequence, by the episode they belong to.
        episode = jnp.cumsum(jnp.moveaxis(reset, 0, -1), axis=-1)
        remembered = jnp.where(jnp.arange(window) >= window - memory["count"][..., None], 0, -1)
        episodes = jnp.concatenate([remembered, episode], axis=-1)
        distance = window + jnp.arange(length)[:, None] - jnp.arange(window + length)
        visible = (distance >= 0) & (distance <= window) & (episodes[..., None, :] == episode[..., None])
        last = episodes[..., -window:] == episodes[..., -1:]
        layers = []
        for layer in range(self.num_layers):
            inputs = jnp.concatenate([memory["inputs"][..., layer, :, :], x], axis=-2)
            layers.append(jnp.where(last[..., None], inputs[..., -window:, :], 0.0))
            x = x + _Attention(self.size, self.num_heads)(nn.LayerNorm()(inputs), distance, visible)
            wide = jax.nn.relu(Dense(2 * self.size, np.sqrt(2.0))(nn.LayerNorm()(x)))
            x = x + Dense(self.size, 1.0)(wide)
        memory = {"inputs": jnp.stack(layers, axis=-3), "count": last.sum(-1, dtype=jnp.int32)}
        return jnp.moveaxis(nn.LayerNorm()(x), -2, 0), memory


class _Attention(nn.Module):
    """Attention of the last ``T`` rows of ``x [..., K, H]`` to all that is ``visible [..., T, K]``."""

    size: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Array, distance: Array, visible: Array) -> Array:
        def heads(x: Array) -> Array:
            x = Dense(self.size, 1.0)(x)
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        length, context = distance.shape
        queries, keys, values = heads(x[..., context - length :, :]), heads(x), heads(x)
        bias_shape = (self.num_heads, context - length + 1)
        bias = self.param("distance", nn.initializers.normal(0.02), bias_shape, jnp.float32)
        scores = jnp.einsum("...thd,...khd->...htk", queries, keys) / math.sqrt(queries.shape[-1])
        scores = scores + bias[:, jnp.clip(distance, 0, context - length)]
        weights = jax.nn.softmax(jnp.where(visible[..., None, :, :], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("...htk,...khd->...thd", weights, values)
        return Dense(self.size, 1.0)(out.reshape(*out.shape[:-2], self.size))


class Recurrent(nn.Module):
    """``head(core(torso(x), memory))``, for one step or over a sequence."""

    torso: nn.Module
    core: nn.Module
    head: nn.Module

    def __call__(self, x: Array, memory: Memory) -> tuple[PyTree, Memory]:
        """Return the head's output and the memory after one step."""
        features, memory = self.core(self.torso(x), memory)
        return self.head(features), memory

    def sequence(self, x: Array, memory: Memory, reset: Array, *, fast: bool) -> tuple[PyTree, Memory]:
        """Return the head's outputs ``[T, ...]`` and the last memory; ``fast``: torso and head features first."""
        if not fast:
            features, memory = self.core.sequence(self.torso(x), memory, reset)
            return self.head(features), memory
        batch = reset.shape
        features = batch_first(self.torso(features_first(x, len(batch)), features_first=True))
        features, memory = self.core.sequence(features.reshape(*batch, -1), memory, reset)
        output = self.head(features_first(features, len(batch)), features_first=True)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), output), memory


def recurrent_network(
    torso: nn.Module,
    core: Any,
    head: nn.Module,
    prepare: Callable[[PyTree], Array] = lambda obs: obs,
    *,
    features_first: bool = False,
) -> Network:
    """Return ``obs ↦ head(core(torso(prepare(obs)), memory))`` as a Network with a memory.

    Args:
        torso: ``x [..., *shape] ↦ features [..., F]``.
        core: :class:`GRU`, :class:`WindowTransformer`, or another module of their two forms with an ``init_memory``.
        head: ``features [..., H] ↦ output``.
        prepare: ``obs ↦ x``, any leading axes.
        features_first: torso and head have this option, which is to be used for long sequences on a CPU.
    """
    module = Recurrent(torso, core, head)

    def sequence(params: PyTree, obs: PyTree, memory: Memory, reset: Array) -> tuple[PyTree, Memory]:
        fast = features_first and prefers_features_first(reset.shape)
        return module.apply(params, prepare(obs), memory, reset, fast=fast, method="sequence")

    return Network(
        init=lambda key, obs, memory: module.init(hashed(key), prepare(obs), memory),
        apply=lambda params, obs, memory: module.apply(params, prepare(obs), memory),
        init_memory=core.init_memory,
        sequence=sequence,
    )


def apply_sequence(
    network: Network, params: PyTree, obs: PyTree, memory: Memory, reset: Array
) -> tuple[PyTree, Memory]:
    """Apply a network to a stored sequence, as it was applied step by step while acting.

    ``memory_t ← init_memory where reset_t``, ``output_t, memory_{t+1} = network.apply(params, obs_t, memory_t)``.

    Args:
        network: one with a ``sequence`` of its own computes it at once, another is scanned; without a memory it is
            simply applied.
        params: its parameters.
        obs: leaves ``[T, B, ...]``.
        memory: what the network remembered before the first step, leaves ``[B, ...]``.
        reset: bool ``[T, B]``, whether an episode ended just before the step: :func:`reset_before` of the flags.

    Returns:
        The outputs, leaves ``[T, B, ...]``, and the memory after the last step.
    """
    if network.sequence is not None:
        return network.sequence(params, obs, memory, reset)
    if not jax.tree.leaves(memory):
        return network.apply(params, obs, memory)

    def step(memory: Memory, now: tuple[PyTree, Array]) -> tuple[Memory, PyTree]:
        obs, reset = now
        output, memory = network.apply(params, obs, reset_memory(network, memory, reset))
        return memory, output

    memory, outputs = jax.lax.scan(step, memory, (obs, reset))
    return outputs, memory


def reset_before(ended: Array) -> Array:
    """Return whether an episode ended just before each step: ``ended [T, ...]`` one step later, False first.

    The memory that a rollout carries into its first step has been reset already.
    """
    return jnp.concatenate([jnp.zeros_like(ended[:1]), ended[:-1]])


def memory_core(config: Any) -> nn.Module | None:
    """Return the core that a Config describes; None where its ``memory`` is ``"none"``.

    ``"gru"`` takes its ``memory_size``, ``"transformer"`` also ``memory_window`` and ``memory_layers``.
    """
    match config.memory:
        case "gru":
            return GRU(config.memory_size)
        case "transformer":
            return WindowTransformer(config.memory_size, config.memory_window, config.memory_layers)
    return None
