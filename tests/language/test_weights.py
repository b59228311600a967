"""Weights: round trips in each layout, stories260K against its documentation and NumPy, damaged and hostile files."""

import dataclasses
import json
import struct

import bundle
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_tokenizers import GREEDY

from jrl.language import generation, safetensors, tokenizers, weights
from jrl.language.generation import Settings
from jrl.networks import transformer

SIZES = {
    "vocab_size": 7,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "width": 4,
    "mlp_width": 6,
    "max_length": 5,
}
LLAMA = transformer.Config(**SIZES)
KINDS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, bias="qkv", tied_embeddings=False, rope_theta=1e6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_size=6, norm_eps=1e-6),
    "gpt2": dataclasses.replace(
        LLAMA, norm="layernorm", positions="learned", bias="all", mlp="gelu", num_kv_heads=2
    ),
}


def params_of(config):
    """Parameters that are all different: each must end where it came from."""
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_written_is_the_folder_read(kind, tmp_path):
    config, params = KINDS[kind], params_of(KINDS[kind])
    weights.write_folder(tmp_path, params, config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    again, config_again = weights.read(tmp_path)
    assert_equal(again, params)
    # What a file always says: the head's size, and that first weights are no matter any more.
    assert dataclasses.replace(config_again, head_size=config.d) == dataclasses.replace(
        config, head_size=config.d
    )
    # The names are those of Hugging Face, their matrices (out, in) but for GPT-2's.
    tensors = safetensors.read(tmp_path / "model.safetensors")
    if kind == "gpt2":
        np.testing.assert_array_equal(tensors["h.1.attn.c_attn.weight"], params["layers"]["qkv"]["kernel"][1])
        np.testing.assert_array_equal(tensors["h.0.mlp.c_proj.bias"], params["layers"]["mlp_out"]["bias"][0])
        assert "lm_head.weight" not in tensors
    else:
        qkv, gate_up = (params["layers"][name]["kernel"][1] for name in ("qkv", "mlp_in"))
        k = qkv[:, 2 * config.d : 3 * config.d].T
        np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], k)
        np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"], gate_up[:, 6:].T)
        assert ("lm_head.weight" in tensors) == (kind == "qwen2")


def test_shards_half_precision_and_a_prefix_are_read(tmp_path):
    config, params = KINDS["gpt2"], params_of(KINDS["gpt2"])
    weights.write_folder(tmp_path, params, config, dtype=ml_dtypes.bfloat16)
    tensors = safetensors.read(tmp_path / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    tensors = {f"transformer.{name}": array for name, array in tensors.items()}
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 5, 5), bool)  # the causal mask, kept in old files
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        safetensors.write(tmp_path / file, {name: tensors[name] for name in names if where[name] == file})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    again, _ = weights.read_folder(tmp_path)
    assert_equal(again, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "a.safetensors", "x": "x/b.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"'x/b\.safetensors', which is no plain file name"):
        weights.read_folder(tmp_path)


def test_safetensors_of_every_dtype(tmp_path):
    arrays = {
        name: np.arange(6).reshape(2, 3).astype(dtype)
        for name, dtype in [
            ("a", "f8"),
            ("b", "f4"),
            ("c", "f2"),
            ("d", ml_dtypes.bfloat16),
            ("e", "i8"),
            ("f", "u1"),
        ]
    }
    arrays |= {"scalar": np.float32(3), "empty": np.zeros((0, 4), np.int32), "flag": np.array([True, False])}
    safetensors.write(tmp_path / "x.safetensors", arrays, {"note": "é"})
    again = safetensors.read(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(ValueError, match="x has dtype complex64"):
        safetensors.write(tmp_path / "y.safetensors", {"x": np.zeros(1, np.complex64)})
    assert not (tmp_path / "y.safetensors").exists()


def test_equals_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int64)}
    package.save_file(arrays, tmp_path / "theirs.safetensors")
    safetensors.write(tmp_path / "ours.safetensors", arrays)
    for theirs, ours in ((safetensors.read(tmp_path / "theirs.safetensors"), arrays),
                         (package.load_file(tmp_path / "ours.safetensors"), arrays)):  # fmt: skip
        assert_equal(theirs, ours)


def encoded(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\0\0\0", "it has 3 bytes, and the length of the header alone takes 8"),
        (encoded({}, length=2**63), "its header is said to have 9223372036854775808 bytes, the file has 10"),
        (encoded(b"[1]"), "its header is no JSON object"),
        (encoded(b"{nonsense}"), "no intact safetensors file"),
        (encoded(b"[" * 100_000), "no intact safetensors file"),
        (encoded(b'{"a": {}, "a": {}}'), "its header has a name twice"),
        (encoded({"a": 3}), "not described by dtype, shape and data_offsets"),
        (encoded({"a": entry(dtype="F4")}, bytes(8)), "has dtype 'F4', known are F64"),
        (encoded({"a": entry(dtype=["F32"])}, bytes(8)), "has dtype"),
        (encoded({"a": entry(offsets=(0, 16))}, bytes(8)), "lies at 0 to 16, the file has 8 bytes of data"),
        (encoded({"a": entry(offsets=(8, 0))}, bytes(8)), "lies at 8 to 0"),
        (encoded({"a": entry(offsets=(-8, 0))}, bytes(8)), "must be a list of integers from 0 on"),
        (encoded({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4)), "must be a list of integers"),
        (encoded({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "of shape .* takes 48357032784585166988247"),
        (encoded({"a": entry(shape=(1,) * 40, offsets=(0, 4))}, bytes(4)), "has 40 axes"),
        (encoded({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b' overlaps 'a'"),
        (encoded({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "'b' leaves a gap after 'a'"),
        (encoded({"a": entry()}, bytes(12)), "4 bytes follow its last tensor"),
        (encoded({"a": entry(dtype="BOOL", offsets=(0, 2))}, b"\1\2"), "bytes that are neither 0 nor 1"),
    ],
)  # fmt: skip
def test_hostile_safetensors_are_refused(data, text, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=text):
        safetensors.read(tmp_path / "x.safetensors")


def test_damaged_files_are_errors_and_nothing_else(tmp_path):
    weights.write_folder(tmp_path, params_of(LLAMA), LLAMA)
    (tmp_path / "x.bin").write_bytes(llama2c(LLAMA))
    rng = np.random.default_rng(0)
    names = ("model.safetensors", "config.json", "x.bin")
    intact = {name: (tmp_path / name).read_bytes() for name in names}
    weights.read(tmp_path / "x.bin")
    refused = 0
    for i in range(300):
        name = names[i % 3]
        data = bytearray(intact[name])
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        reach = {"x.bin": 28, "config.json": len(data)}.get(name, 1500)  # where the structure is
        for _ in range(rng.integers(1, 4)):
            if data:
                data[rng.integers(min(len(data), reach))] = rng.choice(
                    [0, 1, 34, 44, 45, 49, 57, 91, 125, 127, 255]
                )
        (tmp_path / name).write_bytes(data)
        try:
            weights.read(tmp_path / "x.bin" if name == "x.bin" else tmp_path)
        except ValueError:
            refused += 1
        (tmp_path / name).write_bytes(intact[name])
    assert refused > 200, "the damage was hardly noticed: the test does not test"


def llama2c(config):
    V, D, F, L, T = config.vocab_size, config.width, config.mlp_width, config.num_layers, config.max_length
    H, K, d = config.num_heads, config.num_kv_heads, config.d
    floats = V * D + L * D * (2 + 2 * H * d + 2 * K * d + 3 * F) + D + T * d
    return struct.pack("<7i", D, F, L, H, K, V, T) + np.zeros(floats, "<f4").tobytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "is no model folder: it has no config.json"),
        ({"model_type": "bert"}, "model_type 'bert' is not known; jrl reads gpt2, llama"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rotations scaled as 'llama3' are not known"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not known"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=2"),
        ({"hidden_size": "4"}, "width='4': must be an integer"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'model\.layers\.2\.self_attn"),
        ({"num_hidden_layers": 1}, "has tensors that a llama of its config.json has not: model.layers.1"),
        ({"rope_theta": 10**400}, "rope_theta=10{400}: must be a number above 0 that float32 holds"),
        ({"rms_norm_eps": "small"}, "norm_eps='small': must be a number above 0"),
        ({"intermediate_size": 10**15}, r"the configuration says float \[1000000000000000, 4\]"),
    ],
)
def test_folders_that_do_not_fit_are_refused(change, text, tmp_path):
    if change:
        weights.write_folder(tmp_path, params_of(LLAMA), LLAMA)
        record = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=text):
        weights.read(tmp_path)


def test_an_architecture_of_our_own_has_no_folder(tmp_path):
    config = dataclasses.replace(LLAMA, mlp="gelu")
    with pytest.raises(ValueError, match="no GPT-2, Llama or Qwen has this architecture"):
        weights.write_folder(tmp_path, params_of(config), config)


# ------------------------------------------------------------------------------------------ stories260K


@pytest.fixture(scope="module")
def stories():
    params, config = weights.read(bundle.path("stories260K/stories260K.bin"))
    return params, config, tokenizers.read(bundle.path("stories260K/tok512.bin"))


def test_stories260k_says_what_is_documented(stories):
    params, config, tokenizer = stories
    assert transformer.num_params(params) == 260_032
    settings = Settings(max_new_tokens=117, greedy=True)
    said = jax.jit(
        lambda params: generation.generate(
            jax.random.key(0), params, config, jnp.array([[1]]), jnp.array([1]), settings
        )
    )(params)
    expected = bundle.path("stories260K/expected_greedy.txt").read_text(encoding="utf-8").removesuffix("\n")
    assert said.tokens[0].tolist() == GREEDY
    assert tokenizer.decode(said.tokens[0].tolist()) == expected
    first = [
        -0.24374,
        -0.01751,
        -0.01211,
        -0.00072,
        -0.03170,
        -0.06842,
        -0.01595,
        -0.00078,
        -0.49398,
        -0.44587,
    ]
    np.testing.assert_allclose(said.log_prob[0, :10], first, atol=1e-5)
    np.testing.assert_allclose(said.log_prob.sum(), -55.3860, atol=1e-3)


def test_stories260k_has_the_perplexity_that_numpy_computes(stories):
    params, config, tokenizer = stories
    text = bundle.path("shakespeare/input.txt").read_text(encoding="utf-8")[:400]
    tokens = np.array([1, *tokenizer.encode(text)])
    logits = jax.jit(lambda params, tokens: transformer.forward(params, config, tokens).logits)(
        params, tokens[None]
    )[0]
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:-1])), tokens[1:, None], 1)
    ours = np.exp(-log_p.mean())
    theirs = numpy_perplexity(bundle.path("stories260K/stories260K.bin"), tokens)
    assert abs(ours / theirs - 1) < 1e-4, (ours, theirs)


def numpy_perplexity(path, tokens):
    """From the file itself, in float64, neighbours rotated, as its README says."""
    data = path.read_bytes()
    D, F, L, H, K, V, _ = np.frombuffer(data, "<i4", 7).tolist()
    flat, d = np.frombuffer(data, "<f4", offset=28).astype(np.float64), D // H
    shapes = [
        (V, D),
        (L, D),
        (L, D, D),
        (L, K * d, D),
        (L, K * d, D),
        (L, D, D),
        (L, D),
        (L, F, D),
        (L, D, F),
        (L, F, D),
    ]
    w, at = [], 0
    for shape in [*shapes, (D,)]:
        w.append(flat[at : at + int(np.prod(shape))].reshape(shape))
        at += int(np.prod(shape))
    n = len(tokens)
    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)

    def rms(x, gain):
        return x * gain / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def rotate(x):
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)

    x = w[0][tokens]
    for i in range(L):
        h = rms(x, w[1][i])
        q, k, v = ((h @ w[j][i].T).reshape(n, heads, d) for j, heads in ((2, H), (3, K), (4, K)))
        q, k = rotate(q), rotate(k)
        out = np.zeros((n, H, d))
        for head in range(H):
            scores = q[:, head] @ k[:, head // (H // K)].T / np.sqrt(d)
            scores[np.triu_indices(n, 1)] = -np.inf
            p = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = p / p.sum(1, keepdims=True) @ v[:, head // (H // K)]
        x = x + out.reshape(n, D) @ w[5][i].T
        h = rms(x, w[6][i])
        gate = h @ w[7][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[9][i].T)) @ w[8][i].T
    logits = rms(x, w[10]) @ w[0].T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(-log_p[np.arange(n - 1), tokens[1:]].mean())
