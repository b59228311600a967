"""Distillation: a small decoder learns the distributions of a large one (Hinton et al., 2015, arXiv:1503.02531).

``loss = τ² · mean_t D(softmax(z_T / τ), softmax(z_S / τ)) + c · cross-entropy``, where ``D`` is the forward or the
reverse Kullback–Leibler divergence or the generalised Jensen–Shannon divergence, and the factor ``τ²`` keeps
gradients as large as they were at ``τ = 1``. On-policy, the texts are the student's own (Agarwal et al., 2024,
"On-Policy Distillation of Language Models", https://arxiv.org/abs/2306.13649): it learns what the teacher would have
said after its own mistakes. No gradient passes through the drawing of a text, as in that paper.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import ops
from jrl.algos import checks
from jrl.language import generation, pretraining
from jrl.language.pretraining import Corpus, batches, cross_entropy, weighted_mean
from jrl.networks import transformer
from jrl.types import Algorithm, Array, Key, Metrics, Params, Policy, PyTree

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclasses.dataclass(frozen=True)
class Config(pretraining.Config):
    """Static choices beside the student's architecture."""

    divergence: str = "forward_kl"
    """forward_kl: KL(teacher ‖ student); reverse_kl: KL(student ‖ teacher); jsd: between them, by jsd_beta."""
    on_policy: bool = False
    """Learn on continuations that the student draws itself, of prompts from the corpus."""
    prompt_length: int = 16
    """Tokens of the corpus that each continuation begins with, on_policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice(self, "divergence", DIVERGENCES)
        checks.sizes(self, "prompt_length")


@struct.dataclass
class HParams(pretraining.HParams):
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    temperature: float = 1.0
    """τ, above 0, by which the logits of both are divided; its square scales the loss."""
    jsd_beta: float = 0.5
    """β in (0, 1) of the generalised Jensen–Shannon divergence: towards 0 it is β times the forward divergence, towards
    1 it is 1 − β times the reverse, so that at both ends there is nothing to learn from."""
    cross_entropy_coef: float = 0.0
    """Weight of the cross-entropy with the corpus beside the divergence; not with on_policy."""


@struct.dataclass
class State:
    """Everything that evolves, and the teacher, so that a checkpoint is complete. ``env_steps`` counts tokens."""

    params: Params
    opt_state: PyTree
    teacher: Params
    env_steps: Array
    key: Key


def make(
    corpus: Corpus,
    student: transformer.Config,
    teacher: transformer.Config,
    teacher_params: Params | None = None,
    config: Config | None = None,
    *,
    validation: Corpus | None = None,
) -> Algorithm:
    """Return the learner as an :class:`~jrl.types.Algorithm`; one ``step`` is ``updates_per_step`` gradient steps.

    Args:
        corpus: texts, or on-policy prompts.
        student: its architecture.
        teacher: the architecture of the teacher, whose vocabulary is the same.
        teacher_params: its parameters; None where a state is only restored.
        config: static choices.
        validation: another corpus, of which ``validation_loss`` (cross-entropy) is a metric.

    Raises:
        TypeError: ``config`` is of another class.
        ValueError: the vocabularies differ, a text is longer than either context, or as :func:`pretraining.make`.
    """
    config = checks.config(config, Config)
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the student has vocab_size={student.vocab_size}, the teacher {teacher.vocab_size}: they must have the "
            "same tokens; give the student the teacher's vocab_size."
        )
    draw, length = batches(corpus, student, config)
    transformer.check_length(teacher, length)
    if config.on_policy and (config.prompt_length > length or jnp.ndim(corpus.tokens) != 1):
        raise ValueError(
            f"prompt_length={config.prompt_length} with texts of {length + 1} tokens: on_policy needs a corpus that is "
            "one stream, and a prompt shorter than a text."
        )
    draw_validation = None if validation is None else batches(validation, student, config)[0]

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        params_key, state_key = jax.random.split(key)
        params = transformer.init(params_key, student)
        given = transformer.init(jax.random.key(0), teacher) if teacher_params is None else teacher_params
        opt_state = pretraining.optimizer(hparams, jnp.float32(0)).init(params)
        return State(params, opt_state, jax.tree.map(jnp.asarray, given), ops.counter.zero(), state_key)

    def texts(key: Key, params: Params) -> tuple[Array, Array]:
        corpus_key, student_key = jax.random.split(key)
        tokens, weight = draw(corpus_key)
        if not config.on_policy:
            return tokens, weight
        prompt = tokens[:, : config.prompt_length]
        settings = generation.Settings(max_new_tokens=length + 1 - config.prompt_length)
        lengths = jnp.full((config.batch_size,), config.prompt_length)
        said = generation.generate(student_key, params, longer, prompt, lengths, settings).tokens
        new = jnp.arange(length + 1) >= config.prompt_length
        return jnp.concatenate([prompt, said], axis=1), jnp.broadcast_to(
            new.astype(jnp.float32), tokens.shape
        )

    # The last token that is drawn is only predicted, never read: the context may be one shorter than the text.
    longer = dataclasses.replace(student, max_length=max(student.max_length, length + 1))

    def loss(params: Params, teacher_params: Params, tokens: Array, weight: Array, hparams: HParams) -> Any:
        logits = transformer.forward(params, student, tokens[:, :-1]).logits
        target = jax.lax.stop_gradient(transformer.forward(teacher_params, teacher, tokens[:, :-1]).logits)
        weight = weight[:, 1:]
        tau = hparams.temperature
        apart = divergence(target / tau, logits / tau, config.divergence, hparams.jsd_beta)
        apart = tau**2 * weighted_mean(apart, weight)
        if config.on_policy:
            return apart, {"loss": apart, "divergence": apart}
        entropy = cross_entropy(logits, tokens[:, 1:], weight)
        total = apart + hparams.cross_entropy_coef * entropy
        return total, {"loss": total, "divergence": apart, "cross_entropy": entropy}

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, batch_key, validation_key = jax.random.split(state.key, 3)

        def update(carry: tuple, key: Key) -> tuple[tuple, Metrics]:
            params, opt_state, count = carry
            grads, metrics = jax.grad(loss, has_aux=True)(params, state.teacher, *texts(key, params), hparams)
            learning_rate = pretraining.schedule(hparams, count)
            updates, opt_state = pretraining.optimizer(hparams, learning_rate).update(
                grads, opt_state, params
            )
            metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": learning_rate}
            count = ops.counter.add(count, config.batch_size * length)
            return (optax.apply_updates(params, updates), opt_state, count), metrics

        keys = jax.random.split(batch_key, config.updates_per_step)
        carry, metrics = jax.lax.scan(update, (state.params, state.opt_state, state.env_steps), keys)
        metrics = jax.tree.map(jnp.mean, metrics)
        params, opt_state, count = carry
        if draw_validation is not None:
            tokens, weight = draw_validation(validation_key)
            logits = transformer.forward(params, student, tokens[:, :-1]).logits
            metrics["validation_loss"] = cross_entropy(logits, tokens[:, 1:], weight[:, 1:])
        return dataclasses.replace(
            state, params=params, opt_state=opt_state, env_steps=count, key=next_key
        ), metrics

    def policy(state: State, *, greedy: bool = True) -> Policy:
        raise NotImplementedError(
            "A language model is not a policy of an environment: use jrl.language.generation."
        )

    return Algorithm(init, step, policy, config.updates_per_step * config.batch_size * length)


def divergence(teacher: Array, student: Array, kind: str, beta: Array | float = 0.5) -> Array:
    """Return how far the student's distributions are from the teacher's, in nats.

    ``forward_kl``: ``KL(p ‖ q)``, ``reverse_kl``: ``KL(q ‖ p)``, ``jsd``: ``β KL(p ‖ m) + (1 − β) KL(q ‖ m)`` with
    ``m = β p + (1 − β) q``, for ``p`` the teacher's and ``q`` the student's distribution.

    Source: Agarwal et al., 2024, https://arxiv.org/abs/2306.13649.

    Args:
        teacher: logits ``[..., V]``.
        student: logits ``[..., V]``.
        kind: one of :data:`DIVERGENCES`.
        beta: of ``jsd``, in (0, 1).

    Returns:
        ``[...]``.

    Raises:
        ValueError: an unknown kind.
    """
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)

    def kl(log_a: Array, log_b: Array) -> Array:
        return (jnp.exp(log_a) * (log_a - log_b)).sum(-1)

    if kind == "forward_kl":
        return kl(log_p, log_q)
    if kind == "reverse_kl":
        return kl(log_q, log_p)
    if kind == "jsd":
        log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    raise ValueError(f"kind={kind!r}: must be one of {', '.join(DIVERGENCES)}.")
