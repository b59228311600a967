"""Fully connected torsos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """``x ↦ act(W_k … act(W_1 x + b_1) …)``: ``[..., F] -> [..., hidden_sizes[-1]]``.

    Orthogonal weights of gain √2 and zero biases, as PPO's reference implementations have it (Andrychowicz et
    al., 2020, https://arxiv.org/abs/2006.05990). ``layer_norm`` normalises before each activation.
    """

    hidden_sizes: Sequence[int]
    activation: str = "tanh"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the features ``[..., hidden_sizes[-1]]`` of ``x [..., F]``."""
        activation = ACTIVATIONS[self.activation]
        for size in self.hidden_sizes:
            x = dense(size, np.sqrt(2.0))(x)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            x = activation(x)
        return x


def dense(size: int, gain: float, name: str | None = None) -> nn.Dense:
    """Return a dense layer with orthogonal weights of the given gain and zero biases."""
    return nn.Dense(size, kernel_init=nn.initializers.orthogonal(gain), name=name)
