"""The networks that ``ppo.make`` and ``dqn.make`` build when none is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from jrl.native import build
from jrl.networks import fused, mlp, native
from jrl.networks.adapters import as_float, observation_flattener
from jrl.networks.cnn import CNN
from jrl.networks.heads import Actor, ActorCritic, Ensemble, ImplicitQNetwork, QNetwork
from jrl.networks.mlp import ACTIVATIONS, MLP
from jrl.networks.recurrent import recurrent_network
from jrl.ops.keys import hashed
from jrl.types import Discrete, Environment, MaskedObservation, Network, PyTree

_identity = functools.partial(MLP, ())  # the torso of a head that is given features


class TorsoConfig(Protocol):
    """The fields of a Config that describe a torso."""

    @property
    def torso(self) -> str:
        """``"mlp"``, ``"cnn"``, or ``"auto"``: cnn for one observation array of rank 3, else mlp."""

    @property
    def hidden_sizes(self) -> Sequence[int]:
        """Widths of the fully connected layers."""

    @property
    def channels(self) -> Sequence[int]:
        """Channels of the convolutions."""

    @property
    def activation(self) -> str:
        """A name in :data:`jrl.networks.ACTIVATIONS`."""

    @property
    def layer_norm(self) -> bool:
        """Whether to normalise before each activation."""


def actor_critic(
    env: Environment,
    config: TorsoConfig,
    *,
    shared_torso: bool = False,
    features_first: bool = False,
    fuse: bool = False,
    core: Any = None,
) -> Network:
    """Return the default PPO network of ``env``: ``obs ↦ (policy head, value)``.

    Args:
        env: whose observations and actions it is for.
        config: the torso's description.
        shared_torso: one torso for the policy and the value, instead of one each.
        features_first: compute large batches in the layout that is fastest on a CPU
            (:mod:`jrl.networks.mlp`); then it has no forward-mode derivative (``jax.jvp``).
        fuse: compute an mlp without ``layer_norm`` in one kernel on a GPU (:mod:`jrl.networks.fused`); then it has a
            first derivative only, in reverse mode.
        core: a memory between one torso and both heads, such as :class:`jrl.networks.GRU`.
    """
    torso, prepare, rank = _torso(env, config)
    if core is not None:
        _no_native(config, "a memory")
        return recurrent_network(
            torso(), core, ActorCritic(_identity, env.action, True), prepare, features_first=features_first
        )
    module = ActorCritic(torso, env.action, shared_torso)
    return _network(module, prepare, rank, features_first, _whole(module, config, rank, fuse=fuse))


def q_network(
    env: Environment,
    config: TorsoConfig,
    *,
    dueling: bool = False,
    num_atoms: int | None = None,
    features_first: bool = False,
    core: Any = None,
) -> Network:
    """Return the default DQN network of ``env``: ``obs ↦ Q [..., A]``; arguments as in :func:`actor_critic`.

    With ``num_atoms`` it returns ``[..., A, num_atoms]``.

    Raises:
        TypeError: the actions are not Discrete.
    """
    num_actions = _num_actions(env)
    torso, prepare, rank = _torso(env, config)
    if core is not None:
        _no_native(config, "a memory")
        return recurrent_network(
            torso(),
            core,
            QNetwork(_identity, num_actions, dueling, num_atoms),
            prepare,
            features_first=features_first,
        )
    module = QNetwork(torso, num_actions, dueling, num_atoms)
    return _network(module, prepare, rank, features_first, _whole(module, config, rank))


def implicit_q_network(env: Environment, config: TorsoConfig, *, dueling: bool = False) -> Network:
    """Return an implicit quantile network of ``env``: :class:`~jrl.types.QuantileQuery` ``↦ [..., A, K]``."""
    num_actions = _num_actions(env)
    torso, prepare, _ = _torso(env, config)
    _no_native(config, "an implicit quantile network")
    module = ImplicitQNetwork(torso, num_actions, dueling)
    return Network(
        init=lambda key, query, memory: module.init(hashed(key), prepare(query.obs), query.fraction),
        apply=lambda params, query, memory: (
            module.apply(params, prepare(query.obs), query.fraction),
            memory,
        ),
    )


def actor(
    env: Environment, config: TorsoConfig, *, stochastic: bool = True, features_first: bool = False
) -> Network:
    """Return the policy network of SAC and TD3 on ``env``, an :class:`~jrl.networks.Actor`.

    ``obs ↦ logits [..., A]``, or for a Box ``(mean, log_std)`` before the squashing, ``[..., D]`` both; only the mean
    if not ``stochastic``. Other arguments as in :func:`actor_critic`.
    """
    torso, prepare, rank = _torso(env, config)
    module = Actor(torso, env.action, stochastic)
    return _network(module, prepare, rank, features_first, _whole(module, config, rank))


def critics(env: Environment, config: TorsoConfig, num: int, *, features_first: bool = False) -> Network:
    """Return ``num`` action values: ``obs ↦ Q [..., num, A]``, or for a Box ``(obs, action) ↦ Q [..., num, 1]``.

    Arguments as in :func:`actor_critic`.

    Raises:
        ValueError: a cnn with a Box, whose action it has no place for.
    """
    torso, prepare, rank = _torso(env, config)
    discrete = isinstance(env.action, Discrete)
    if rank != 1 and not discrete:
        raise ValueError(
            f"torso={config.torso!r} on {env.name}: values of continuous actions have no cnn, as the action joins the "
            "observation at the first layer; use torso='mlp'."
        )

    def join(obs_and_action: PyTree) -> jax.Array:
        obs, action = obs_and_action
        return jnp.concatenate([prepare(obs), action], axis=-1)

    num_values = env.action.n if isinstance(env.action, Discrete) else 1
    module = Ensemble(functools.partial(QNetwork, torso, num_values), num)
    whole = _whole(module, config, rank)
    return _network(module, prepare if discrete else join, rank, features_first, whole)


def check_torso(config: TorsoConfig) -> None:
    """Raise ValueError for a torso that no network can have; for ``Config.__post_init__``."""
    if config.torso not in ("auto", "mlp", "cnn"):
        raise ValueError(f"torso={config.torso!r}: must be 'auto', 'mlp' or 'cnn'.")
    build.check(getattr(config, "kernels", "xla"))
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation={config.activation!r}: must be one of {', '.join(ACTIVATIONS)}.")
    for name in ("hidden_sizes", "channels"):
        sizes = getattr(config, name)
        if not isinstance(sizes, Sequence) or not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"{name}={sizes!r}: must be a tuple of integers, as in {name}=(64, 64).")
        object.__setattr__(config, name, tuple(sizes))  # a list would make the Config unhashable
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{name}={sizes}: needs one or more layers, each of at least 1 unit.")


def _num_actions(env: Environment) -> int:
    if not isinstance(env.action, Discrete):
        raise TypeError(
            f"a Q-network on {env.name} with actions {env.action!r}: it has an output for each Discrete action; use "
            "jrl.networks.critics, or wrap the environment in jrl.envs.discretize_actions(env, bins)."
        )
    return env.action.n


def _torso(
    env: Environment, config: TorsoConfig
) -> tuple[Callable[[], nn.Module], Callable[[PyTree], jax.Array], int]:
    """Return the torso, what turns an observation into its input, and that input's rank without batch."""
    observation = env.observation
    if isinstance(observation, MaskedObservation):
        observation = observation.obs
    leaves = jax.tree.leaves(observation)
    is_image = len(leaves) == 1 and len(leaves[0].shape) == 3
    if config.torso == "cnn" and not is_image:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(
            f"torso='cnn' on {env.name}: a CNN needs one observation array [height, width, channels], this "
            f"environment's are {shapes}; use torso='mlp'."
        )
    if config.torso == "cnn" or (config.torso == "auto" and is_image):
        smallest = 2 * len(config.channels) + 1
        if min(leaves[0].shape[:2]) < smallest:
            raise ValueError(
                f"channels={tuple(config.channels)} on images {leaves[0].shape}: each 3×3 convolution takes 2 off "
                f"height and width, so both must be at least {smallest}; use fewer layers or torso='mlp'."
            )
        torso: Callable[[], nn.Module] = functools.partial(
            CNN,
            tuple(config.channels),
            hidden_sizes=tuple(config.hidden_sizes),
            activation=config.activation,
            layer_norm=config.layer_norm,
        )
        return torso, lambda obs: as_float(jax.tree.leaves(obs)[0]), 3
    torso = functools.partial(MLP, tuple(config.hidden_sizes), config.activation, config.layer_norm)
    return torso, observation_flattener(observation), 1


def _whole(
    module: ActorCritic | QNetwork | Actor | Ensemble, config: TorsoConfig, rank: int, *, fuse: bool = False
) -> Callable[[PyTree, jax.Array], PyTree] | None:
    """Return what computes the module from its parameters by one kernel, None where it goes layer by layer."""
    sizes = module.sizes(config.hidden_sizes)
    if rank != 1:
        _no_native(config, "a cnn")
    if getattr(config, "kernels", "xla") == "native":
        native.check(sizes, config.activation)
        return functools.partial(module.whole, mlp=native.mlp, activation=config.activation)
    if fuse and rank == 1 and not config.layer_norm and fused.enabled() and fused.fits(sizes):
        return functools.partial(module.whole, mlp=fused.mlp, activation=config.activation)
    return None


def _no_native(config: TorsoConfig, what: str) -> None:
    if getattr(config, "kernels", "xla") == "native":
        raise ValueError(f"kernels='native' computes mlps only, not {what}; use kernels='xla'.")


def _network(
    module: nn.Module,
    prepare: Callable[[PyTree], jax.Array],
    rank: int,
    features_first: bool,
    whole: Callable[[PyTree, jax.Array], PyTree] | None = None,
) -> Network:
    """Return the pair of functions; ``whole`` computes what the module does, from its parameters."""

    def apply(params: PyTree, obs: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        x = prepare(obs)
        if whole is not None:
            return whole(params, x), memory
        batch = x.shape[: x.ndim - rank]
        if not (features_first and mlp.prefers_features_first(batch)):
            return module.apply(params, x), memory
        out = module.apply(params, mlp.features_first(x, len(batch)), features_first=True)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), out), memory

    return Network(init=lambda key, obs, memory: module.init(hashed(key), prepare(obs)), apply=apply)
