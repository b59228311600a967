"""Heads: from features to action distributions, values and action values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jrl.networks import fused, native
from jrl.networks.mlp import Dense, DenseParameters, affine, batch_first
from jrl.ops import distributions, normal
from jrl.types import ActionSpace, Box, Discrete, MultiDiscrete

WholeMLP = Callable[..., jax.Array]
"""``(layers, x [..., F], activation) -> [..., K]``, all layers at once, such as :func:`jrl.networks.native.mlp`.

With layer norm it is given ``norms`` too.
"""


class PolicyHead(nn.Module):
    """The parameters of an action distribution: logits, or (mean, log_std) for a Box.

    Weights of gain 0.01, so that the first policy is nearly uniform. ``log_std`` does not depend on the
    state. For MultiDiscrete the logits of all choices lie side by side.
    """

    action: ActionSpace

    @nn.compact
    def __call__(self, features: jax.Array, *, features_first: bool = False) -> Any:
        """Return logits ``[..., A]``, or ``(mean [..., A], log_std [..., A])``."""

        def linear(size: int) -> jax.Array:
            return _batch_first(Dense(size, 0.01)(features, features_first=features_first), features_first)

        output = linear(_policy_outputs(self.action))
        if not isinstance(self.action, Box):
            return output
        log_std = self.param("log_std", nn.initializers.zeros_init(), output.shape[-1:], jnp.float32)
        return output, jnp.broadcast_to(log_std, output.shape)


class ActorCritic(nn.Module):
    """``obs ↦ (policy head, value [...])``, with one torso for both or one each."""

    torso: Callable[[], nn.Module]
    action: ActionSpace
    shared_torso: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False) -> tuple[Any, jax.Array]:
        """Return the distribution's parameters and the value ``[...]``; features first or not, as ``x`` is."""
        actor_features = self.torso()(x, features_first=features_first)
        critic_features = actor_features
        if not self.shared_torso:
            critic_features = self.torso()(x, features_first=features_first)
        value = Dense(1, 1.0)(critic_features, features_first=features_first)
        head = PolicyHead(self.action)(actor_features, features_first=features_first)
        return head, _batch_first(value, features_first)[..., 0]

    def sizes(self, hidden_sizes: Sequence[int]) -> list[int]:
        """Return the layers' outputs, the larger of two torsos' where there are two."""
        return [*hidden_sizes, _policy_outputs(self.action) + self.shared_torso]

    def whole(self, params: Any, x: jax.Array, *, mlp: WholeMLP, activation: str) -> tuple[Any, jax.Array]:
        """Return what calling it does, ``x [..., F]``, of torsos that are an :class:`MLP`: a call of ``mlp`` each."""
        own = params["params"]
        value, head = fused.Layer(**own["Dense_0"]), fused.Layer(**own["PolicyHead_0"]["Dense_0"])
        if self.shared_torso:
            both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), head, value)
            out = _through(mlp, own["MLP_0"], both, x, activation)
            output, v = out[..., :-1], out[..., -1]
        else:
            output = _through(mlp, own["MLP_0"], head, x, activation)
            v = _through(mlp, own["MLP_1"], value, x, activation)[..., 0]
        if isinstance(self.action, Box):
            return (output, jnp.broadcast_to(own["PolicyHead_0"]["log_std"], output.shape)), v
        return output, v


class QNetwork(nn.Module):
    """``obs ↦ Q [..., A]``; dueling: ``Q = V + A − mean_a A`` (Wang et al., 2016, arXiv:1511.06581).

    With ``num_atoms`` a vector for each action, ``[..., A, num_atoms]``: what a distribution is made of.
    """

    torso: Callable[[], nn.Module]
    num_actions: int
    dueling: bool = False
    num_atoms: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False) -> jax.Array:
        """Return the action values ``[..., A]``; features first or not, as ``x`` is."""
        features = self.torso()(x, features_first=features_first)
        shape = self._shape
        fan_in = features.shape[0 if features_first else -1]
        kernel, bias = DenseParameters(math.prod(shape), 1.0, name="Dense_0")(fan_in)
        if self.dueling:
            value = DenseParameters(math.prod(shape[1:]), 1.0, name="Dense_1")(fan_in)
            kernel, bias = _dueling((kernel, bias), value, self.num_actions)
        if not features_first:
            q = features @ kernel + bias
            return q.reshape(*q.shape[:-1], *shape)
        q = affine(kernel, bias, features)
        if self.num_atoms is None:
            return batch_first(q)
        # No barrier: what reads a distribution wants the batch last, and XLA cancels the two transpositions.
        return jnp.moveaxis(q.reshape(*shape, -1), -1, 0)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_actions,) if self.num_atoms is None else (self.num_actions, self.num_atoms)

    def sizes(self, hidden_sizes: Sequence[int]) -> list[int]:
        """Return the layers' outputs."""
        return [*hidden_sizes, math.prod(self._shape)]

    def whole(self, params: Any, x: jax.Array, *, mlp: WholeMLP, activation: str) -> jax.Array:
        """Return what calling it does, ``x [..., F]``, of a torso that is an :class:`MLP`, by one call of ``mlp``."""
        own = params["params"]
        head = fused.Layer(**own["Dense_0"])
        if self.dueling:
            head = fused.Layer(*_dueling(head, fused.Layer(**own["Dense_1"]), self.num_actions))
        q = _through(mlp, own["MLP_0"], head, x, activation)
        return q.reshape(*q.shape[:-1], *self._shape)


def _through(mlp: WholeMLP, torso: Any, head: fused.Layer, x: jax.Array, activation: str) -> jax.Array:
    """Return the output of an :class:`MLP` of these parameters with a head on it, by one call of ``mlp``."""
    depth = sum(name.startswith("Dense") for name in torso)
    layers = [*(fused.Layer(**torso[f"Dense_{i}"]) for i in range(depth)), head]
    norms = [native.Norm(**torso[f"LayerNorm_{i}"]) for i in range(len(torso) - depth)]
    return mlp(layers, x, activation, norms=norms) if norms else mlp(layers, x, activation)


def _dueling(
    advantage: Sequence[jax.Array], value: Sequence[jax.Array], num_actions: int
) -> tuple[jax.Array, ...]:
    """Return kernel and bias of ``V + A − mean_a A``, of those of ``advantage [..., A K]`` and ``value [..., K]``.

    Both heads are linear in the same features, so what is done to their outputs can be done to their weights: one
    product instead of two, and sums over the weights instead of over the batch. An action at a time, as XLA finds its
    way in an array ``[..., A, K]`` by a division for every entry.
    """

    def combined(advantage: jax.Array, value: jax.Array) -> jax.Array:
        actions = jnp.split(advantage, num_actions, axis=-1)
        base = value - sum(actions) / num_actions
        return jnp.concatenate([action + base for action in actions], axis=-1)

    return tuple(combined(a, v) for a, v in zip(advantage, value, strict=True))


class ImplicitQNetwork(nn.Module):
    """``obs, τ ↦ Z_τ [..., A, K]``: implicit quantile networks (Dabney et al., 2018, arXiv:1806.06923).

    ``Z_τ = f(ψ(obs) ⊙ φ(τ))`` with ``φ(τ) = relu(W cos(π i τ) + b)``, ``i = 0 … num_cosines − 1``; ψ is the torso, and
    f one hidden layer as wide as its features, then the heads of :class:`QNetwork`.
    """

    torso: Callable[[], nn.Module]
    num_actions: int
    dueling: bool = False
    num_cosines: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, fraction: jax.Array) -> jax.Array:
        """Return the quantiles ``[..., A, K]`` of ``x`` at ``fraction [..., K]``."""
        features = self.torso()(x)
        cosines = jnp.cos(jnp.pi * fraction[..., None] * jnp.arange(self.num_cosines, dtype=jnp.float32))
        embedded = nn.relu(Dense(features.shape[-1], np.sqrt(2.0))(cosines))
        hidden = nn.relu(Dense(features.shape[-1], np.sqrt(2.0))(features[..., None, :] * embedded))
        quantile = Dense(self.num_actions, 1.0)(hidden)
        if self.dueling:
            quantile = Dense(1, 1.0)(hidden) + quantile - quantile.mean(-1, keepdims=True)
        return jnp.swapaxes(quantile, -1, -2)


class Actor(nn.Module):
    """``obs ↦`` logits ``[..., A]``, or for a Box the normal before the squashing of :class:`~jrl.ops.TanhNormal`.

    Of that one both parameters, ``(mean, log_std)``, are functions of the state; if not ``stochastic`` there is only
    the mean. ``log_std`` is kept within [-5, 2]
    by a tanh, whose gradient does not vanish at once where a clip's would.
    """

    torso: Callable[[], nn.Module]
    action: ActionSpace
    stochastic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False) -> Any:
        """Return the parameters; features first or not, as ``x`` is."""
        features = self.torso()(x, features_first=features_first)

        def linear(size: int) -> jax.Array:
            return Dense(size, 0.01)(features, features_first=features_first)

        if isinstance(self.action, Discrete):
            return _batch_first(linear(self.action.n), features_first)
        assert isinstance(self.action, Box)
        size = _box_size(self.action.shape)
        mean = _batch_first(linear(size), features_first)
        if not self.stochastic:
            return mean
        return mean, _bounded(_batch_first(linear(size), features_first))

    def sizes(self, hidden_sizes: Sequence[int]) -> list[int]:
        """Return the layers' outputs, heads side by side."""
        heads = 1 + (isinstance(self.action, Box) and self.stochastic)
        return [*hidden_sizes, heads * _policy_outputs(self.action)]

    def whole(self, params: Any, x: jax.Array, *, mlp: WholeMLP, activation: str) -> Any:
        """Return what calling it does, ``x [..., F]``, of a torso that is an :class:`MLP`, by one call of ``mlp``."""
        own = params["params"]
        heads = [fused.Layer(**own[name]) for name in ("Dense_0", "Dense_1") if name in own]
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *heads)
        output = _through(mlp, own["MLP_0"], both, x, activation)
        if len(heads) == 1:
            return output
        mean, log_std = jnp.split(output, 2, axis=-1)
        return mean, _bounded(log_std)


class Ensemble(nn.Module):
    """Several copies of a network of action values, each with parameters of its own: ``[..., K, A]``."""

    member: Callable[..., QNetwork]
    num: int

    @nn.compact
    def __call__(self, x: jax.Array, *, features_first: bool = False) -> jax.Array:
        """Return the values of all members; features first or not, as ``x`` is."""
        return jnp.stack([self.member()(x, features_first=features_first) for _ in range(self.num)], axis=-2)

    def sizes(self, hidden_sizes: Sequence[int]) -> list[int]:
        """Return the outputs of a member's layers."""
        return self.member(parent=None).sizes(hidden_sizes)

    def whole(self, params: Any, x: jax.Array, *, mlp: WholeMLP, activation: str) -> jax.Array:
        """Return what calling it does, of members that are a :class:`QNetwork`: a call of ``mlp`` each."""
        own = [{"params": params["params"][f"QNetwork_{i}"]} for i in range(self.num)]
        whole = self.member(parent=None).whole
        return jnp.stack([whole(one, x, mlp=mlp, activation=activation) for one in own], axis=-2)


def distribution(action: ActionSpace) -> Callable[[Any], Any]:
    """Return the function from a policy head's output to a distribution over ``action``.

    Categorical for Discrete, independent categoricals for MultiDiscrete, a diagonal normal for Box (whose
    samples the caller clips to the bounds on their way to the environment).

    Raises:
        TypeError: ``action`` is another space.
    """
    match action:
        case Discrete():
            return distributions.Categorical
        case MultiDiscrete(ns=ns):
            return lambda logits: distributions.MultiCategorical(logits, ns)
        case Box(shape=shape):
            _box_size(shape)
            return lambda head: normal.Normal(*head)
    raise TypeError(f"no distribution for the action space {action!r}")


def _policy_outputs(action: ActionSpace) -> int:
    """Return the width of a policy head's layer."""
    match action:
        case Discrete(n=n):
            return n
        case MultiDiscrete(ns=ns):
            return sum(ns)
        case Box(shape=shape):
            return _box_size(shape)
    raise TypeError(f"no policy head for the action space {action!r}")


def _bounded(log_std: jax.Array) -> jax.Array:
    return -5.0 + 3.5 * (jnp.tanh(log_std) + 1.0)


def _box_size(shape: tuple[int, ...]) -> int:
    if len(shape) != 1:
        raise ValueError(
            f"Box(shape={shape}): policy heads need a vector of actions, shape (n,); flatten the action first."
        )
    return shape[0]


def _batch_first(x: jax.Array, features_first: bool) -> jax.Array:
    return batch_first(x) if features_first else x
