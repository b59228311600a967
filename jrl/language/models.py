"""Models of the next token, in the three forms that token-level algorithms read them.

One prefix at a time, read anew (what any environment's policy does); a whole text at once, for losses; and token by
token with a memory, for generating. Three kinds: perceptrons over the one-hot text, the decoder of
:mod:`jrl.networks.transformer`, and a table with a row for every prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jrl import networks, ops
from jrl.language.environments import token_step
from jrl.networks import transformer
from jrl.types import Array, Environment, Key, MaskedObservation, Memory, Params, PyTree

KINDS = ("mlp", "transformer", "pretrained")


class Output(NamedTuple):
    """What a model says after a prefix.

    Attributes:
        logits: float32 ``[..., V]``, of the next token.
        value: float32 ``[...]``.
        q: float32 ``[..., Q, V]``, ``Q`` estimates of the next token's value.
    """

    logits: Array
    value: Array
    q: Array


class Model(NamedTuple):
    """A model as a record of pure functions.

    Attributes:
        init: ``key -> params``.
        prefix: ``(params, tokens [..., L]) -> Output [...]``, after the tokens that are not −1.
        text: ``(params, tokens [N, L], prompt_length [N]) -> Output [N, T + 1]``, after the prompt and 0 … T more.
        start: ``(params, tokens [B, L]) -> memory`` of a prompt; None where there is no memory.
        read: ``(params, tokens [B, L], memory) -> (Output [B], memory)``, after one more token.
    """

    init: Callable[[Key], Params]
    prefix: Callable[[Params, Array], Output]
    text: Callable[[Params, Array, Array], Output]
    start: Callable[[Params, Array], Memory] | None = None
    read: Callable[[Params, Array, Memory], tuple[Output, Memory]] | None = None


class ModelConfig(Protocol):
    """The fields of a Config that describe a model."""

    @property
    def model(self) -> str:
        """One of :data:`KINDS`."""

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Of ``mlp``."""

    @property
    def num_layers(self) -> int:
        """Of ``transformer``."""

    @property
    def num_heads(self) -> int:
        """Of ``transformer``."""

    @property
    def width(self) -> int:
        """Of ``transformer``."""


def check(config: ModelConfig) -> None:
    """Raise ValueError for a model that does not exist; for ``Config.__post_init__``."""
    if config.model not in KINDS:
        raise ValueError(
            f"model={config.model!r}: must be one of {', '.join(KINDS)}; a folder is named to the environment: "
            "jrl.make('Text-jrl', model=FOLDER), or --model FOLDER on the command line."
        )


def of_config(env: Environment, config: ModelConfig, *, num_q: int = 0, dueling: bool = False) -> Model:
    """Return the model that a Config describes, for the texts of ``env``.

    The Q heads of a pretrained decoder start as its logits. Those of a softmax policy are action values up to a number
    for each state (Schulman et al., 2017, arXiv:1704.06440), so that the first greedy policy is the decoder's own.

    Raises:
        ValueError: ``pretrained`` where the environment brings no decoder.
    """
    if config.model == "mlp":
        return perceptron(env, config.hidden_sizes, num_q=num_q, dueling=dueling)
    decoder = _decoder(env, config, num_q, dueling)
    if config.model == "transformer":
        return from_transformer(env, decoder)
    params = token_step(env, "pretrained").decoder.params  # type: ignore[union-attr]
    heads = transformer.init_heads(decoder)
    if num_q:
        kernel = params["embedding"].T if decoder.tied_embeddings else params["unembedding"]
        heads["q"] = heads["q"] | {"kernel": jnp.broadcast_to(kernel, (num_q, *kernel.shape))}
    return from_transformer(env, decoder, params | heads)


def flops(
    env: Environment, config: ModelConfig, *, num_q: int = 0, dueling: bool = False
) -> tuple[float, float]:
    """Return the operations of reading one more token, and those of reading a whole text forward.

    Of matrix products, as utilisation is counted: of a decoder :func:`jrl.networks.transformer.flops_per_token`, of
    perceptrons two a parameter and prefix. What an implementation computes again (prefixes read anew) is not counted.
    """
    spec = token_step(env, "flops")
    if config.model == "mlp":
        model = perceptron(env, config.hidden_sizes, num_q=num_q, dueling=dueling)
        one = 2.0 * transformer.num_params(jax.eval_shape(model.init, jax.random.key(0)))
        return one, one * (spec.max_new_tokens + 1)
    longest = spec.max_prompt + spec.max_new_tokens
    one = transformer.flops_per_token(_decoder(env, config, num_q, dueling), longest)
    return one, one * longest


def _decoder(env: Environment, config: ModelConfig, num_q: int, dueling: bool) -> transformer.Config:
    spec = token_step(env, "transformer")
    heads: dict[str, Any] = {"value_head": True, "num_q_heads": num_q, "dueling": dueling}
    if config.model == "pretrained":
        if spec.decoder is None:
            raise ValueError(
                f"model='pretrained' on {env.name}, which brings no decoder: use Text-jrl with a model (--model "
                "FOLDER), or model='transformer'."
            )
        return dataclasses.replace(spec.decoder.config, **heads)
    return transformer.Config(
        vocab_size=spec.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        width=config.width,
        mlp_width=4 * config.width,
        max_length=spec.max_prompt + spec.max_new_tokens,
        **heads,
    )


def perceptron(
    env: Environment, hidden_sizes: tuple[int, ...], *, num_q: int = 0, dueling: bool = False
) -> Model:
    """Return multilayer perceptrons over the one-hot text: one for the logits, one for the value, one for each Q."""
    spec = token_step(env, "perceptron")
    if isinstance(env.observation, MaskedObservation):
        env = env._replace(observation=env.observation.obs)
    torso = _Torso(tuple(hidden_sizes))
    actor = networks.actor_critic(env, torso, features_first=True)
    critic = networks.q_network(env, torso, dueling=dueling, features_first=True)
    example = jnp.zeros(env.observation.shape, jnp.int32)

    def init(key: Key) -> Params:
        actor_key, *q_keys = jax.random.split(key, num_q + 1)
        return actor.init(actor_key, example, ()), tuple(critic.init(q_key, example, ()) for q_key in q_keys)

    def prefix(params: Params, tokens: Array) -> Output:
        (logits, value), _ = actor.apply(params[0], tokens, ())
        q = [critic.apply(each, tokens, ())[0] for each in params[1]]
        return Output(logits, value, jnp.stack(q, -2) if q else jnp.zeros((*value.shape, 0, spec.vocab_size)))

    return Model(init, prefix, _by_prefixes(prefix, spec.max_new_tokens))


def from_transformer(env: Environment, config: transformer.Config, params: Params | None = None) -> Model:
    """Return the decoder as a model; ``params``, where given, are what ``init`` returns (a pretrained model).

    Raises:
        ValueError: its vocabulary or its context is too small for the texts of ``env``.
    """
    spec = token_step(env, "transformer")
    longest, size = spec.max_prompt + spec.max_new_tokens, spec.vocab_size
    if config.vocab_size != size or config.max_length < longest:
        raise ValueError(
            f"model with vocab_size={config.vocab_size}, max_length={config.max_length} on {env.name}: its texts have "
            f"{size} tokens in the vocabulary and up to {longest} in a text; the vocabulary must be the same and the "
            "context at least as long."
        )
    steps = jnp.arange(spec.max_new_tokens + 1)

    def record(output: transformer.Output) -> Output:
        value = output.value if config.value_head else jnp.zeros(output.logits.shape[:-1])
        q = output.q if config.num_q_heads else jnp.zeros((*value.shape, 0, size))
        return Output(output.logits, value, q)

    def everywhere(params: Params, tokens: Array) -> Output:
        return record(transformer.forward(params, config, jnp.maximum(tokens, 0), tokens >= 0))

    def at(output: Output, places: Array) -> Output:
        return jax.tree.map(
            lambda leaf: jnp.take_along_axis(leaf, places.reshape(*places.shape, *[1] * (leaf.ndim - 2)), 1),
            output,
        )

    def prefix(params: Params, tokens: Array) -> Output:
        flat = tokens.reshape(-1, tokens.shape[-1])
        last = at(everywhere(params, flat), (text_length(flat) - 1)[:, None])
        return jax.tree.map(lambda leaf: leaf.reshape(*tokens.shape[:-1], *leaf.shape[2:]), last)

    def text(params: Params, tokens: Array, prompt_length: Array) -> Output:
        return at(
            everywhere(params, tokens), jnp.minimum(prompt_length[:, None] - 1 + steps, tokens.shape[1] - 1)
        )

    def start(params: Params, tokens: Array) -> Memory:
        cache = transformer.init_cache(config, tokens.shape[0], longest)
        prompt = jnp.maximum(tokens[:, : spec.max_prompt], 0)
        return transformer.prefill(params, config, prompt, text_length(tokens[:, : spec.max_prompt]), cache)[
            1
        ]

    def read(params: Params, tokens: Array, memory: Memory) -> tuple[Output, Memory]:
        # Reading the prompt's last token again writes what is there already.
        place = text_length(tokens) - 1
        token = jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0]
        output, memory = transformer.decode(params, config, token, place, memory)
        return record(output), memory

    def init(key: Key) -> Params:
        return transformer.init(key, config) if params is None else params

    return Model(init, prefix, text, start, read)


def table(env: Environment, *, num_q: int = 0, init_scale: float = 0.0) -> Model:
    """Return a table with a row for every prefix of the completion, for environments of one prompt.

    Raises:
        ValueError: several prompts, or more than 10^6 rows.
    """
    spec = token_step(env, "table")
    size, depth = spec.vocab_size, spec.max_new_tokens
    rows = sum(size**t for t in range(depth + 1))
    if len(spec.prompts.length) != 1 or rows > 10**6:
        raise ValueError(
            f"table of {env.name}: {len(spec.prompts.length)} prompts, {rows:,} prefixes: 1 and 10^6 at most."
        )
    prompt_length = int(spec.prompts.length[0])
    weights = jnp.array([size**t for t in range(depth)])
    first = jnp.cumsum(jnp.concatenate([jnp.zeros(1, int), weights]))

    def init(key: Key) -> Params:
        logits, value, q = (
            init_scale * jax.random.normal(k, (rows, *shape))
            for k, shape in zip(jax.random.split(key, 3), [(size,), (), (num_q, size)], strict=True)
        )
        return {"logits": logits, "value": value, "q": q}

    def prefix(params: Params, tokens: Array) -> Output:
        said, length = jnp.maximum(tokens[..., prompt_length:], 0), text_length(tokens) - prompt_length
        power = length[..., None] - 1 - jnp.arange(depth)
        place = jnp.where(power >= 0, said * weights[jnp.maximum(power, 0)], 0).sum(-1)
        return Output(**jax.tree.map(lambda leaf: leaf[first[length] + place], params))

    return Model(init, prefix, _by_prefixes(prefix, depth))


@dataclasses.dataclass(frozen=True)
class _Torso:
    hidden_sizes: tuple[int, ...]
    torso: str = "mlp"
    channels: tuple[int, ...] = (1,)
    activation: str = "relu"
    layer_norm: bool = False


def text_length(tokens: Array) -> Array:
    """Return how many tokens texts ``[..., L]`` have before the −1 behind their ends, ``[...]``."""
    return (tokens >= 0).sum(-1)


def prefixes(tokens: Array, prompt_length: Array, steps: int) -> Array:
    """Return the text so far after the prompt and 0 … ``steps`` more tokens: int32 ``[N, steps + 1, L]``."""
    length = prompt_length[:, None, None] + jnp.arange(steps + 1)[:, None]
    return jnp.where(jnp.arange(tokens.shape[1]) < length, tokens[:, None], -1)


def _by_prefixes(prefix: Callable[[Params, Array], Output], steps: int) -> Callable[..., Output]:
    return lambda params, tokens, prompt_length: prefix(params, prefixes(tokens, prompt_length, steps))


def tokens_of(obs: PyTree) -> tuple[Array, Array | None]:
    """Return the text of an observation, and its action mask or None."""
    return (obs.obs, obs.action_mask) if isinstance(obs, MaskedObservation) else (obs, None)


def next_token(logits: Array, mask: Array | None) -> ops.Categorical:
    """Return the distribution of the next token, ``[..., V]``, over those that ``mask`` allows."""
    return ops.Categorical(logits if mask is None else ops.masked(logits, mask))


def actor(model: Model, *, cache: bool) -> Callable[..., tuple[Array, Memory, tuple[Array, Array]]]:
    """Return ``(params, key, obs, memory) -> (token, memory, (log_prob, value))``, as a policy acts.

    With ``cache`` the memory is that of :attr:`Model.start`, and ``init_memory`` is
    :func:`jrl.rollout.keep_memory`; without, every prefix is read anew. Both draw the same tokens.
    """

    def act(
        params: Params, key: Key, obs: PyTree, memory: Memory
    ) -> tuple[Array, Memory, tuple[Array, Array]]:
        tokens, mask = tokens_of(obs)
        if cache:
            assert model.read is not None
            output, memory = model.read(params, tokens, memory)
        else:
            output = model.prefix(params, tokens)
        policy = next_token(output.logits, mask)
        action = policy.sample(key)
        return action, memory, (policy.log_prob(action), output.value)

    return act
