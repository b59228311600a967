"""How algorithms that learn action values explore: an ε that anneals, and policies by whatever gives values.

A policy here is the ``apply`` of a :class:`~jrl.types.Policy`. An observation's mask (of a
:class:`~jrl.types.MaskedObservation`) holds for greedy and for random actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl import ops
from jrl.types import Array, Key, MaskedObservation, Memory, Policy, PyTree

Act = Callable[[PyTree, Key, PyTree, Memory], tuple[Array, Memory, PyTree]]
"""``(acting, key, obs, memory) -> (action, memory, extras)``, as :class:`~jrl.types.Policy` has it."""


def annealed_epsilon(hparams: Any, env_steps: Array) -> Array:
    """Return the ε of ε-greedy at ``env_steps``, ``ε₀ + (ε₁ − ε₀) min(1, env_steps / N)``, float32 ``[]``.

    ``ε₀`` is ``hparams.epsilon_start``, ``ε₁`` ``hparams.epsilon_end`` and ``N`` ``hparams.epsilon_env_steps``; where
    that is 0 it stays at ``ε₀`` (Mnih et al., 2015, https://doi.org/10.1038/nature14236).
    """
    start, end = hparams.epsilon_start, hparams.epsilon_end
    return ops.linear_schedule(env_steps, start=start, end=end, begin=0.0, duration=hparams.epsilon_env_steps)


def epsilon_greedy(
    evaluate: Callable[..., tuple[Array, Memory]], draw: Callable[[Key, PyTree, PyTree], Any] | None = None
) -> Act:
    """Return the policy that is ε-greedy on the values of ``evaluate`` (:func:`jrl.ops.epsilon_greedy`).

    Args:
        evaluate: ``(params, obs, memory) -> (q [..., A], memory)``: the ``apply`` of a network, for one.
        draw: ``(key, params, obs) -> drawn``, what is random of the values themselves, which ``evaluate`` then takes
            as a fourth argument: the noise of noisy layers (Fortunato et al., 2018, arXiv:1706.10295).

    Returns:
        ``((params, ε), key, obs, memory) -> (action [...], memory, {"q": q})``.
    """

    def act(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        params, epsilon = acting
        drawn = []
        if draw is not None:
            draw_key, key = jax.random.split(key)
            drawn = [draw(draw_key, params, obs)]
        q, memory = evaluate(params, obs, memory, *drawn)
        return ops.epsilon_greedy(key, q, epsilon, _mask(obs)), memory, {"q": q}

    return act


def persistent(act: Act) -> Act:
    """Return :func:`epsilon_greedy` with exploratory actions that are held (εz-greedy).

    They are :func:`jrl.ops.persistent_epsilon_greedy`'s (Dabney et al., 2021, arXiv:2006.01782).

    Args:
        act: from :func:`epsilon_greedy`, without a memory; only its values are used, its action is not.

    Returns:
        ``(((params, ε), μ), key, obs, held) -> (action [...], held, extras of act)``: ``held`` is its memory,
        :func:`nothing_held` at the start of an episode.
    """

    def hold(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        acting, exponent = acting
        key, hold_key = jax.random.split(key)
        _, _, extras = act(acting, key, obs, ())
        action, held = ops.persistent_epsilon_greedy(
            hold_key, extras["q"], memory, acting[-1], exponent, _mask(obs)
        )
        return action, held, extras

    return hold


def nothing_held(batch_shape: tuple[int, ...]) -> ops.HeldAction:
    """Return the memory of a :func:`persistent` policy at the start of an episode."""
    # Two arrays: one buffer could not be donated twice.
    return ops.HeldAction(*(jnp.zeros(batch_shape, jnp.int32) for _ in ops.HeldAction._fields))


def actions_of(policy: Policy, init_memory: Callable[[tuple[int, ...]], Memory]) -> Policy:
    """Return a policy that does what ``policy`` does and no more: without extras, leaving its memory as it is.

    It can take the place of another, whose memory begins by ``init_memory``, before that one acts.

    Args:
        policy: one without a memory.
        init_memory: of the policy that is to follow.
    """

    def act(params: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        return policy.apply(params, key, obs, ())[0], memory, ()

    return Policy(act, policy.params, init_memory)


def _mask(obs: PyTree) -> Array | None:
    return obs.action_mask if isinstance(obs, MaskedObservation) else None
