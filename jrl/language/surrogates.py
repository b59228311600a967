"""What policy gradients over texts differ in: advantages, surrogate losses, and how a text's tokens are weighed.

Arrays over tokens are ``[N, T]`` (advantages: ``[T, N]``) of ``N`` texts; ``said`` (bool) are those that are part of
the text. The variants and their papers are in :mod:`jrl.language.policy_gradient`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jrl import ops
from jrl.types import Array


class Variant(NamedTuple):
    """What a variant chooses.

    Attributes:
        advantage: ``value``: GAE; ``group``, ``group_std``, ``others``, ``to_go``: see :func:`compare`.
        penalty: whether its paper has the KL penalty in the ``reward`` or in the ``loss``.
        clipped: the clipped ratio, or the log-probability.
        tokens: ``all``: the mean over all tokens of the batch; ``each``: the mean over those of each text, then over
            texts; ``fixed``: their sum over ``T``; ``sum``: their sum.
    """

    advantage: str
    penalty: str
    clipped: bool
    tokens: str


VARIANTS = {
    "ppo": Variant("value", "reward", True, "all"),
    "grpo": Variant("group_std", "loss", True, "each"),
    "dr_grpo": Variant("group", "loss", True, "fixed"),
    "rloo": Variant("others", "reward", False, "sum"),
    "reinforce": Variant("to_go", "reward", False, "sum"),
}


def compare(choice: Variant, reward: Array, last: Array, gamma: Array | float, group_size: int) -> Array:
    """Return the advantage of each token from the returns of the texts beside its own, ``[T, N]``.

    Args:
        choice: ``group``: ``R − mean``; ``group_std``: ``(R − mean) / (std + 1e-4)``, the deviation of the sample;
            ``others``: ``R`` less the mean of the rest of the group; ``to_go``: the return from here on, less the mean
            of it over all other texts.
        reward: float32 ``[T, N]``, groups side by side; 0 behind the end.
        last: bool ``[T, N]``, true once in each text.
        gamma: discount per token.
        group_size: texts after the same prompt.
    """
    to_go = ops.discounted_returns(reward, jnp.zeros_like(reward), last, jnp.zeros_like(last), gamma=gamma)
    if choice.advantage == "to_go":
        return to_go - (to_go.sum(1, keepdims=True) - to_go) / max(to_go.shape[1] - 1, 1)
    group = to_go[0].reshape(-1, group_size)
    relative = group - group.mean(1, keepdims=True)
    if choice.advantage == "others":
        relative *= group_size / (group_size - 1)
    if choice.advantage == "group_std":
        relative /= group.std(1, keepdims=True, ddof=1) + 1e-4
    return jnp.broadcast_to(relative.reshape(-1), reward.shape)


def surrogate_loss(
    choice: Variant,
    log_prob: Array,
    old_log_prob: Array,
    advantage: Array,
    said: Array,
    clip_eps: Array | float,
    clip_eps_high: Array | float,
) -> Array:
    """``−Σ_t min(ρ A, clip(ρ, 1 − ε, 1 + ε') A)``, ``ρ = π / π_old``, or ``−Σ_t A log π``, weighed."""
    if not choice.clipped:
        return -weigh(choice, advantage * log_prob, said)
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps_high)
    return -weigh(choice, jnp.minimum(ratio * advantage, clipped * advantage), said)


def penalty_loss(choice: Variant, log_prob: Array, reference_log_prob: Array, said: Array) -> Array:
    """``Σ_t π_ref/π − log(π_ref/π) − 1`` (Schulman, 2020: k3), weighed as the variant does."""
    against = reference_log_prob - log_prob
    return weigh(choice, jnp.expm1(against) - against, said)


def weigh(choice: Variant, x: Array, said: Array) -> Array:
    """Reduce ``[N, T]`` to a number, in the variant's way of weighing a text's tokens."""
    if choice.tokens == "all":
        return mean(x, said)
    total = jnp.where(said, x, 0.0).sum(1)
    scale: Any = {"each": said.sum(1), "fixed": said.shape[1], "sum": 1}[choice.tokens]
    return (total / scale).mean()


def mean(x: Array, said: Array) -> Array:
    """Return the mean over all tokens that were said."""
    return jnp.where(said, x, 0.0).sum() / said.sum()
