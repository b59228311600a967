"""Pretraining and fine-tuning of the decoder by next-token cross-entropy, under the contract of every algorithm.

``loss = − Σ w_t log p(x_t | x_<t) / Σ w_t`` (Bengio et al., 2003, https://www.jmlr.org/papers/v3/bengio03a.html),
with AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101), warm-up and a cosine, as GPT's reference
code has them. What others count as environment steps are tokens here. A corpus is one stream, of which windows are
drawn, or rows with weights: weights of 0 on prompts give prompt-masked fine-tuning.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jrl import ops
from jrl.algos import checks
from jrl.networks import transformer
from jrl.types import Algorithm, Array, Key, Metrics, Params, Policy, PyTree


class Corpus(NamedTuple):
    """Tokens to learn from; a constant of the compiled program.

    Attributes:
        tokens: integers ``[M]``, one stream, or ``[N, L]``, one text a row.
        weight: for rows, bool or float ``[N, L]``: how much each token counts as something to predict; the first of a
            row is predicted from nothing and never counts. ``()`` for a stream.
    """

    tokens: Any
    weight: Any = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices beside the architecture."""

    batch_size: int = 16
    """Texts in each gradient step."""
    sequence_length: int = 0
    """Tokens predicted in each text of a stream; 0 means the whole context, max_length. Rows have their own."""
    updates_per_step: int = 10
    """Gradient steps between two looks at one batch of the validation text."""

    def __post_init__(self) -> None:
        checks.sizes(self, "batch_size", "updates_per_step")
        if self.sequence_length:
            checks.sizes(self, "sequence_length")


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """AdamW's step size, after the warm-up."""
    learning_rate_end: float = 1e-4
    """Step size at the end of annealing."""
    warmup_tokens: float = 0.0
    """Tokens over which the step size rises from 0."""
    anneal_tokens: float = 0.0
    """Tokens, warm-up included, over which the step size falls along a cosine to its end; 0 keeps it constant."""
    weight_decay: float = 0.1
    """Of matrices and embeddings, times the step size, taken off at every step."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.99
    """Decay of its mean of their squares."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``env_steps`` counts tokens."""

    params: Params
    opt_state: PyTree
    env_steps: Array
    key: Key


def make(
    corpus: Corpus,
    model: transformer.Config,
    config: Config | None = None,
    *,
    validation: Corpus | None = None,
    start: Params | None = None,
) -> Algorithm:
    """Return the learner as an :class:`~jrl.types.Algorithm`; one ``step`` is ``updates_per_step`` gradient steps.

    Args:
        corpus: to learn from.
        model: the architecture.
        config: static choices.
        validation: another corpus; then ``validation_loss`` of one random batch of it is among the metrics.
        start: parameters to go on from, for fine-tuning; None initialises them.

    Raises:
        TypeError: ``config`` is of another class.
        ValueError: a token is outside the vocabulary, a stream is shorter than a window, rows exceed the context.
    """
    config = checks.config(config, Config)
    draw, length = batches(corpus, model, config)
    draw_validation = None if validation is None else batches(validation, model, config)[0]

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        params_key, state_key = jax.random.split(key)
        params = transformer.init(params_key, model) if start is None else jax.tree.map(jnp.asarray, start)
        opt_state = optimizer(hparams, jnp.float32(0)).init(params)
        return State(params, opt_state, ops.counter.zero(), state_key)

    def loss(params: Params, tokens: Array, weight: Array) -> Array:
        return cross_entropy(
            transformer.forward(params, model, tokens[:, :-1]).logits, tokens[:, 1:], weight[:, 1:]
        )

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, batch_key, validation_key = jax.random.split(state.key, 3)

        def update(carry: tuple, key: Key) -> tuple[tuple, Metrics]:
            params, opt_state, count = carry
            value, grads = jax.value_and_grad(loss)(params, *draw(key))
            learning_rate = schedule(hparams, count)
            updates, opt_state = optimizer(hparams, learning_rate).update(grads, opt_state, params)
            metrics = {"loss": value, "grad_norm": optax.global_norm(grads), "learning_rate": learning_rate}
            count = ops.counter.add(count, config.batch_size * length)
            return (optax.apply_updates(params, updates), opt_state, count), metrics

        keys = jax.random.split(batch_key, config.updates_per_step)
        carry, metrics = jax.lax.scan(update, (state.params, state.opt_state, state.env_steps), keys)
        metrics = jax.tree.map(jnp.mean, metrics)
        params, opt_state, count = carry
        if draw_validation is not None:
            metrics["validation_loss"] = loss(params, *draw_validation(validation_key))
        return State(params, opt_state, count, next_key), metrics

    def policy(state: State, *, greedy: bool = True) -> Policy:
        raise NotImplementedError(
            "A language model is not a policy of an environment: use jrl.language.generation."
        )

    return Algorithm(init, step, policy, config.updates_per_step * config.batch_size * length)


def batches(corpus: Corpus, model: transformer.Config, config: Config) -> tuple[Any, int]:
    """Return ``key -> (tokens [B, L + 1], weight)`` and ``L``, the tokens that a text of a batch predicts.

    Windows and rows are drawn independently, with replacement.

    Raises:
        ValueError: as :func:`make`.
    """
    tokens = np.asarray(corpus.tokens)
    _check_tokens(tokens, model.vocab_size)
    if tokens.ndim == 1:
        length = config.sequence_length or model.max_length
        transformer.check_length(model, length)
        if len(tokens) <= length:
            raise ValueError(
                f"a corpus of {len(tokens)} tokens is shorter than a window of sequence_length={length} and the token "
                "after it; use more text or shorter windows."
            )

        def draw(key: Key) -> tuple[Array, Array]:
            first = jax.random.randint(key, (config.batch_size, 1), 0, len(tokens) - length)
            window = jnp.asarray(tokens)[first + jnp.arange(length + 1)].astype(jnp.int32)
            return window, jnp.ones(window.shape)

        return draw, length
    length = tokens.shape[1] - 1
    transformer.check_length(model, length)
    weight = _weight(tokens, corpus.weight)

    def draw_rows(key: Key) -> tuple[Array, Array]:
        row = jax.random.randint(key, (config.batch_size,), 0, len(tokens))
        return jnp.asarray(tokens)[row].astype(jnp.int32), jnp.asarray(weight)[row]

    return draw_rows, length


def _weight(tokens: np.ndarray, given: Any) -> np.ndarray:
    """Return the weights of rows; raises ValueError where they are none."""
    weight = np.asarray(given, np.float32)
    if weight.shape != tokens.shape or not weight[:, 1:].any():
        raise ValueError(
            f"rows {tokens.shape} with weight {weight.shape}: every token needs one, and some token after "
            "the first of its row one above 0."
        )
    if not (np.isfinite(weight) & (weight >= 0)).all():
        wrong = weight[~(np.isfinite(weight) & (weight >= 0))][0]
        raise ValueError(f"a token of weight {wrong}: weights are finite and at least 0.")
    return weight


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    if not tokens.size or not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2):
        raise ValueError(
            f"tokens are {tokens.dtype} {tokens.shape}: must be integers [M] or [N, L], at least one."
        )
    for token in (tokens.min(), tokens.max()):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token {token} of the corpus is outside the vocabulary: the model has vocab_size={vocab_size}. "
                "Use the tokenizer that the model was made for."
            )


def cross_entropy(logits: Array, targets: Array, weight: Array) -> Array:
    """Return ``− Σ w log p(target) / Σ w`` in nats (0 where no token counts).

    Args:
        logits: ``[N, L, V]``.
        targets: int ``[N, L]``.
        weight: float ``[N, L]``.
    """
    log_p = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(
        logits, axis=-1
    )
    return -weighted_mean(log_p, weight)


def weighted_mean(values: Array, weight: Array) -> Array:
    """Return ``Σ w x / Σ w``, both of one shape; 0 where nothing has weight."""
    total = weight.sum()
    return (weight * values).sum() / jnp.where(total > 0, total, 1.0)


def schedule(hparams: Any, count: Array) -> Array:
    """Return the step size after ``count`` tokens (a :mod:`jrl.ops.counter`)."""
    return ops.warmup_cosine_schedule(
        ops.counter.to_float(count),
        start=0.0,
        peak=hparams.learning_rate,
        end=hparams.learning_rate_end,
        warmup=hparams.warmup_tokens,
        duration=hparams.anneal_tokens,
    )


def optimizer(hparams: Any, learning_rate: Array) -> optax.GradientTransformation:
    """Return AdamW on clipped gradients; gains and biases are not decayed."""

    def decayed(params: Params) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("gain", "bias"), params)

    return optax.chain(
        optax.clip_by_global_norm(hparams.max_grad_norm),
        optax.scale_by_adam(b1=hparams.beta1, b2=hparams.beta2),
        optax.add_decayed_weights(hparams.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def evaluate(
    params: Params, model: transformer.Config, corpus: Corpus, config: Config | None = None
) -> Array:
    """Return the cross-entropy (nats a token) of a whole corpus: each token but the first of a text is predicted
    once.

    A stream is cut into windows one after the other; a prediction sees its own window only.

    Raises:
        ValueError: a token outside the vocabulary, a stream of fewer than two, or rows whose weights do not fit.
    """
    config = checks.config(config, Config)
    tokens = np.asarray(corpus.tokens)
    _check_tokens(tokens, model.vocab_size)
    if tokens.ndim == 1:
        if len(tokens) < 2:
            raise ValueError(f"a corpus of {len(tokens)} token: nothing follows it that could be predicted.")
        length = min(config.sequence_length or model.max_length, len(tokens) - 1)
        windows = -(-(len(tokens) - 1) // length)
        at = np.arange(windows)[:, None] * length + np.arange(
            length + 1
        )  # the next begins with this one's last
        tokens, weight = tokens[np.minimum(at, len(tokens) - 1)], (at < len(tokens)).astype(np.float32)
    else:
        weight = _weight(tokens, corpus.weight)
    batch = min(config.batch_size, len(tokens))
    short = -len(tokens) % batch
    tokens, weight = (
        np.pad(x, ((0, short), (0, 0))).reshape(-1, batch, x.shape[1]) for x in (tokens, weight)
    )

    def total(x: tuple[Array, Array]) -> Array:
        tokens, weight = x[0].astype(jnp.int32), x[1][:, 1:]
        logits = transformer.forward(params, model, tokens[:, :-1]).logits
        return cross_entropy(logits, tokens[:, 1:], weight) * weight.sum()

    return jax.lax.map(total, (jnp.asarray(tokens), jnp.asarray(weight))).sum() / weight[..., 1:].sum()
