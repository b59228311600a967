"""One decoder for text: the shapes of GPT-2, Llama and Qwen are static choices of one :class:`Config`.

Pre-norm residual blocks, ``x ← x + attention(norm(x))``, ``x ← x + mlp(norm(x))`` (Vaswani et al., 2017,
https://arxiv.org/abs/1706.03762; Radford et al., 2019, "Language Models are Unsupervised Multitask Learners";
Touvron et al., 2023, https://arxiv.org/abs/2302.13971). Two forms of the same function: :func:`forward` over whole
texts, its layers stacked under one ``scan``, for training; :func:`prefill` and :func:`decode` with a key/value cache,
layers unrolled, for generating. Parameters are a plain pytree of arrays.

Shapes: ``N`` texts, ``L`` tokens, ``V`` vocabulary, ``D`` width, ``H`` query heads of size ``d``, ``K`` key/value
heads, ``P`` prompt, ``C`` columns of the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.types import Array, Key, Params, PyTree

_CHOICES = {
    "norm": ("rms", "layernorm"),
    "positions": ("rope", "learned"),
    "bias": ("none", "qkv", "all"),
    "mlp": ("swiglu", "gelu"),
}
_LARGEST = float(jnp.finfo(jnp.float32).max)
_SIZES = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "width", "mlp_width", "max_length")


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture. The defaults beyond the sizes are Llama's."""

    vocab_size: int
    """Tokens ``V``."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Query heads ``H``."""
    num_kv_heads: int = 4
    """Key and value heads ``K``, each shared by H / K query heads (Ainslie et al., 2023, arXiv:2305.13245)."""
    width: int = 128
    """Of the residual stream, ``D``."""
    mlp_width: int = 512
    """Of the hidden layer of each block's MLP."""
    max_length: int = 256
    """The longest text, prompt and continuation together: the context."""
    head_size: int = 0
    """Of each head, ``d``; 0 means width / num_heads."""
    norm: str = "rms"
    """rms (Zhang and Sennrich, 2019, arXiv:1910.07467) or layernorm (Ba et al., 2016, arXiv:1607.06450)."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    positions: str = "rope"
    """rope (Su et al., 2021, arXiv:2104.09864), or learned: a table of max_length rows."""
    rope_theta: float = 10_000.0
    """Base of the rotation's wavelengths."""
    bias: str = "none"
    """Biases: none, qkv (queries, keys and values: Qwen2), or all (every product: GPT-2)."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys (Qwen3; Henry et al., 2020, arXiv:2010.04245)."""
    mlp: str = "swiglu"
    """swiglu (Shazeer, 2020, arXiv:2002.05202), or gelu in the form with tanh (GPT-2's)."""
    tied_embeddings: bool = True
    """The logits' matrix is the embedding (Press and Wolf, 2017, arXiv:1608.05859)."""
    value_head: bool = False
    """A state value for every token: Output.value."""
    num_q_heads: int = 0
    """Action values for every token of the vocabulary, this many times (2 for double Q): Output.q."""
    dueling: bool = False
    """``Q = V + A − mean A`` in each Q head (Wang et al., 2016, arXiv:1511.06581)."""
    init_scale: float = 0.02
    """Standard deviation of the first weights; those that end a residual branch are smaller by √(2 num_layers)."""

    def __post_init__(self) -> None:
        for name in (*_SIZES, "head_size", "num_q_heads"):
            value, lowest = getattr(self, name), int(name in _SIZES)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: must be an integer.")
            if value < lowest:
                raise ValueError(f"{name}={value}: must be at least {lowest}.")
        for name in ("norm_eps", "rope_theta", "init_scale"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= _LARGEST:
                raise ValueError(f"{name}={value!r}: must be a number above 0 that float32 holds.")
            object.__setattr__(self, name, float(value))  # of an integer only 32 bits would count
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}.")
        if self.head_size == 0 and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}; change one, or set head_size."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: each key head is "
                "shared by the same number of query heads."
            )
        if self.positions == "rope" and self.d % 2:
            raise ValueError(f"head size {self.d} is odd: rope rotates pairs; use an even one.")
        if self.dueling and not self.num_q_heads:
            raise ValueError("dueling=True without a Q head: set num_q_heads to 1 or more.")

    @property
    def d(self) -> int:
        """Size of a head."""
        return self.head_size or self.width // self.num_heads


class Output(NamedTuple):
    """What the decoder says of each token; ``...`` is ``[N, L]``, or ``[N]`` from the cached forms.

    Attributes:
        logits: ``[..., V]``, of the next token.
        hidden: ``[..., D]``, the normalised last layer, which all heads read.
        value: ``[...]``, or ``()`` without ``value_head``.
        q: ``[..., num_q_heads, V]``, or ``()`` without Q heads.
    """

    logits: Array
    hidden: Array
    value: Any
    q: Any


class Cache(NamedTuple):
    """Keys and values of the tokens so far: a policy's memory.

    Attributes:
        keys: one array ``[N, K, d, C]`` for each layer, rotated where there is ``rope``. Columns come last: with few
            small heads they are the long axis, along which a CPU computes.
        values: likewise.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


# -------------------------------------------------------------------------------------------- parameters


def init(key: Key, config: Config) -> Params:
    """Return the first parameters, float32, those of the layers stacked on a leading axis.

    Normal weights of standard deviation ``init_scale``, zero biases, unit gains; value and Q heads start at zero.
    """
    layer_key, embedding_key, position_key, output_key = jax.random.split(key, 4)
    scale, D = config.init_scale, config.width
    params: dict[str, PyTree] = {
        "embedding": scale * jax.random.normal(embedding_key, (config.vocab_size, D)),
        "layers": jax.vmap(lambda key: _init_layer(key, config))(
            jax.random.split(layer_key, config.num_layers)
        ),
        "norm": _init_norm(config, D),
    }
    if config.positions == "learned":
        params["positions"] = scale * jax.random.normal(position_key, (config.max_length, D))
    if not config.tied_embeddings:
        params["unembedding"] = scale * jax.random.normal(output_key, (D, config.vocab_size))
    return _float32(params) | init_heads(config)


def init_heads(config: Config) -> Params:
    """Return parameters of value and Q heads, all zero; ``params | init_heads(config)`` adds them to a model."""
    D, V, Q = config.width, config.vocab_size, config.num_q_heads
    heads = {}
    if config.value_head:
        heads["value"] = {"kernel": jnp.zeros((D,)), "bias": jnp.zeros(())}
    if Q:
        heads["q"] = {"kernel": jnp.zeros((Q, D, V)), "bias": jnp.zeros((Q, V))}
    if config.dueling:
        heads["q_value"] = {"kernel": jnp.zeros((Q, D)), "bias": jnp.zeros((Q,))}
    return _float32(heads)


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def _init_layer(key: Key, config: Config) -> Params:
    keys = jax.random.split(key, 4)
    D, d, H, K, F = config.width, config.d, config.num_heads, config.num_kv_heads, config.mlp_width
    out_scale = config.init_scale / (2 * config.num_layers) ** 0.5

    def linear(key: Key, inputs: int, outputs: int, scale: float, bias: bool) -> Params:
        kernel = {"kernel": scale * jax.random.normal(key, (inputs, outputs))}
        return kernel | ({"bias": jnp.zeros((outputs,))} if bias else {})

    everywhere = config.bias == "all"
    gates = 2 if config.mlp == "swiglu" else 1
    layer = {
        "attention_norm": _init_norm(config, D),
        "qkv": linear(keys[0], D, (H + 2 * K) * d, config.init_scale, config.bias != "none"),
        "attention_out": linear(keys[1], H * d, D, out_scale, everywhere),
        "mlp_norm": _init_norm(config, D),
        "mlp_in": linear(keys[2], D, gates * F, config.init_scale, everywhere),
        "mlp_out": linear(keys[3], F, D, out_scale, everywhere),
    }
    if config.qk_norm:
        layer |= {"q_norm": {"gain": jnp.ones((d,))}, "k_norm": {"gain": jnp.ones((d,))}}
    return layer


def _init_norm(config: Config, size: int) -> Params:
    gain = {"gain": jnp.ones((size,))}
    return gain | ({"bias": jnp.zeros((size,))} if config.norm == "layernorm" else {})


def num_params(params: Params) -> int:
    """Return how many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: Config, length: int) -> float:
    """Return the operations of the matrix products that one token takes forward; training takes three times as many.

    ``2 · weights + 4 · layers · H · d · length``, every token attending to ``length`` others, as utilisation is usually
    counted (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, appendix B).
    """
    D, d, H, K, F = config.width, config.d, config.num_heads, config.num_kv_heads, config.mlp_width
    gates = 2 if config.mlp == "swiglu" else 1
    layer = D * (H + 2 * K) * d + H * d * D + D * gates * F + F * D
    products = config.num_layers * layer + D * config.vocab_size * (1 + config.num_q_heads)
    return 2.0 * products + 4.0 * config.num_layers * H * d * length


# -------------------------------------------------------------------------------------------- whole texts


def forward(params: Params, config: Config, tokens: Array, valid: Array | None = None) -> Output:
    """Return what the decoder says after each token of whole texts.

    Args:
        params: from :func:`init`.
        config: static.
        tokens: int ``[N, L]``.
        valid: bool ``[N, L]``, False where padding is, on either side; None: all are tokens. Padding is not looked at
            and does not count as a position; what is returned there means nothing.

    Returns:
        :class:`Output` over ``[N, L]``.

    Raises:
        ValueError: ``L`` exceeds ``max_length``.
    """
    x, _ = _run(params, config, tokens, valid, keep=False)
    return _read_out(params, config, x)


def log_probs(params: Params, config: Config, tokens: Array) -> Array:
    """Return ``log p(x_t | x_<t)`` of each token of one text, nats; 0 for the first, before which there is nothing.

    Args:
        params: from :func:`init`.
        config: static.
        tokens: int ``[L]``.

    Returns:
        float32 ``[L]``.

    Raises:
        ValueError: ``L`` exceeds ``max_length``.
    """
    logits = forward(params, config, tokens[None]).logits[0, :-1]
    said = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)[:, 0]
    return jnp.concatenate([jnp.zeros(1, said.dtype), said])


def _run(
    params: Params, config: Config, tokens: Array, valid: Array | None, keep: bool
) -> tuple[Array, tuple[Array, Array]]:
    """Return the last layer ``[N, L, D]`` and, with ``keep``, keys and values ``[num_layers, N, L, K, d]``."""
    length = tokens.shape[-1]
    check_length(config, length)
    before = jnp.tril(jnp.ones((length, length), bool))
    if valid is None:
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        visible = before[None]
    else:
        positions = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
        visible = before[None] & valid[:, None, :]
    rotation = _rotation(config, positions)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        scores = jnp.einsum("nqkgd,nckd->nkgqc", q, k) * config.d**-0.5
        weights = jax.nn.softmax(_hide(scores, visible[:, None, None]), axis=-1)
        return jnp.einsum("nkgqc,nckd->nqkgd", weights, v), (k, v) if keep else ()

    def layer(x: Array, layer_params: Params) -> tuple[Array, Any]:
        return _block(layer_params, config, x, rotation, attend)

    return jax.lax.scan(layer, _embed(params, config, tokens, positions), params["layers"])


def check_length(config: Config, length: int) -> None:
    """Raise ValueError unless a text of ``length`` tokens fits the context."""
    if not 1 <= length <= config.max_length:
        raise ValueError(
            f"a text of {length} tokens: the context holds 1 to max_length={config.max_length}; cut it, or use a "
            "model with a larger max_length."
        )


# ------------------------------------------------------------------------------------------ with the cache


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """Return an empty cache for ``batch`` texts of at most ``length`` tokens.

    Raises:
        ValueError: ``length`` exceeds ``max_length``.
    """
    check_length(config, length)
    shape = (batch, config.num_kv_heads, config.d, length)
    empty = tuple(jnp.zeros(shape, jnp.float32) for _ in range(config.num_layers))
    return Cache(empty, tuple(jnp.zeros_like(leaf) for leaf in empty))


def prefill(
    params: Params, config: Config, tokens: Array, lengths: Array, cache: Cache
) -> tuple[Output, Cache]:
    """Read prompts into the first ``P`` columns of a cache, all at once.

    Args:
        params: from :func:`init`.
        config: static.
        tokens: int ``[N, P]``, padded on the right.
        lengths: int ``[N]``, tokens of each prompt, at least 1.
        cache: of ``N`` texts and at least ``P`` columns.

    Returns:
        The output at each prompt's last token ``[N]``, and the cache; :func:`decode` goes on at ``position=lengths``.

    Raises:
        ValueError: the prompts are longer than the cache or the context.
    """
    columns = cache.keys[0].shape[-1]
    if tokens.shape[1] > columns:
        raise ValueError(
            f"prompts of {tokens.shape[1]} tokens: the cache has {columns} columns; make a longer one."
        )
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    x, kept = _run(params, config, tokens, valid, keep=True)

    def put(old: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
        new = jnp.moveaxis(new, 2, -1)  # [layers, N, K, d, P]
        return tuple(leaf.at[..., : new.shape[-1]].set(new[i]) for i, leaf in enumerate(old))

    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _read_out(params, config, last), Cache(put(cache.keys, kept[0]), put(cache.values, kept[1]))


def decode(
    params: Params, config: Config, token: Array, position: Array, cache: Cache
) -> tuple[Output, Cache]:
    """Read one more token of each text.

    Args:
        params: from :func:`init`.
        config: static.
        token: int ``[N]``.
        position: int ``[N]``, its place in its text, 0 for the first, and its column in the cache. Later columns are
            not looked at: a text that starts anew at 0 needs no empty cache. Beyond the last column it is not kept.
        cache: of the tokens before.

    Returns:
        The output ``[N]`` after this token, and the cache with it.
    """
    rows, columns = jnp.arange(token.shape[0]), cache.keys[0].shape[-1]
    visible = (jnp.arange(columns) <= position[:, None])[:, None, None]
    rotation = _rotation(config, position)
    x = _embed(params, config, token, position)
    keys, values = list(cache.keys), list(cache.values)
    for i in range(config.num_layers):

        def attend(q: Array, k: Array, v: Array, i: int = i) -> tuple[Array, Any]:
            # Sums of products along the columns: on a CPU faster than many small matrix products.
            keys[i] = keys[i].at[rows, :, :, position].set(k, mode="drop")
            values[i] = values[i].at[rows, :, :, position].set(v, mode="drop")
            scores = (q[..., None] * keys[i][:, :, None]).sum(3) * config.d**-0.5  # [N, K, G, C]
            weights = jax.nn.softmax(_hide(scores, visible), axis=-1)
            return (weights[:, :, :, None] * values[i][:, :, None]).sum(-1), ()

        layer = jax.tree.map(lambda leaf: leaf[i], params["layers"])  # noqa: B023
        x, _ = _block(layer, config, x, rotation, attend)
    return _read_out(params, config, x), Cache(tuple(keys), tuple(values))


# -------------------------------------------------------------------------------------------------- parts


def _block(
    layer: Params, config: Config, x: Array, rotation: Any, attend: Callable[..., tuple[Array, Any]]
) -> tuple[Array, Any]:
    """One layer on ``[..., D]``; ``attend(q [..., K, G, d], k [..., K, d], v) -> (like q, what to keep)``."""
    d, H, K = config.d, config.num_heads, config.num_kv_heads
    qkv = _linear(layer["qkv"], _norm(layer["attention_norm"], config, x))
    qkv = qkv.reshape(*x.shape[:-1], H + 2 * K, d)
    q, k, v = qkv[..., :H, :], qkv[..., H : H + K, :], qkv[..., H + K :, :]
    if config.qk_norm:
        q = _rms(q, config.norm_eps) * layer["q_norm"]["gain"]
        k = _rms(k, config.norm_eps) * layer["k_norm"]["gain"]
    if rotation is not None:
        q, k = _rotate(q, rotation), _rotate(k, rotation)
    attended, kept = attend(q.reshape(*x.shape[:-1], K, H // K, d), k, v)
    x = x + _linear(layer["attention_out"], attended.reshape(*x.shape[:-1], H * d))
    hidden = _linear(layer["mlp_in"], _norm(layer["mlp_norm"], config, x))
    if config.mlp == "swiglu":
        gate, up = jnp.split(hidden, 2, axis=-1)
        hidden = jax.nn.silu(gate) * up
    else:
        hidden = jax.nn.gelu(hidden, approximate=True)
    return x + _linear(layer["mlp_out"], hidden), kept


def _embed(params: Params, config: Config, tokens: Array, positions: Array) -> Array:
    x = params["embedding"][tokens]
    return x + params["positions"][positions] if config.positions == "learned" else x


def _read_out(params: Params, config: Config, x: Array) -> Output:
    hidden = _norm(params["norm"], config, x)
    logits = hidden @ (params["embedding"].T if config.tied_embeddings else params["unembedding"])
    value: Any = ()
    if config.value_head:
        value = hidden @ params["value"]["kernel"] + params["value"]["bias"]
    q: Any = ()
    if config.num_q_heads:
        q = jnp.einsum("...d,qdv->...qv", hidden, params["q"]["kernel"]) + params["q"]["bias"]
    if config.dueling:
        state_value = (
            jnp.einsum("...d,qd->...q", hidden, params["q_value"]["kernel"]) + params["q_value"]["bias"]
        )
        q = state_value[..., None] + q - q.mean(-1, keepdims=True)
    return Output(logits, hidden, value, q)


def _linear(layer: Params, x: Array) -> Array:
    y = x @ layer["kernel"]
    return y + layer["bias"] if "bias" in layer else y


def _norm(layer: Params, config: Config, x: Array) -> Array:
    if config.norm == "rms":
        return _rms(x, config.norm_eps) * layer["gain"]
    return _rms(x - x.mean(-1, keepdims=True), config.norm_eps) * layer["gain"] + layer["bias"]


def _rms(x: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _rotation(config: Config, positions: Array) -> tuple[Array, Array] | None:
    """Return cosines and sines ``[..., 1, d/2]`` of the angles ``position · theta^(−2i/d)``."""
    if config.positions != "rope":
        return None
    frequency = config.rope_theta ** (-jnp.arange(0, config.d, 2, jnp.float32) / config.d)
    angle = positions[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate the pairs ``(x_i, x_{i + d/2})``, as Llama's and Qwen's folders store them."""
    cos, sin = rotation
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _hide(scores: Array, visible: Array) -> Array:
    # Finite, so that a row that sees nothing (padding) is uniform and not nan.
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
