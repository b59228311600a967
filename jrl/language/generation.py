"""Generating text: many samples of many prompts side by side, in one compiled loop.

Every slot reads one token a step. A text ends at ``end_token`` or at its length limit; its slot then takes the next
request at once, and the loop ends with the last text. Samples of one prompt share one prefill. What is recorded is the
log-probability under the distribution that was sampled, temperature and truncation included, so that nothing needs a
second pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import ops
from jrl.networks import transformer
from jrl.networks.transformer import Cache
from jrl.types import Array, Key, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static choices of a generation."""

    max_new_tokens: int = 64
    """A text ends, unfinished, after as many tokens."""
    end_token: int = -1
    """Token that finishes a text, and belongs to it; -1: none does."""
    num_samples: int = 1
    """Texts for each prompt."""
    num_slots: int = 0
    """Texts computed side by side; 0: all of them. With fewer, a finished text makes room for the next."""
    greedy: bool = False
    """The most probable token each time, in place of a draw."""

    def __post_init__(self) -> None:
        for name, lowest in (("max_new_tokens", 1), ("end_token", -1), ("num_samples", 1), ("num_slots", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: must be an integer.")
            if value < lowest:
                raise ValueError(f"{name}={value}: must be at least {lowest}.")


class Sampling(NamedTuple):
    """Numbers that shape the distribution, traced; applied in this order. None leaves a step out.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: only the ``k`` most probable tokens, at least one (Fan et al., 2018, https://arxiv.org/abs/1805.04833).
        top_p: only the fewest most probable tokens whose probabilities sum to at least this (Holtzman et al., 2020,
            https://arxiv.org/abs/1904.09751).
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None


class Generated(NamedTuple):
    """Texts ``[R, T]``: request ``r = prompt · num_samples + sample``, ``T`` is ``max_new_tokens``.

    Attributes:
        tokens: int32 ``[R, T]``, 0 after a text's end.
        log_prob: float32 ``[R, T]``, of each token under the distribution it was drawn from (greedy: the one it
            would have been drawn from); 0 after the end.
        value: float32 ``[R, T]``, of the text before each token; ``()`` without a value head.
        length: int32 ``[R]``, tokens of each text, the end token among them.
        finished: bool ``[R]``, the end token was reached; otherwise the text was cut.
    """

    tokens: Array
    log_prob: Array
    value: Any
    length: Array
    finished: Array

    @property
    def mask(self) -> Array:
        """Bool ``[R, T]``: True where a token is."""
        return jnp.arange(self.tokens.shape[-1]) < self.length[..., None]


class _Loop(NamedTuple):
    request: Array  # [N] what each slot works on; R where there is nothing left
    drawn: Array  # [N] tokens it has drawn of it
    output: Any  # of the decoder, before the next token
    cache: Cache
    waiting: Array  # [] the next request without a slot
    out: Generated  # one row more than requests, for slots without one


def generate(
    key: Key,
    params: Params,
    config: transformer.Config,
    prompts: Array,
    lengths: Array,
    settings: Settings,
    sampling: Sampling = Sampling(),  # noqa: B008 - a constant
) -> Generated:
    """Continue each prompt ``num_samples`` times.

    Args:
        key: consumed. A text depends on it and on its own number ``r``, not on ``num_slots``.
        params: of the decoder.
        config: its architecture.
        prompts: int ``[G, P]``, padded on the right.
        lengths: int ``[G]``, at least 1.
        settings: static.
        sampling: traced.

    Returns:
        :class:`Generated`, ``R = G · num_samples`` texts.

    Raises:
        ValueError: ``P + max_new_tokens`` exceeds the context; ``end_token`` is not in the vocabulary; ``lengths`` are
            not one for each prompt, or (where they are known) not 1 to ``P``.
    """
    (G, P), S, T = prompts.shape, settings.num_samples, settings.max_new_tokens
    check_lengths(config, P, T)
    if settings.end_token >= config.vocab_size:
        raise ValueError(
            f"end_token={settings.end_token} is outside the vocabulary of {config.vocab_size} tokens; use -1 for none."
        )
    R = G * S
    if jnp.shape(lengths) != (G,):
        raise ValueError(f"lengths of shape {jnp.shape(lengths)} for {G} prompts: expected [{G}].")
    if not isinstance(lengths, jax.core.Tracer):
        known = np.asarray(lengths)
        if not ((known >= 1) & (known <= P)).all():
            raise ValueError(f"lengths={known.tolist()} of prompts of {P} tokens: must be 1 to {P}.")
    lengths = jnp.asarray(lengths)
    N = min(settings.num_slots or R, R)
    read, prefix = transformer.prefill(params, config, prompts, lengths, transformer.init_cache(config, G, P))
    # A slot's first request; the cache of a prompt is copied to each of its samples.
    request = jnp.arange(N)
    cache = jax.tree.map(lambda leaf: jnp.pad(leaf[request // S], ((0, 0),) * 3 + ((0, T - 1),)), prefix)
    draw_keys = jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(R + 1))
    empty = Generated(
        tokens=jnp.zeros((R + 1, T), jnp.int32),
        log_prob=jnp.zeros((R + 1, T)),
        value=jnp.zeros((R + 1, T)) if config.value_head else (),
        length=jnp.zeros((R + 1,), jnp.int32),
        finished=jnp.zeros((R + 1,), bool),
    )
    start = _Loop(
        request, jnp.zeros((N,), jnp.int32), jax.tree.map(lambda leaf: leaf[request // S], read), cache,
        jnp.int32(N), empty,
    )  # fmt: skip
    # Slots that can be given a new request in one step: more than end in one, on average, if texts have 8 tokens.
    refilled = -(-N // 8)

    def step(loop: _Loop) -> _Loop:
        if N < R:
            loop = refill(loop)  # first: after reading the cache it would have to be copied
        keys = jax.vmap(jax.random.fold_in)(draw_keys[loop.request], loop.drawn)
        token, log_prob = draw(keys, loop.output.logits, sampling, settings.greedy)
        at = (loop.request, loop.drawn)
        drawn = loop.drawn + 1
        finished = token == settings.end_token
        out = loop.out._replace(
            tokens=loop.out.tokens.at[at].set(token),
            log_prob=loop.out.log_prob.at[at].set(log_prob),
            length=loop.out.length.at[loop.request].set(drawn),
            finished=loop.out.finished.at[loop.request].set(finished),
        )
        if config.value_head:
            out = out._replace(value=loop.out.value.at[at].set(loop.output.value))
        ended = finished | (drawn == T)
        request = jnp.where(ended, R, loop.request)
        position = lengths[jnp.minimum(loop.request // S, G - 1)] + loop.drawn
        output, cache = transformer.decode(params, config, token, position, loop.cache)
        return _Loop(request, jnp.where(request == R, 0, drawn), output, cache, loop.waiting, out)

    def refill(loop: _Loop) -> _Loop:
        """Give up to ``refilled`` empty slots the next requests, their prompts already read."""
        slot = jnp.nonzero(loop.request == R, size=refilled, fill_value=N)[0]
        request = jnp.where(slot < N, loop.waiting + jnp.arange(refilled), R)
        slot = jnp.where(request < R, slot, N)  # out of bounds: dropped
        prompt = jnp.minimum(request // S, G - 1)

        def put(old: Array, new: Array) -> Array:
            return old.at[slot, ..., : new.shape[-1]].set(new[prompt], mode="drop")

        return loop._replace(
            request=loop.request.at[slot].set(request, mode="drop"),
            output=jax.tree.map(
                lambda old, new: old.at[slot].set(new[prompt], mode="drop"), loop.output, read
            ),
            cache=jax.tree.map(put, loop.cache, prefix),
            waiting=loop.waiting + (request < R).sum(),
        )

    loop = jax.lax.while_loop(lambda loop: (loop.request < R).any() | (loop.waiting < R), step, start)
    return jax.tree.map(lambda leaf: leaf[:R], loop.out)


def draw(keys: Key, logits: Array, sampling: Sampling, greedy: bool = False) -> tuple[Array, Array]:
    """Draw one token for each row of logits, by inverting the distribution function: one uniform number a row.

    Args:
        keys: ``[N]``, consumed.
        logits: ``[N, V]``.
        sampling: temperature and truncation.
        greedy: take the most probable one instead.

    Returns:
        Tokens int32 ``[N]`` and their log-probabilities ``[N]`` under the distribution drawn from.
    """
    logits = shape_logits(logits, sampling)
    if greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        centred = logits - logits.max(-1, keepdims=True)
        token = ops.inverse_cdf(jnp.exp(centred), jax.vmap(jax.random.uniform)(keys))
    return token, ops.Categorical(logits).log_prob(token)


def shape_logits(logits: Array, sampling: Sampling) -> Array:
    """Return logits ``[..., V]`` of the distribution that is sampled: tempered, then truncated.

    A truncated token has the lowest finite number, so probability 0. Among equally probable tokens at the edge all are
    kept. Nothing is sorted: the edge is found by bisection.
    """
    logits = logits / sampling.temperature
    for limit, weigh in ((sampling.top_k, jnp.ones_like), (sampling.top_p, lambda p: p)):
        if limit is not None:
            p = jax.nn.softmax(logits, axis=-1)
            logits = ops.masked(logits, p >= _edge(p, weigh(p), limit))
    return logits


def _edge(p: Array, weight: Array, least: Array) -> Array:
    """Return the largest ``τ [..., 1]`` with ``Σ weight[p ≥ τ] ≥ least``: bisected on the bits of a float32.

    (Bit patterns of floats that are not negative are ordered as the floats are.)
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low satisfies the condition, high does not
        middle = low + (high - low) // 2
        tau = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(p >= tau, weight, 0.0).sum(-1, keepdims=True) >= least
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    least = jnp.maximum(least, jnp.finfo(jnp.float32).tiny)  # always one token
    shape = (*p.shape[:-1], 1)
    above_one = 0x40000000  # the bits of 2.0
    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, above_one, jnp.int32))
    low, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def check_lengths(config: transformer.Config, prompt: int, new: int) -> None:
    """Raise ValueError unless a prompt and what is to follow it fit the context."""
    if prompt + new > config.max_length:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones: the context holds max_length={config.max_length}; "
            "cut the prompt, or ask for fewer new tokens."
        )
