"""Pairs of texts of which one is preferred, and the reward model that explains them (Bradley and Terry, 1952).

``P(y ≻ y') = σ(s(y) − s(y'))``; the model is the value head of a :class:`jrl.language.models.Model` after the last
token (Ouyang et al., 2022, https://arxiv.org/abs/2203.02155).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrl.language import imitation
from jrl.language.models import Model
from jrl.language.rewards import Score, Text
from jrl.optim import adam
from jrl.types import Array, Key, Params


class Pairs(NamedTuple):
    """``M`` pairs after the same prompts.

    Attributes:
        first: int32 ``[M, L]``, −1 behind the end.
        second: int32 ``[M, L]``.
        prompt_length: int32 ``[M]``.
        preference: float32 ``[M]``, the probability that the first is preferred; 1 where it was.
    """

    first: Array
    second: Array
    prompt_length: Array
    preference: Array


def bradley_terry_loss(difference: Array, preference: Array) -> Array:
    """``−mean [p log σ(d) + (1 − p) log σ(−d)]``, a scalar.

    Source: Bradley and Terry 1952, https://doi.org/10.2307/2334029; with probabilities for p as in cDPO.

    Args:
        difference: float32 ``[...]``, of the scores of the first and the second text.
        preference: float32 ``[...]``, of the first.
    """
    chosen, rejected = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    return -(preference * chosen + (1.0 - preference) * rejected).mean()


def values(model: Model, params: Params, tokens: Array) -> Array:
    """Return the model's score of whole texts ``[M, L]``, float32 ``[M]``."""
    return model.prefix(params, tokens).value


def fit(
    key: Key,
    model: Model,
    pairs: Pairs,
    *,
    num_steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
) -> tuple[Params, Array]:
    """Fit a reward model to preferences.

    Args:
        key: consumed.
        model: whose value head is the score.
        pairs: what is explained, drawn with replacement.
        num_steps: gradient steps, static.
        batch_size: pairs a step, static.
        learning_rate: of Adam, going linearly to 0.

    Returns:
        The parameters, and the loss at every step ``[num_steps]``.

    Raises:
        ValueError: as :func:`check`.
    """
    check(pairs)
    return _fit(
        key, model, jax.tree.map(jnp.asarray, pairs), num_steps, batch_size, jnp.float32(learning_rate)
    )


def check(pairs: Pairs) -> None:
    """Raise ValueError unless the pairs are some, hold texts, and are preferred with probabilities."""
    preference = np.asarray(pairs.preference)
    if not len(preference) or not ((preference >= 0) & (preference <= 1)).all():
        raise ValueError(f"pairs: {len(preference)} of them, preferences must be probabilities, 0 to 1.")
    first, second = np.shape(pairs.first), np.shape(pairs.second)
    if first != second or first[:1] != preference.shape:
        raise ValueError(
            f"pairs: first {first}, second {second}, preference {preference.shape}: expected [M, L], [M, L] and [M]."
        )
    for name in ("first", "second"):
        texts = imitation.Texts(getattr(pairs, name), pairs.prompt_length)
        imitation.check(texts, "pairs", f"text {{row}} of {name}")


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _fit(
    key: Key, model: Model, pairs: Pairs, num_steps: int, batch_size: int, learning_rate: Array
) -> tuple[Params, Array]:
    init_key, draw_key = jax.random.split(key)
    params = model.init(init_key)

    def loss(params: Params, batch: Pairs) -> Array:
        difference = values(model, params, batch.first) - values(model, params, batch.second)
        return bradley_terry_loss(difference, batch.preference)

    def step(carry: tuple, x: tuple[Key, Array]) -> tuple[tuple, Array]:
        params, opt_state = carry
        index = jax.random.randint(x[0], (batch_size,), 0, len(pairs.preference))
        value, grads = jax.value_and_grad(loss)(params, jax.tree.map(lambda leaf: leaf[index], pairs))
        rate = learning_rate * (1.0 - x[1] / num_steps)
        updates, opt_state = adam(rate, max_grad_norm=1.0).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    start = (params, adam(0.0, max_grad_norm=1.0).init(params))
    keys = jax.random.split(draw_key, num_steps)
    (params, _), losses = jax.lax.scan(step, start, (keys, jnp.arange(num_steps)))
    return params, losses


def reward(model: Model, params: Params) -> Score:
    """Return the model as a reward of texts, for a :class:`jrl.language.rewards.Scorer` or an environment."""

    def score(text: Text) -> Array:
        return values(model, params, text.tokens[None])[0]

    return score


def judge(log_probs: Callable[[Array], Array], yes: int, no: int) -> Score:
    """Return ``log p(yes | text) − log p(no | text)`` as a reward: what a frozen model answers when shown the text.

    Args:
        log_probs: ``tokens int32 [L] (−1 behind the end) -> float32 [V]``, of the next token.
        yes: the token that approves.
        no: the token that does not.
    """

    def score(text: Text) -> Array:
        answer = log_probs(text.tokens)
        return answer[yes] - answer[no]

    return score
