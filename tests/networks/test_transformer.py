"""The decoder: cache against whole texts, each static choice against a slow NumPy version, padding, heads, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.networks import transformer

SIZES = {"vocab_size": 11, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "width": 16, "mlp_width": 24}
CONFIGS = {
    "llama": transformer.Config(**SIZES | {"num_kv_heads": 2}, max_length=12, init_scale=0.3),
    "gpt2": transformer.Config(
        **SIZES, max_length=12, norm="layernorm", positions="learned", bias="all", mlp="gelu", init_scale=0.3
    ),
    "qwen": transformer.Config(
        **SIZES | {"num_kv_heads": 1, "head_size": 6},
        max_length=12,
        bias="qkv",
        qk_norm=True,
        tied_embeddings=False,
        value_head=True,
        num_q_heads=2,
        dueling=True,
        rope_theta=500.0,
        init_scale=0.3,
    ),
}
LENGTHS = np.array([5, 2, 3])  # of the prompts; the texts are of 9 tokens


class Computed:
    """One decoder run over the same texts in each of its forms."""

    def __init__(self, config):
        self.config = config
        self.decode = jax.jit(lambda *args: transformer.decode(args[0], config, *args[1:]))

        @jax.jit
        def compute():
            params = perturbed(transformer.init(jax.random.key(0), config))
            tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, config.vocab_size)
            full = transformer.forward(params, config, tokens)
            # The prompts' padding is filled with rubbish that must not be looked at.
            prompts = jnp.where(jnp.arange(5) >= LENGTHS[:, None], 7, tokens[:, :5])
            cache = transformer.init_cache(config, 3, 9)
            return params, tokens, full, transformer.prefill(params, config, prompts, LENGTHS, cache)

        self.params, tokens, self.full, (self.prefilled, self.cache) = compute()
        self.tokens = np.asarray(tokens)


def perturbed(params):
    """Move every parameter away from zero and one, so that each of them counts."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def computed(name):
    return Computed(CONFIGS[name])


@pytest.fixture(params=CONFIGS)
def case(request):
    return computed(request.param)


def assert_outputs(cached, full, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), cached, full)


def test_cache_and_whole_texts_agree(case):
    rows = np.arange(3)
    assert_outputs(case.prefilled, jax.tree.map(lambda x: x[rows, LENGTHS - 1], case.full))
    cache = case.cache
    for step in range(4):  # the texts go on from where each one's prompt ends
        position = LENGTHS + step
        output, cache = case.decode(case.params, case.tokens[rows, position], position, cache)
        assert_outputs(output, jax.tree.map(lambda x: x[rows, position], case.full))  # noqa: B023


def test_a_text_that_starts_anew_needs_no_empty_cache(case):
    used = case.decode(case.params, case.tokens[:, 8], np.full(3, 8), case.cache)[1]
    output, cache = case.decode(case.params, case.tokens[:, 0], np.zeros(3, int), used)
    assert_outputs(output, jax.tree.map(lambda x: x[:, 0], case.full))
    # Beyond the last column nothing is kept, and nothing else is harmed.
    after = case.decode(case.params, case.tokens[:, 1], np.full(3, 9), cache)[1]
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_padding_on_either_side_changes_nothing(case):
    config = case.config
    forward = jax.jit(lambda params, tokens, valid: transformer.forward(params, config, tokens, valid))
    text = case.tokens[:, :6]
    for left, right in ((3, 0), (0, 3)):
        padded = np.pad(text, ((0, 0), (left, right)), constant_values=4)
        valid = np.pad(np.ones_like(text, bool), ((0, 0), (left, right)))
        output = forward(case.params, padded, valid)
        assert_outputs(
            jax.tree.map(lambda x: x[:, left : left + 6], output),  # noqa: B023
            jax.tree.map(lambda x: x[:, :6], case.full),
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


def test_forward_equals_a_slow_version_in_float64(case):
    assert_outputs(case.full, slow_forward(case.params, case.config, case.tokens), tolerance=2e-5)


def slow_forward(params, config, tokens):
    """One text, one token, one head at a time, from the equations."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    d, H, K, D = config.d, config.num_heads, config.num_kv_heads, config.width

    def norm(q, x):
        if config.norm == "rms":
            return x / np.sqrt((x**2).mean() + config.norm_eps) * q["gain"]
        return (x - x.mean()) / np.sqrt(x.var() + config.norm_eps) * q["gain"] + q["bias"]

    def linear(q, x):
        return x @ q["kernel"] + q.get("bias", 0)

    def rotate(x, position):
        if config.positions != "rope":
            return x
        out = np.empty_like(x)
        for i in range(d // 2):
            angle = position * config.rope_theta ** (-2 * i / d)
            a, b = x[i], x[i + d // 2]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + d // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def head_norm(q, x):
        return x / np.sqrt((x**2).mean() + config.norm_eps) * q["gain"] if config.qk_norm else x

    hidden = np.zeros((*tokens.shape, D))
    for n, text in enumerate(tokens):
        x = [
            p["embedding"][t] + (p["positions"][i] if config.positions == "learned" else 0)
            for i, t in enumerate(text)
        ]
        for index in range(config.num_layers):
            layer = jax.tree.map(lambda leaf: leaf[index], p["layers"])  # noqa: B023
            heads = [linear(layer["qkv"], norm(layer["attention_norm"], t)).reshape(-1, d) for t in x]
            out = []
            for i in range(len(text)):
                mixed = []
                for h in range(H):
                    q = rotate(head_norm(layer.get("q_norm"), heads[i][h]), i)
                    kv = h // (H // K)
                    ks = [rotate(head_norm(layer.get("k_norm"), heads[j][H + kv]), j) for j in range(i + 1)]
                    score = np.array([q @ k / np.sqrt(d) for k in ks])
                    weight = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
                    mixed.append(sum(w * heads[j][H + K + kv] for j, w in enumerate(weight)))
                y = x[i] + linear(layer["attention_out"], np.concatenate(mixed))
                inner = linear(layer["mlp_in"], norm(layer["mlp_norm"], y))
                if config.mlp == "swiglu":
                    gate, up = np.split(inner, 2)
                    inner = gate / (1 + np.exp(-gate)) * up
                else:
                    inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
                out.append(y + linear(layer["mlp_out"], inner))
            x = out
        hidden[n] = [norm(p["norm"], t) for t in x]
    logits = hidden @ (p["embedding"].T if config.tied_embeddings else p["unembedding"])
    value = linear(p["value"], hidden) if config.value_head else ()
    q = ()
    if config.num_q_heads:
        advantage = np.stack([hidden @ k for k in p["q"]["kernel"]], axis=-2) + p["q"]["bias"]
        base = np.stack([hidden @ k for k in p["q_value"]["kernel"]], axis=-1) + p["q_value"]["bias"]
        q = base[..., None] + advantage - advantage.mean(-1, keepdims=True)
    return transformer.Output(logits, hidden, value, q)


def test_heads_added_to_a_model_leave_its_logits_and_start_at_zero():
    plain = CONFIGS["llama"]
    config = transformer.Config(**SIZES | {"num_kv_heads": 2}, max_length=12, value_head=True, num_q_heads=1)
    model = computed("llama")
    output = jax.jit(lambda params, tokens: transformer.forward(params, config, tokens))(
        model.params | transformer.init_heads(config), model.tokens
    )
    assert dataclasses.replace(config, value_head=False, num_q_heads=0, init_scale=0.3) == plain
    assert_outputs(output.logits, model.full.logits)
    assert (output.value.shape, output.q.shape) == ((3, 9), (3, 9, 1, 11))
    assert not output.value.any()
    assert not output.q.any()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"norm": "batch"}, ValueError, "norm='batch': must be one of rms, layernorm"),
        ({"num_heads": 3}, ValueError, "num_heads=3 does not divide width=16"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_size": 5}, ValueError, "head size 5 is odd"),
        ({"dueling": True}, ValueError, "dueling=True without a Q head"),
        ({"width": 0}, ValueError, "width=0: must be at least 1"),
        ({"width": 16.0}, TypeError, "width=16.0: must be an integer"),
        ({"rope_theta": 1e39}, ValueError, "rope_theta=1e\\+39: must be a number above 0 that float32 holds"),
        ({"norm_eps": 0}, ValueError, "norm_eps=0: must be a number above 0"),
    ],
)
def test_impossible_configs_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        transformer.Config(**SIZES | change)


def test_a_whole_number_is_a_real_one_also_beyond_32_bits(case):
    big, real = (dataclasses.replace(case.config, rope_theta=theta) for theta in (10**12, 1e12))
    output = transformer.forward(case.params, big, case.tokens)
    assert_outputs(output, transformer.forward(case.params, real, case.tokens))


def test_texts_longer_than_the_context_or_the_cache_are_refused():
    config = CONFIGS["llama"]
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    with pytest.raises(ValueError, match="a text of 13 tokens: the context holds 1 to max_length=12"):
        jax.eval_shape(lambda p: transformer.forward(p, config, jnp.zeros((1, 13), int)), params)
    with pytest.raises(ValueError, match="a text of 13 tokens"):
        transformer.init_cache(config, 1, 13)
    with pytest.raises(ValueError, match="prompts of 5 tokens: the cache has 4 columns"):
        transformer.prefill(
            params, config, jnp.zeros((1, 5), int), jnp.ones(1), transformer.init_cache(config, 1, 4)
        )
