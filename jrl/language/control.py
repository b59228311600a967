"""A language model in place of a policy network or of a reward, in any environment and inside the compiled program.

Observations are rendered as texts of tokens. As a policy the model's next-token distribution after the text, over one
word for each action, is the distribution of actions; as a reward it is asked about what has happened. So PPO on a grid
that is described in words, judged by a model, is one jitted loop::

    network = control.policy_network(config, render, action_words, params)
    algo = jrl.ppo.make(control.rewarded_by(env, rate), network=network)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.networks import transformer
from jrl.types import Array, Environment, Key, Params, PyTree

Render = Callable[..., Array]
"""Maps what happened to tokens int32 ``[..., L]``, −1 behind a text's end."""


def table(texts: Sequence[Sequence[int]], shape: tuple[int, ...] | None = None) -> Render:
    """Return a rendering that looks texts up: ``(i, j, …) -> texts[i, j, …]``, int arrays of any batch shape.

    Args:
        texts: tokens of each, at least one token.
        shape: of what is counted, such as states × actions, of which the texts are all in order; None: one number.

    Raises:
        ValueError: no text or an empty one, as many as ``shape`` does not have, or what is no token.
    """
    shape = (len(texts),) if shape is None else shape
    if not texts or len(texts) != np.prod(shape) or not all(map(len, texts)):
        raise ValueError(
            f"table of {len(texts)} texts in the shape {shape}: needs one for each, of at least one token."
        )
    if wrong := [token for text in texts for token in text if not _is_token(token)]:
        raise ValueError(f"table: {wrong[0]!r} is no token: whole numbers, at least 0.")
    longest = max(map(len, texts))
    rows = np.array([[*text, *[-1] * (longest - len(text))] for text in texts], np.int32)
    tokens = jnp.asarray(rows.reshape(*shape, longest))
    return lambda *index: tokens[index]


def _is_token(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool) and bool(token >= 0)


def next_token(params: Params, config: transformer.Config, tokens: Array) -> transformer.Output:
    """Return what a decoder says after texts ``[..., L]``: logits ``[..., V]`` and so on."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    output = transformer.forward(params, config, jnp.maximum(flat, 0), flat >= 0)
    last = (flat >= 0).sum(-1) - 1
    rows = jnp.arange(flat.shape[0])
    return jax.tree.map(lambda leaf: leaf[rows, last].reshape(*tokens.shape[:-1], *leaf.shape[2:]), output)


class LanguagePolicy(NamedTuple):
    """A network for PPO and other actor-critics: ``init(key, obs)``, ``apply(params, obs) -> (logits, value)``."""

    init: Callable[[Key, PyTree], Params]
    apply: Callable[[Params, PyTree], tuple[Array, Array]]


def policy_network(
    config: transformer.Config, render: Render, actions: Sequence[int], params: Params | None = None
) -> LanguagePolicy:
    """Return a decoder as the network of an actor-critic with discrete actions.

    ``π(a | o) ∝ p(word_a | text of o)``; the value is a head on the same decoder.

    Args:
        config: the decoder's architecture.
        render: ``obs [...] -> tokens [..., L]``.
        actions: one token for each action, in their order.
        params: a trained decoder's; None starts anew.

    Raises:
        ValueError: no action, a token twice, or what is no token of the vocabulary.
    """
    known = [token for token in actions if _is_token(token) and token < config.vocab_size]
    if not known or len(known) < len(actions) or len(set(known)) < len(known):
        raise ValueError(
            f"actions={tuple(actions)}: needs different tokens of the vocabulary, 0 to {config.vocab_size - 1}, one "
            "for each action."
        )
    words = jnp.asarray(actions)
    config = dataclasses.replace(config, value_head=True)

    def init(key: Key, obs: PyTree) -> Params:
        return transformer.init(key, config) if params is None else transformer.init_heads(config) | params

    def apply(params: Params, obs: PyTree) -> tuple[Array, Array]:
        output = next_token(params, config, render(obs))
        return output.logits[..., words], output.value

    return LanguagePolicy(init, apply)


def log_odds(params: Params, config: transformer.Config, tokens: Array, yes: int, no: int) -> Array:
    """Return ``log p(yes | text) − log p(no | text)`` of a judge, for texts ``[..., L]``."""
    logits = next_token(params, config, tokens).logits
    return logits[..., yes] - logits[..., no]


def rewarded_by(env: Environment, rate: Callable[[PyTree, Array, PyTree], Array]) -> Environment:
    """Return ``env`` with another reward, of what was seen, what was done and what came of it.

    Args:
        env: one environment, not vectorised.
        rate: ``(obs, action, next_obs) -> float32 []``, ``next_obs`` the true successor.
    """

    def reset(key: Key, params: PyTree) -> tuple[PyTree, PyTree]:
        env_state, obs = env.reset(key, params)
        return (env_state, obs), obs

    def step(key: Key, state: Any, action: Array, params: PyTree) -> tuple[PyTree, Any]:
        env_state, out = env.step(key, state[0], action, params)
        reward = jnp.asarray(rate(state[1], action, out.next_obs), jnp.float32)
        return (env_state, out.obs), out._replace(reward=reward)

    return env._replace(reset=reset, step=step, name=f"{env.name} (judged)")
