"""Fully connected torsos, in two layouts.

Everything here takes ``[..., features]``. With ``features_first`` it takes ``[features, N]``: the same numbers
to rounding, but on a CPU a training step is up to a third faster, as the long axis is then the contiguous one and
each of a layer's three matrix products has the form that XLA's CPU library is fast at. Parameters are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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


FEATURES_FIRST_BATCH = 128  # below, transposing costs what the products gain


def prefers_features_first(batch: tuple[int, ...]) -> bool:
    """Return whether a batch of this shape is computed faster features first; if wrong, time is all that is lost."""
    return math.prod(batch) >= FEATURES_FIRST_BATCH and jax.default_backend() == "cpu"


def features_first(x: jax.Array, batch_rank: int) -> jax.Array:
    """Return ``[F, ..., N]`` of ``x [*batch, ..., F]`` with so many batch axes, which become one."""
    # Without the barrier XLA would carry the transposition into the layers, and the layout would be lost.
    return jax.lax.optimization_barrier(jnp.swapaxes(x.reshape(-1, *x.shape[batch_rank:]), 0, -1))


def batch_first(x: jax.Array) -> jax.Array:
    """Return ``[N, F]`` of ``x [F, N]``."""
    return jax.lax.optimization_barrier(x.T)


class MLP(nn.Module):
    """``x ↦ act(W_k … act(W_1 x + b_1) …)``: ``[..., F] -> [..., hidden_sizes[-1]]``.

    Orthogonal weights of gain √2 and zero biases, as PPO's reference implementations have it (Andrychowicz et
    al., 2020, https://arxiv.org/abs/2006.05990). ``layer_norm`` normalises before each activation.
    """

    hidden_sizes: Sequence[int]
    activation: str = "tanh"
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False, channels: int = 1) -> jax.Array:
        """Return the features ``[..., hidden_sizes[-1]]`` of ``x [..., F]``; ``channels`` as in :class:`Dense`."""
        activation = ACTIVATIONS[self.activation]
        for size in self.hidden_sizes:
            x = Dense(size, np.sqrt(2.0))(x, features_first=features_first, channels=channels)
            if self.layer_norm:
                axis = 0 if features_first else -1
                x = nn.LayerNorm(reduction_axes=axis, feature_axes=axis)(x)
            x, channels = activation(x), 1
        return x


class Dense(nn.Module):
    """``y = W x + b``, ``[..., F] -> [..., features]``: orthogonal weights of the given gain, zero biases."""

    features: int
    gain: float

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False, channels: int = 1) -> jax.Array:
        """Return ``y``.

        Args:
            x: ``[..., F]``, or ``[F, N]`` with ``features_first``.
            features_first: which of the two.
            channels: with ``features_first``, ``x`` holds images flattened channel by channel, where
                ``[..., F]`` holds them pixel by pixel.
        """
        kernel, bias = _parameters(self, x.shape[0 if features_first else -1])
        if not features_first:
            return x @ kernel + bias
        kernel = kernel.reshape(-1, channels, self.features).swapaxes(0, 1).reshape(kernel.shape)
        return affine(kernel, bias, x)


class DenseParameters(nn.Module):
    """The parameters of a :class:`Dense` of the same name, for what is computed from them together with others."""

    features: int
    gain: float

    @nn.compact
    def __call__(self, size: int) -> tuple[jax.Array, jax.Array]:
        """Return the kernel ``[size, features]`` and the bias ``[features]``."""
        return _parameters(self, size)


def _parameters(module: Dense | DenseParameters, size: int) -> tuple[jax.Array, jax.Array]:
    kernel = module.param("kernel", orthogonal(module.gain), (size, module.features), jnp.float32)
    return kernel, module.param("bias", nn.initializers.zeros_init(), (module.features,), jnp.float32)


def orthogonal(gain: float) -> Callable[..., jax.Array]:
    r"""Return the orthogonal initialiser ``(key, [F, K]) -> W``: ``WᵀW = gain² I``, or ``WWᵀ`` where ``F < K``.

    ``Q`` of the QR factorisation of a Gaussian matrix, its columns' signs those of ``diag R``, which makes it
    uniform over orthogonal matrices (Mezzadri, 2007, https://arxiv.org/abs/math-ph/0609050). The numbers are those of
    ``flax.linen.initializers.orthogonal``, with two differences in how they are computed.

    The Gaussians are drawn as one row: XLA unrolls the random bits of a small matrix, which takes long to compile.
    A batch is computed one by one on a CPU: XLA's QR factorisation of a batch divides itself among the threads of the
    pool that it runs in, and where they are few waits for ever for the one it runs on (jaxlib 0.10). One matrix does
    not.
    """

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        tall = (max(rows, columns), min(rows, columns))
        normal = jax.random.normal(key, (rows * columns,), dtype).reshape(tall)
        q, r = jnp.linalg.qr(normal)
        # The diagonal as a sum: a gather of it is four more kernels to compile.
        q *= jnp.sign((r * jnp.eye(len(r), dtype=dtype)).sum(0))
        return float(gain) * (q if rows >= columns else q.T).reshape(shape)

    if jax.default_backend() != "cpu":
        return initialize

    def one_by_one(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.custom_batching.sequential_vmap(lambda key: initialize(key, shape, dtype))(key)

    return one_by_one


@jax.custom_vjp
def affine(kernel: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    """Return ``Wᵀ x + b``, ``[F, N] -> [K, N]``, for ``W [F, K]``; differentiable in reverse mode only.

    XLA's CPU library is fast where the left operand contracts its last axis and is the larger one: up to ten
    times faster than in the form that differentiating ``x @ W`` gives for few outputs. The barrier keeps XLA
    from folding the transposition back into the product.
    """
    return jax.lax.optimization_barrier(kernel.T) @ x + bias[:, None]


def _affine_forward(kernel: jax.Array, bias: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple]:
    return affine(kernel, bias, x), (kernel, x)


def _affine_backward(residuals: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    kernel, x = residuals
    over_batch = (((1,), (1,)), ((), ()))
    if kernel.shape[0] >= kernel.shape[1]:
        kernel_grad = jax.lax.dot_general(x, grad, over_batch)
    else:
        kernel_grad = jax.lax.optimization_barrier(jax.lax.dot_general(grad, x, over_batch)).T
    return kernel_grad, grad.sum(1), kernel @ grad


affine.defvjp(_affine_forward, _affine_backward)
