"""Behaviour cloning of texts: what reinforcement learning starts from where guessing finds no reward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrl import ops
from jrl.language.models import Model
from jrl.optim import adam
from jrl.types import Array, Key, Params


class Texts(NamedTuple):
    """``M`` whole texts: ``tokens`` int32 ``[M, L]``, −1 behind their ends; ``prompt_length`` int32 ``[M]``."""

    tokens: Array
    prompt_length: Array


def log_likelihood(
    model: Model, params: Params, texts: Texts, allowed: Array | None = None
) -> tuple[Array, Array]:
    """Return ``log π(a_t | s_t)`` of each generated token, float32 ``[M, T]``, and which there are, bool ``[M, T]``.

    Args:
        model: of the next token.
        params: its parameters.
        texts: what was said.
        allowed: bool ``[M, T, V]``, the tokens that the policy chooses among; None: all.
    """
    logits = model.text(params, texts.tokens, texts.prompt_length).logits[:, :-1]
    if allowed is not None:
        logits = ops.masked(logits, allowed)
    action, said = actions(texts, logits.shape[1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), action[..., None], axis=-1)[..., 0]
    return jnp.where(said, chosen, 0.0), said


def actions(texts: Texts, steps: int) -> tuple[Array, Array]:
    """Return the generated tokens, int32 ``[M, T]`` (0 behind the end), and which there are, bool ``[M, T]``."""
    place = texts.prompt_length[:, None] + jnp.arange(steps)
    inside = place < texts.tokens.shape[1]
    action = jnp.take_along_axis(texts.tokens, jnp.where(inside, place, 0), axis=1)
    said = inside & (action >= 0)
    return jnp.where(said, action, 0), said


def check(texts: Texts, caller: str, which: str = "text {row}") -> None:
    """Raise ValueError unless there are texts, each in one piece with something behind its prompt.

    JAX clamps an index past the end: rows that do not belong together would be learned in silence.

    Args:
        texts: ``tokens [M, L]``, −1 behind the end, and ``prompt_length [M]``.
        caller: for the message.
        which: what the message calls a text, with ``{row}`` for its number.
    """
    tokens, prompt_length = np.asarray(texts.tokens), np.asarray(texts.prompt_length)
    if tokens.ndim != 2 or not len(tokens) or prompt_length.shape != tokens.shape[:1]:
        raise ValueError(
            f"{caller}: tokens {tokens.shape} with prompt_length {prompt_length.shape}: expected [M, L] and [M], M at "
            "least 1."
        )
    length = (tokens >= 0).sum(1)
    for wrong, why in (
        (
            ((tokens >= 0) != (np.arange(tokens.shape[1]) < length[:, None])).any(1),
            "has a -1 between its tokens; -1 is behind the end alone",
        ),
        (length <= prompt_length, "is empty: it has nothing behind its prompt"),
    ):
        if wrong.any():
            raise ValueError(f"{caller}: {which.format(row=int(np.argmax(wrong)))} {why}.")


def fit(
    key: Key,
    model: Model,
    texts: Texts,
    *,
    num_steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    params: Params | None = None,
) -> tuple[Params, Array]:
    """Maximise ``mean_t log π(a_t | s_t)`` over what follows the prompts.

    Args:
        key: consumed.
        model: of the next token.
        texts: what is imitated, drawn with replacement.
        num_steps: gradient steps, static.
        batch_size: texts a step, static.
        learning_rate: of Adam, going linearly to 0.
        params: to start from; None starts anew.

    Returns:
        The parameters, and the loss in nats a token at every step ``[num_steps]``.

    Raises:
        ValueError: as :func:`check`.
    """
    check(texts, "imitation.fit")
    init_key, draw_key = jax.random.split(key)
    params = model.init(init_key) if params is None else params
    texts = Texts(jnp.asarray(texts.tokens), jnp.asarray(texts.prompt_length))
    return _fit(draw_key, model, params, texts, num_steps, batch_size, jnp.float32(learning_rate))


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _fit(
    key: Key,
    model: Model,
    params: Params,
    texts: Texts,
    num_steps: int,
    batch_size: int,
    learning_rate: Array,
) -> tuple[Params, Array]:
    def loss(params: Params, batch: Texts) -> Array:
        log_prob, said = log_likelihood(model, params, batch)
        return -log_prob.sum() / said.sum()

    def step(carry: tuple, x: tuple[Key, Array]) -> tuple[tuple, Array]:
        params, opt_state = carry
        draw_key, i = x
        index = jax.random.randint(draw_key, (batch_size,), 0, len(texts.tokens))
        batch = jax.tree.map(lambda leaf: leaf[index], texts)
        value, grads = jax.value_and_grad(loss)(params, batch)
        rate = learning_rate * (1.0 - i / num_steps)
        updates, opt_state = adam(rate, max_grad_norm=1.0).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    start = (params, adam(0.0, max_grad_norm=1.0).init(params))
    (params, _), losses = jax.lax.scan(step, start, (jax.random.split(key, num_steps), jnp.arange(num_steps)))
    return params, losses
