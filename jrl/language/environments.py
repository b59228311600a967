"""Text generation as an :class:`~jrl.types.Environment`: the state is the text so far, an action the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.build import from_functions
from jrl.language import grammar as grammars
from jrl.language.rewards import Score, Text
from jrl.networks import transformer
from jrl.types import Array, Discrete, Environment, Key, MaskedObservation, Params, PyTree, TokenObservation

AT_LIMIT = ("truncate", "terminate")


class Prompts(NamedTuple):
    """What texts begin with, one drawn uniformly for each episode.

    Attributes:
        tokens: int ``[M, P]``; what lies behind the length is ignored.
        length: int ``[M]``, at least 1.
        reference: what the reward knows about the answer, leaves ``[M, ...]``.
    """

    tokens: Any
    length: Any
    reference: PyTree = ()


class TokenReward(NamedTuple):
    """A reward at every token.

    Attributes:
        init: ``Text -> carry``, of the prompt alone.
        step: ``(carry, Text, over) -> (carry, reward, stop)``: ``Text`` with the new token, ``over`` bool, whether
            it is the last; ``stop`` ends the text as a termination.
    """

    init: Callable[[Text], PyTree]
    step: Callable[[PyTree, Text, Array], tuple[PyTree, Array, Array]]


def at_end(score: Score) -> TokenReward:
    """Reward the whole text when it is over, 0 before."""
    return TokenReward(
        lambda text: (),
        lambda carry, text, over: (carry, jnp.where(over, score(text), 0.0), jnp.bool_(False)),
    )


def gain(score: Score) -> TokenReward:
    """Reward each token by what it adds to a score: the sum over the text is its score less that of the prompt."""

    def step(before: Array, text: Text, over: Array) -> tuple[Array, Array, Array]:
        value = score(text)
        return value, value - before, jnp.bool_(False)

    return TokenReward(score, step)


def shaped(reward: TokenReward, potential: Score, gamma: float) -> TokenReward:
    """Add ``γ Φ(s') − Φ(s)``, ``Φ = 0`` where the text is over: every policy keeps its rank.

    Source: Ng, Harada and Russell 1999, "Policy Invariance under Reward Transformations",
    https://people.eecs.berkeley.edu/~russell/papers/icml99-shaping.pdf.

    Args:
        reward: what is shaped.
        potential: Φ, of the text so far.
        gamma: the learner's discount factor; with another one the ranks are not kept.
    """

    def step(
        carry: tuple[PyTree, Array], text: Text, over: Array
    ) -> tuple[tuple[PyTree, Array], Array, Array]:
        inner, before = carry
        inner, value, stop = reward.step(inner, text, over)
        after = jnp.where(over | stop, 0.0, potential(text))
        return (inner, after), value + gamma * after - before, stop

    return TokenReward(lambda text: (reward.init(text), potential(text)), step)


class Rating(NamedTuple):
    """Scores of whole texts that a token environment adds up at their ends.

    Their cost is that of whole texts. Kernels that see whole texts compute them once for each and not at every token.

    Attributes:
        scores: by name; each is reported as ``score/NAME``.
        weights: of the sum, by the same names; 0 for a score that is reported only, as one whose gain is in the
            reward of every token already.
    """

    scores: Mapping[str, Score]
    weights: Mapping[str, float]

    def __call__(self, text: Text) -> tuple[Array, dict[str, Array]]:
        """Return the weighted sum ``[]``, and each score ``[]`` as it is reported."""
        values = {name: jnp.asarray(score(text), jnp.float32) for name, score in self.scores.items()}
        total = sum((self.weights[name] * value for name, value in values.items() if self.weights[name]), 0.0)
        return jnp.asarray(total, jnp.float32), {f"score/{name}": value for name, value in values.items()}


class Decoder(NamedTuple):
    """A trained decoder whose tokens an environment's texts are made of."""

    params: Params
    config: transformer.Config


class TokenParams(NamedTuple):
    """``missing_eos_reward``: float32, added where a text reaches the limit without having been ended."""

    missing_eos_reward: Any = 0.0


class TokenState(NamedTuple):
    """The text so far (its ``reference`` included), and what the reward and the grammar carry."""

    text: Text
    carry: PyTree
    grammar: Array


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStep:
    """The step of a token environment, with what token-level algorithms need to know; any wrapper hides it.

    Attributes:
        function: the step.
        vocab_size: tokens in all, ``V``.
        eos: the token that ends a text, or None.
        max_prompt: ``P``, the longest prompt.
        max_new_tokens: ``T``, the limit; texts are ``L = P + T`` long.
        prompts: as given, for solving and for held-out evaluation.
        start: ``prompt's number -> (env_state, obs)``.
        advance: ``(env_state, action, params) -> (env_state, obs, reward, terminated, truncated)``; never resets.
        rating: of whole texts, which ``function`` and ``advance`` add at their ends; None where there is none.
        unrated: the step without it, for kernels that rate whole texts themselves.
        decoder: what ``model="pretrained"`` starts from, or None.
        grammar: of what is generated, or None.
        sources: ``() -> {what: {"name", "sha256"}}`` of the files that it was made of, for the records of runs; None
            where there are none.
    """

    function: Callable[..., Any]
    vocab_size: int
    eos: int | None
    max_prompt: int
    max_new_tokens: int
    prompts: Prompts
    start: Callable[..., tuple[TokenState, PyTree]]
    advance: Callable[..., tuple[TokenState, PyTree, Array, Array, Array]]
    rating: Rating | None
    unrated: Callable[..., Any]
    decoder: Decoder | None
    grammar: grammars.Automaton | None
    sources: Callable[[], dict[str, Any]] | None = None

    def __call__(self, *args: Any) -> Any:
        """Step one environment."""
        return self.function(*args)


def token_mdp(
    prompts: Prompts,
    reward: TokenReward,
    *,
    vocab_size: int,
    max_new_tokens: int,
    eos: int | None = None,
    at_limit: str = "truncate",
    missing_eos_reward: float = 0.0,
    grammar: grammars.Automaton | None = None,
    rating: Rating | None = None,
    decoder: Decoder | None = None,
    name: str = "TokenMDP",
) -> Environment:
    """Make an environment whose states are texts.

    The observation is the text, int32 ``[L]`` with −1 behind its end (:class:`~jrl.types.TokenObservation`: the
    default networks see it one-hot), with a grammar a :class:`~jrl.types.MaskedObservation`. A text ends when ``eos``
    is chosen or the reward stops it (terminated), or when it has ``max_new_tokens`` more tokens than its prompt.

    Args:
        prompts: what texts begin with.
        reward: at every token.
        vocab_size: ``V``.
        max_new_tokens: ``T``.
        eos: the token that ends a text; None means that only the limit and the reward do.
        at_limit: ``truncate``: a text at the limit is cut, its value goes on; ``terminate``: the limit is part of the
            task, as where an answer is due by then.
        missing_eos_reward: the default of ``params.missing_eos_reward`` (traced).
        grammar: of what is generated; tokens that cannot lead to one of its texts in time are masked.
        rating: of whole texts, added to the reward of their last tokens.
        decoder: a trained one over the same tokens.
        name: for messages and records.

    Raises:
        ValueError: no prompt, an empty one, a token outside the vocabulary, a size below 1, or a grammar over another
            vocabulary or whose shortest text does not fit.
    """
    _check_sizes(name, vocab_size, max_new_tokens, eos, at_limit)
    tokens, lengths = _check_prompts(name, prompts, vocab_size)
    if grammar is not None and (grammar.transitions.shape[1] != vocab_size or eos is None):
        raise ValueError(
            f"{name}: a grammar over {grammar.transitions.shape[1]} tokens with vocab_size={vocab_size} and eos={eos}: "
            "it needs the same vocabulary, and a token that ends a text."
        )
    if grammar is not None and (shortest := int(grammar.distance[0]) + 1) > max_new_tokens:
        raise ValueError(
            f"{name}: the shortest text of the grammar has {shortest} tokens, its end included, and "
            f"max_new_tokens={max_new_tokens}: no token could be said; raise max_new_tokens to {shortest} at least."
        )
    count, longest = tokens.shape
    table = jnp.asarray(
        np.pad(
            np.where(np.arange(longest) < lengths[:, None], tokens, -1),
            ((0, 0), (0, max_new_tokens)),
            constant_values=-1,
        ),
        jnp.int32,
    )
    prompt_lengths = jnp.asarray(lengths, jnp.int32)
    references = jax.tree.map(jnp.asarray, prompts.reference)
    for path, leaf in jax.tree_util.tree_leaves_with_path(references):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"{name}: reference{jax.tree_util.keystr(path)} is {leaf.shape} for {count} prompts."
            )

    def observe(state: TokenState) -> PyTree:
        if grammar is None:
            return state.text.tokens
        remaining = max_new_tokens - (state.text.length - state.text.prompt_length)
        mask = grammars.allowed(grammar, state.grammar, eos, remaining)  # type: ignore[arg-type]
        return MaskedObservation(state.text.tokens, mask)

    def start(index: Array | int) -> tuple[TokenState, PyTree]:
        reference = jax.tree.map(lambda leaf: leaf[index], references)
        text = Text(table[index], prompt_lengths[index], prompt_lengths[index], jnp.bool_(False), reference)
        state = TokenState(text, reward.init(text), jnp.int32(0))
        return state, observe(state)

    def reset(key: Key, params: TokenParams) -> tuple[TokenState, PyTree]:
        return start(jax.random.randint(key, (), 0, count))

    def step(state: TokenState, action: Array, params: TokenParams, rating: Rating | None) -> tuple:
        ended = jnp.bool_(False) if eos is None else action == eos
        before = state.text
        # A select, not a scatter: it fuses, and a batch of scatters does not.
        tokens = jnp.where(jnp.arange(table.shape[1]) == before.length, action, before.tokens)
        text = before._replace(tokens=tokens, length=before.length + 1, finished=ended)
        limit = text.length - text.prompt_length >= max_new_tokens
        carry, value, stop = reward.step(state.carry, text, ended | limit)
        terminated = ended | stop
        if rating is not None:
            value += jnp.where(terminated | limit, rating(text)[0], 0.0)
        value += jnp.where(limit & ~terminated, params.missing_eos_reward, 0.0)
        if at_limit == "terminate":
            terminated |= limit
        place = state.grammar if grammar is None else grammars.step(grammar, state.grammar, action)
        state = TokenState(text, carry, place)
        return state, observe(state), value, terminated, limit & ~terminated

    def environment(rating: Rating | None) -> Environment:
        def transition(key: Key, state: TokenState, action: Array, params: TokenParams) -> tuple:
            return step(state, action, params, rating)

        return from_functions(reset, transition, TokenParams(missing_eos_reward), Discrete(vocab_size), name)

    def advance(state: TokenState, action: Array, params: TokenParams) -> tuple:
        return step(state, action, params, rating)

    env = environment(rating)
    unrated = env.step if rating is None else environment(None).step
    given = Prompts(tokens, lengths, prompts.reference)
    known = TokenStep(
        env.step,
        vocab_size,
        eos,
        longest,
        max_new_tokens,
        given,
        start,
        advance,
        rating,
        unrated,
        decoder,
        grammar,
    )
    observation: PyTree = TokenObservation(table.shape[1], vocab_size)
    if grammar is not None:
        observation = MaskedObservation(observation, env.observation.action_mask)
    return env._replace(step=known, observation=observation)


def token_step(env: Environment, algorithm: str) -> TokenStep:
    """Return what a token-level algorithm needs to know of an environment.

    Raises:
        TypeError: ``env`` was not made by :func:`token_mdp`, or was wrapped since.
    """
    if not isinstance(env, Environment) or not isinstance(env.step, TokenStep):
        raise TypeError(
            f"{algorithm} on {getattr(env, 'name', env)!r}: needs a token environment as it was made "
            "(jrl.language.environments.token_mdp, or an id such as RandomWalks-jrl). Other environments: jrl.ppo or "
            "jrl.dqn."
        )
    return env.step


def allowed_tokens(step: TokenStep, tokens: Array, prompt_length: Array) -> Array | None:
    """Return which tokens the grammar allowed at each place of texts, None where there is no grammar.

    Args:
        step: of the environment.
        tokens: int32 ``[N, L]``, −1 behind the end.
        prompt_length: int32 ``[N]``.

    Returns:
        bool ``[N, T, V]``; nothing is allowed behind the end.
    """
    if (grammar := step.grammar) is None:
        return None
    place = prompt_length[:, None] + jnp.arange(step.max_new_tokens)
    inside = place < tokens.shape[1]
    said = jnp.where(inside, jnp.take_along_axis(tokens, jnp.where(inside, place, 0), axis=1), -1)

    def advance(state: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        token, remaining = x
        mask = grammars.allowed(grammar, state, step.eos, remaining)  # type: ignore[arg-type]
        return grammars.step(grammar, state, token), mask

    start = jnp.zeros(len(tokens), jnp.int32)
    _, masks = jax.lax.scan(advance, start, (said.T, jnp.arange(step.max_new_tokens, 0, -1)))
    return jnp.moveaxis(masks, 0, 1)


def _check_sizes(name: str, vocab_size: int, max_new_tokens: int, eos: int | None, at_limit: str) -> None:
    for field, value in (("vocab_size", vocab_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {field}={value}: must be at least 1.")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(
            f"{name}: eos={eos} is outside the vocabulary of {vocab_size} tokens, 0 to {vocab_size - 1}."
        )
    if at_limit not in AT_LIMIT:
        raise ValueError(f"{name}: at_limit={at_limit!r}: must be one of {', '.join(AT_LIMIT)}.")


def _check_prompts(name: str, prompts: Prompts, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.length)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not tokens.size:
        raise ValueError(
            f"{name}: prompts of shape {tokens.shape} with lengths {lengths.shape}: expected [M, P] and [M]."
        )
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > tokens.shape[1]))[0])
        raise ValueError(
            f"{name}: prompt {wrong} has length {lengths[wrong]}: must be 1 to {tokens.shape[1]}; a text needs a first "
            "token, for instance one that marks the start."
        )
    used = np.arange(tokens.shape[1]) < lengths[:, None]
    wrong_tokens = np.argwhere(used & ((tokens < 0) | (tokens >= vocab_size)))
    if wrong_tokens.size:
        row, column = wrong_tokens[0]
        raise ValueError(
            f"{name}: token {tokens[row, column]} at place {column} of prompt {row} is outside the vocabulary of "
            f"{vocab_size} tokens, 0 to {vocab_size - 1}."
        )
    return tokens, lengths
