"""Noisy networks (Fortunato et al., 2018, https://arxiv.org/abs/1706.10295): exploration by learned noise on weights.

``w = μ + σ ⊙ ε`` with factorised noise ``ε_ij = f(ε_i) f(ε_j)``, ``f(x) = sign(x) sqrt(|x|)``. The noise is put on the
parameters, not into the layers: any network with layers ``{"kernel": [F, K], "bias": [K]}`` becomes noisy, and runs at
its own speed. One draw is shared by the whole batch it is used on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.types import Array, Key, Params, PyTree


class NoisyParams(NamedTuple):
    """Means of all parameters, and the scale of the noise on those of the noisy layers, by the layer's path."""

    mean: Params
    scale: dict[str, dict[str, Array]]


def init(params: Params, scale: Array | float = 0.5) -> NoisyParams:
    """Return ``params`` as the means of noisy layers, with ``σ = scale / sqrt(F)``.

    Every fully connected layer becomes noisy, convolutions (:class:`jrl.networks.PatchConv` among them) do not.
    Deviation: the means keep the initialisation they have.

    Args:
        params: of a network.
        scale: σ₀, may be traced.

    Raises:
        ValueError: no layer has a kernel ``[F, K]`` and a bias ``[K]``.
    """
    layers: dict[str, dict[str, Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layers.setdefault(_layer(path), {})[_name(path)] = leaf
    sigma = {
        layer: jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, scale / jnp.sqrt(leaves["kernel"].shape[0]), leaf.dtype),  # noqa: B023
            leaves,
        )
        for layer, leaves in layers.items()
        if leaves.keys() == {"kernel", "bias"} and leaves["kernel"].ndim == 2 and "PatchConv" not in layer
    }
    if not sigma:
        raise ValueError(
            f"noisy: no layer of the network has a kernel [F, K] and a bias [K], only {sorted(layers)}; use "
            'layers with parameters {"kernel", "bias"}, as flax has them, or noisy=False.'
        )
    return NoisyParams(params, sigma)


def draw(key: Key, params: NoisyParams) -> Params:
    """Return parameters with fresh noise, for the network's own ``apply``."""
    sizes = [size for layer in params.scale.values() for size in layer["kernel"].shape]
    # One draw for all layers: a key and a program each would cost more than the numbers.
    noise = jax.random.normal(key, (sum(sizes),))
    # Behind a barrier: the factors once, not again for every weight that they are fused into.
    noise = jax.lax.optimization_barrier(jnp.sign(noise) * jnp.sqrt(jnp.abs(noise)))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = jnp.split(noise, ends[:-1])
    inputs, outputs = (dict(zip(params.scale, parts[i::2], strict=True)) for i in (0, 1))

    def perturb(path: PyTree, mean: Array) -> Array:
        layer = _layer(path)
        if layer not in params.scale:
            return mean
        noise = outputs[layer]
        if mean.ndim == 2:
            noise = inputs[layer][:, None] * noise[None, :]
        return mean + params.scale[layer][_name(path)] * noise

    return jax.tree_util.tree_map_with_path(perturb, params.mean)


def _layer(path: PyTree) -> str:
    return jax.tree_util.keystr(path[:-1], simple=True, separator="/")


def _name(path: PyTree) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)
