"""Texts that somebody else has said, checked and rated: what :mod:`jrl.language.token_q` learns from offline."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.language import imitation, models
from jrl.language.environments import TokenStep, token_step
from jrl.language.token_q import Experience
from jrl.types import Array, Environment, PyTree


def replayed(env: Environment, tokens: Array, prompt: Array) -> Experience:
    """Rate logged texts by playing them.

    Args:
        env: a token environment.
        tokens: int32 ``[N, L]``, −1 behind the end.
        prompt: int32 ``[N]``, which of the environment's prompts each begins with.

    Returns:
        What each token earns. A text that stops before its end counts as cut there.

    Raises:
        ValueError: a text does not begin with its prompt, has nothing behind it, is longer than the environment's,
            goes on behind its end, has a gap, a token outside the vocabulary, or one that the environment's grammar
            does not allow there.
    """
    spec = token_step(env, "offline.replayed")
    steps, longest = spec.max_new_tokens, spec.max_prompt + spec.max_new_tokens
    _check_logged(env, spec, np.asarray(tokens), np.asarray(prompt))
    tokens, prompt = jnp.asarray(tokens, jnp.int32), jnp.asarray(prompt, jnp.int32)

    def play(tokens: Array, prompt: Array) -> tuple[Experience, tuple[Array, Array, Array]]:
        state, obs = spec.start(prompt)
        texts = imitation.Texts(tokens[None], state.text.prompt_length[None])
        action, said = imitation.actions(texts, steps)
        begins = (
            jnp.where(jnp.arange(longest) < state.text.prompt_length, tokens, -1) == state.text.tokens
        ).all()

        def advance(state: PyTree, token: Array) -> tuple[PyTree, tuple]:
            state, obs, reward, terminated, truncated = spec.advance(state, token, env.params)
            return state, (reward.astype(jnp.float32), terminated, truncated, models.tokens_of(obs)[1])

        _, (reward, terminated, truncated, masks) = jax.lax.scan(advance, state, action[0])
        more = jnp.append(said[0][1:], False)
        allowed: Any = ()
        grammatical = jnp.ones(steps, bool)
        if masks is not None:
            allowed = jnp.concatenate([obs.action_mask[None], masks])
            grammatical = jnp.take_along_axis(allowed[:-1], action[0][:, None], axis=1)[:, 0] | ~said[0]
        cut = truncated | (said[0] & ~more & ~terminated)
        experience = Experience(tokens, state.text.prompt_length, reward, terminated, cut, allowed)
        return experience, (begins, ~(terminated & more), grammatical)

    experience, (begins, within, grammatical) = jax.device_get(jax.jit(jax.vmap(play))(tokens, prompt))
    if not begins.all():
        wrong = int(np.argmin(begins))
        raise ValueError(
            f"replayed: text {wrong} does not begin with prompt {int(prompt[wrong])} of {env.name}."
        )
    for right, what in (
        (within, "ends its text, and others follow"),
        (grammatical, "is not allowed there by the grammar"),
    ):
        if not right.all():
            row, place = np.argwhere(~right)[0]
            place += experience.prompt_length[row]
            raise ValueError(
                f"replayed: token {int(tokens[row, place])} at place {place} of text {row} {what} of {env.name}; "
                "leave the text out, or cut it there."
            )
    return jax.tree.map(jnp.asarray, experience)


def _check_logged(env: Environment, spec: TokenStep, tokens: np.ndarray, prompt: np.ndarray) -> None:
    """Raise ValueError for texts that cannot have been said here."""
    longest = spec.max_prompt + spec.max_new_tokens
    if tokens.ndim != 2 or tokens.shape[1] != longest or prompt.shape != tokens.shape[:1] or not len(prompt):
        raise ValueError(
            f"replayed: tokens {tokens.shape} with prompts {prompt.shape} on {env.name}: expected [N, {longest}] and "
            "[N], N at least 1."
        )
    num_prompts = len(spec.prompts.length)
    for row in np.flatnonzero((prompt < 0) | (prompt >= num_prompts))[:1]:
        raise ValueError(
            f"replayed: prompt {prompt[row]} of text {row}: {env.name} has prompts 0 to {num_prompts - 1}."
        )
    for row, place in np.argwhere((tokens < -1) | (tokens >= spec.vocab_size))[:1]:
        raise ValueError(
            f"replayed: token {tokens[row, place]} of text {row} is outside the vocabulary of {spec.vocab_size} tokens "
            f"of {env.name}; -1 is behind the end."
        )
    length = (tokens >= 0).sum(axis=1)
    for row in np.flatnonzero(((tokens >= 0) != (np.arange(longest) < length[:, None])).any(axis=1))[:1]:
        raise ValueError(f"replayed: text {row} has a -1 between its tokens; -1 is behind the end alone.")
    new = length - spec.prompts.length[prompt]
    for row in np.flatnonzero((new < 1) | (new > spec.max_new_tokens))[:1]:
        raise ValueError(
            f"replayed: text {row} has {new[row]} tokens behind its prompt: {env.name} takes 1 to "
            f"{spec.max_new_tokens}."
        )
