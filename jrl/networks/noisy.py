"""Noisy networks (Fortunato et al., 2018, https://arxiv.org/abs/1706.10295): exploration by learned noise on weights.

``w = μ + σ ⊙ ε`` with factorised noise ``ε_ij = f(ε_i) f(ε_j)``, ``f(x) = sign(x) sqrt(|x|)``. The noise is put on the
parameters, not into the layers: any network with layers ``{"kernel": [F, K], "bias": [K]}`` becomes noisy, and runs at
its own speed. One draw is shared by the whole batch it is used on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.native import noise, threefry
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


def draw(key: Key, params: NoisyParams, batch_shape: tuple[int, ...] = (), *, kernels: str = "xla") -> Array:
    """Draw the factors ``f(ε)`` of all layers, float32 ``[*batch_shape, F_1 + K_1 + F_2 + …]``, for :func:`perturb`.

    One draw for all layers, and for all the times that a step needs: each costs more than its numbers. By XLA, or with
    ``kernels="native"`` by :mod:`jrl.native.noise`, to rounding the same.
    """
    size = sum(size for layer in params.scale.values() for size in layer["kernel"].shape)
    ours = kernels == "native" and threefry.draws(key)
    return (noise.factors if ours else noise.reference)(key, (*batch_shape, size))


def perturb(params: NoisyParams, noise: Array) -> Params:
    """Return parameters with one draw's noise ``[F_1 + K_1 + …]``, for the network's own ``apply``."""
    sizes = [size for layer in params.scale.values() for size in layer["kernel"].shape]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = jnp.split(noise, ends[:-1])
    inputs, outputs = (dict(zip(params.scale, parts[i::2], strict=True)) for i in (0, 1))

    def moved(path: PyTree, mean: Array) -> Array:
        layer = _layer(path)
        if layer not in params.scale:
            return mean
        noise = outputs[layer]
        if mean.ndim == 2:
            noise = inputs[layer][:, None] * noise[None, :]
        return mean + params.scale[layer][_name(path)] * noise

    return jax.tree_util.tree_map_with_path(moved, params.mean)


def _layer(path: PyTree) -> str:
    return jax.tree_util.keystr(path[:-1], simple=True, separator="/")


def _name(path: PyTree) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)
