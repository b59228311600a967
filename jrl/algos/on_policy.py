"""What the actor-critics share before and after learning: a network made fit for an environment, and its policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import networks, ops
from jrl.algos import checks
from jrl.envs import clip_action, vectorize
from jrl.types import Array, Box, Environment, Key, Memory, Network, Policy, PyTree


class Actor(NamedTuple):
    """An environment and the network that is to act in it.

    Attributes:
        envs: the environment, vectorised; a Box action is clipped on its way in, so that the loss keeps the
            action that was drawn.
        network: ``obs ↦ (policy head, value)``, a mask applied to the head.
        distribution: policy head to a distribution over actions.
    """

    envs: Environment
    network: Network
    distribution: Callable[[Any], Any]


def actor(env: Environment, num_envs: int, network: Any, config: Any, **choices: Any) -> Actor:
    """Return ``env`` and a network for it, checked against each other.

    Args:
        env: a single environment.
        num_envs: of which so many are to be stepped side by side.
        network: any ``init``/``apply`` pair, ``obs -> (policy head, value)``. None builds the default one.
        config: describes the torso of that one.
        choices: what else :func:`jrl.networks.actor_critic` takes for it.

    Raises:
        TypeError: ``env`` or ``network`` is not what it should be.
        ValueError: ``env`` is vectorised already, or ``network``'s output does not fit its actions.
    """
    checks.environment(env)
    distribution = networks.distribution(env.action)
    envs = vectorize(env, num_envs)
    if isinstance(env.action, Box):
        envs = clip_action(envs)
    if network is None:
        network = networks.actor_critic(env, config, features_first=True, **choices)
    network = networks.as_network(network)
    networks.check_policy_output(network, env.observation, env.action)
    if isinstance(env.action, Box):
        network = _spread(network)
    network = networks.mask_aware(network, lambda output, mask: (ops.masked(output[0], mask), *output[1:]))
    return Actor(envs, network, distribution)


def _spread(network: Network) -> Network:
    """Return a network whose ``log_std`` has the shape of its mean, where it may be one ``[D]`` for all states.

    Else no batch of it could be reshaped, cut or scanned over.
    """

    def spread(function: Callable[..., Any]) -> Callable[..., Any]:
        def spreading(*arguments: PyTree) -> tuple[PyTree, Memory]:
            ((mean, log_std), value), memory = function(*arguments)
            return ((mean, jnp.broadcast_to(log_std, mean.shape)), value), memory

        return spreading

    sequence = None if network.sequence is None else spread(network.sequence)
    return network._replace(apply=spread(network.apply), sequence=sequence)


def policies(actor: Actor, learns_value: bool = True) -> Callable[..., Policy]:
    """Return ``(params, *, greedy) -> Policy``: the mode of the distribution, or samples from it.

    Its extras are ``{"value": [...]}``, or ``{}`` where nothing fits the values of the network to returns.
    """

    def play(
        greedy: bool, params: PyTree, key: Key, obs: PyTree, memory: Memory
    ) -> tuple[Array, Memory, PyTree]:
        (head, value), memory = actor.network.apply(params, obs, memory)
        distribution = actor.distribution(head)
        action = distribution.mode() if greedy else distribution.sample(key)
        if isinstance(actor.envs.action, Box):
            action = jnp.clip(action, actor.envs.action.low, actor.envs.action.high)
        return action, memory, {"value": value} if learns_value else {}

    # One function each for ever: a policy's function is static, and a new one would recompile.
    play_greedily, play_sampled = (jax.tree_util.Partial(play, greedy) for greedy in (True, False))

    def policy(params: PyTree, *, greedy: bool) -> Policy:
        return Policy(play_greedily if greedy else play_sampled, params, actor.network.init_memory)

    return policy
