"""Convolutional torsos for image observations ``[..., H, W, C]``."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jrl.networks.mlp import ACTIVATIONS, MLP, Dense


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
    def __call__(self, x: jax.Array, *, features_first: bool = False) -> jax.Array:
        """Return the features ``[..., hidden_sizes[-1]]`` of ``x [..., H, W, C]``.

        With ``features_first`` ``[hidden_sizes[-1], N]`` of ``[C, H, W, N]``.
        """
        activation = ACTIVATIONS[self.activation]
        for channels in self.channels:
            x = activation(PatchConv(channels, self.kernel_size)(x, features_first=features_first))
        x = x.reshape(-1, x.shape[-1]) if features_first else x.reshape(*x.shape[:-3], -1)
        mlp = MLP(self.hidden_sizes, self.activation, self.layer_norm)
        return mlp(x, features_first=features_first, channels=self.channels[-1])


class PatchConv(nn.Module):
    """A convolution written as one matrix product over patches, ``[..., H, W, C] -> [..., H', W', channels]``.

    On small images a CPU's convolution kernels spend more time on set-up than on arithmetic, above all in the
    backward pass; patches made of ``k²`` shifted slices turn both passes into plain matrix products.
    """

    channels: int
    kernel_size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False) -> jax.Array:
        """Return the convolved ``x``; with ``features_first``, ``[channels, H', W', N]`` of ``[C, H, W, N]``."""
        k = self.kernel_size
        if features_first:
            height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
            shifted = [x[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]
            patches = jnp.concatenate(shifted, axis=0)
            out = Dense(self.channels, np.sqrt(2.0))(
                patches.reshape(patches.shape[0], -1), features_first=True
            )
            return out.reshape(self.channels, *patches.shape[1:])
        height, width = x.shape[-3] - k + 1, x.shape[-2] - k + 1
        shifted = [x[..., i : i + height, j : j + width, :] for i in range(k) for j in range(k)]
        return Dense(self.channels, np.sqrt(2.0))(jnp.concatenate(shifted, axis=-1))
