"""Convolutional torsos for image observations ``[..., H, W, C]``."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jrl.networks.mlp import ACTIVATIONS, MLP


class CNN(nn.Module):
    """Convolutions (stride 1, no padding), flattened, then an :class:`~jrl.networks.MLP`.

    The network of MinAtar's authors is one layer of 16 channels, 3×3, and 128 hidden units (Young and Tian,
    2019, https://arxiv.org/abs/1903.03176). Takes any number of leading batch axes.
    """

    channels: Sequence[int] = (16,)
    kernel_size: int = 3
    hidden_sizes: Sequence[int] = (128,)
    activation: str = "relu"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the features ``[..., hidden_sizes[-1]]`` of ``x [..., H, W, C]``."""
        activation = ACTIVATIONS[self.activation]
        for channels in self.channels:
            x = activation(PatchConv(channels, self.kernel_size)(x))
        x = x.reshape(*x.shape[:-3], -1)
        return MLP(self.hidden_sizes, self.activation, self.layer_norm)(x)


class PatchConv(nn.Module):
    """A convolution written as one matrix product over patches, ``[..., H, W, C] -> [..., H', W', channels]``.

    On small images a CPU's convolution kernels spend more time on set-up than on arithmetic, above all in the
    backward pass; patches made of ``k²`` shifted slices turn both passes into plain matrix products.
    """

    channels: int
    kernel_size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the convolved ``x``."""
        k = self.kernel_size
        height, width = x.shape[-3] - k + 1, x.shape[-2] - k + 1
        patches = jnp.concatenate(
            [x[..., i : i + height, j : j + width, :] for i in range(k) for j in range(k)], axis=-1
        )
        kernel_init = nn.initializers.orthogonal(np.sqrt(2.0))
        return nn.Dense(self.channels, kernel_init=kernel_init)(patches)
