"""Weights in and out: safetensors, folders as Hugging Face lays them out (GPT-2, Llama, Qwen), llama2.c's ``.bin``.

Files are other people's: every number in one is checked against the file before it is used, what is malformed raises
ValueError, and nothing is read beyond the end or executed. Pickles (``pytorch_model.bin``) are not read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.language import safetensors
from jrl.networks.transformer import Config
from jrl.records import replacing
from jrl.types import Params

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


# --------------------------------------------------------------------------------- folders of Hugging Face


def read_folder(folder: str | Path) -> tuple[Params, Config]:
    """Read ``config.json`` and ``model.safetensors`` (or its shards) of a GPT-2, Llama, Qwen2 or Qwen3.

    Returns:
        Parameters in float32, and the architecture.

    Raises:
        ValueError: a file is missing or malformed, the architecture is none of these, has what jrl's decoder has not
            (scaled rotations, sliding windows), or the tensors are not those of the configuration.
    """
    folder = Path(folder)
    config, kind = _read_config(folder)
    tensors = {name.removeprefix("transformer."): value for name, value in _read_tensors(folder).items()}
    take = _taker(tensors, folder)
    params = _gpt2(take, config) if kind == "gpt2" else _llama(take, config)
    unused = [
        n for n in tensors if not n.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))
    ]
    if config.tied_embeddings:
        unused = [name for name in unused if name != "lm_head.weight"]
    if unused:
        raise ValueError(
            f"{folder} has tensors that a {kind} of its {CONFIG} has not: {', '.join(sorted(unused)[:3])}."
        )
    return jax.tree.map(jnp.asarray, params), config


def _read_config(folder: Path) -> tuple[Config, str]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} is no model folder: it has no {CONFIG}. Pass a folder with {CONFIG} and {WEIGHTS}, as Hugging "
            "Face lays models out, or a run folder of jrl pretrain."
        )
    try:
        record = json.loads(path.read_bytes())
        return _config(record), record["model_type"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks or has malformed {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _config(record: Mapping[str, Any]) -> Config:
    kind = record["model_type"]
    if kind == "gpt2":
        _require(record, activation_function=("gelu_new", "gelu_pytorch_tanh"))
        _require(
            record,
            scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
            add_cross_attention=(False,),
        )
        return Config(
            vocab_size=record["vocab_size"],
            num_layers=record["n_layer"],
            num_heads=record["n_head"],
            num_kv_heads=record["n_head"],
            width=record["n_embd"],
            mlp_width=record.get("n_inner") or 4 * record["n_embd"],
            max_length=record["n_positions"],
            norm="layernorm",
            norm_eps=record.get("layer_norm_epsilon", 1e-5),
            positions="learned",
            bias="all",
            mlp="gelu",
            tied_embeddings=record.get("tie_word_embeddings", True),
        )
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"model_type {kind!r} is not known; jrl reads gpt2, llama, qwen2 and qwen3.")
    rope = record.get("rope_parameters") or record.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ValueError(
            f"rotations scaled as {scaling!r} are not known; jrl reads models without rope_scaling."
        )
    _require(
        record, hidden_act=("silu",), use_sliding_window=(False,), attention_bias=(False,), mlp_bias=(False,)
    )
    return Config(
        vocab_size=record["vocab_size"],
        num_layers=record["num_hidden_layers"],
        num_heads=record["num_attention_heads"],
        num_kv_heads=record.get("num_key_value_heads") or record["num_attention_heads"],
        width=record["hidden_size"],
        mlp_width=record["intermediate_size"],
        max_length=record["max_position_embeddings"],
        head_size=record.get("head_dim") or 0,
        norm_eps=record.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", record.get("rope_theta", 10_000.0)),
        bias="qkv" if kind == "qwen2" else "none",
        qk_norm=kind == "qwen3",
        tied_embeddings=record.get("tie_word_embeddings", False),
    )


def _require(record: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if record.get(name, values[0]) not in values:
            raise ValueError(
                f"{name}={record[name]!r} is not known; jrl reads models with {name}={values[0]!r}."
            )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / WEIGHTS).is_file():
        return safetensors.read(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; other formats (pickles among them) are not read."
        )
    try:
        shards = json.loads((folder / INDEX).read_bytes())["weight_map"]
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"a shard is named {name!r}, which is no plain file name that ends in .safetensors"
                )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is malformed: {error!r}.") from error
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= safetensors.read(folder / name)
    return tensors


def _taker(tensors: dict[str, np.ndarray], where: Path) -> Any:
    """Return ``take(name, shape)``, which removes a tensor from ``tensors`` and gives it in float32."""

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{where} lacks the tensor {name!r} of shape {list(shape)}.")
        array = tensors.pop(name)
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{where}: tensor {name!r} is {array.dtype} {list(array.shape)}, the configuration says float "
                f"{list(shape)}."
            )
        return array.astype(np.float32)

    return take


def _stack(layers: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def _gpt2(take: Any, config: Config) -> Params:
    D, F, V = config.width, config.mlp_width, config.vocab_size

    def linear(name: str, inputs: int, outputs: int) -> Params:  # stored as (in, out)
        return {"kernel": take(f"{name}.weight", inputs, outputs), "bias": take(f"{name}.bias", outputs)}

    def norm(name: str) -> Params:
        return {"gain": take(f"{name}.weight", D), "bias": take(f"{name}.bias", D)}

    params = {
        "embedding": take("wte.weight", V, D),
        "positions": take("wpe.weight", config.max_length, D),
        "layers": _stack(
            [
                {
                    "attention_norm": norm(f"h.{i}.ln_1"),
                    "qkv": linear(f"h.{i}.attn.c_attn", D, 3 * D),
                    "attention_out": linear(f"h.{i}.attn.c_proj", D, D),
                    "mlp_norm": norm(f"h.{i}.ln_2"),
                    "mlp_in": linear(f"h.{i}.mlp.c_fc", D, F),
                    "mlp_out": linear(f"h.{i}.mlp.c_proj", F, D),
                }
                for i in range(config.num_layers)
            ]
        ),
        "norm": norm("ln_f"),
    }
    return params if config.tied_embeddings else params | {"unembedding": take("lm_head.weight", V, D).T}


def _llama(take: Any, config: Config) -> Params:
    D, F, V, d = config.width, config.mlp_width, config.vocab_size, config.d
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}

    def layer(i: int) -> Params:
        at = f"model.layers.{i}"
        projections = [take(f"{at}.self_attn.{x}_proj.weight", n * d, D).T for x, n in heads.items()]
        out: Params = {
            "attention_norm": {"gain": take(f"{at}.input_layernorm.weight", D)},
            "qkv": {"kernel": np.concatenate(projections, axis=1)},
            "attention_out": {"kernel": take(f"{at}.self_attn.o_proj.weight", D, config.num_heads * d).T},
            "mlp_norm": {"gain": take(f"{at}.post_attention_layernorm.weight", D)},
            "mlp_in": {
                "kernel": np.concatenate(
                    [take(f"{at}.mlp.{x}_proj.weight", F, D).T for x in ("gate", "up")], axis=1
                )
            },
            "mlp_out": {"kernel": take(f"{at}.mlp.down_proj.weight", D, F).T},
        }
        if config.bias == "qkv":
            out["qkv"]["bias"] = np.concatenate(
                [take(f"{at}.self_attn.{x}_proj.bias", n * d) for x, n in heads.items()]
            )
        if config.qk_norm:
            out |= {f"{x}_norm": {"gain": take(f"{at}.self_attn.{x}_norm.weight", d)} for x in ("q", "k")}
        return out

    params = {
        "embedding": take("model.embed_tokens.weight", V, D),
        "layers": _stack([layer(i) for i in range(config.num_layers)]),
        "norm": {"gain": take("model.norm.weight", D)},
    }
    return params if config.tied_embeddings else params | {"unembedding": take("lm_head.weight", V, D).T}


def write_folder(folder: str | Path, params: Params, config: Config, dtype: Any = np.float32) -> None:
    """Write a model as Hugging Face lays out a GPT-2, Llama, Qwen2 or Qwen3, whichever the architecture is.

    Value and Q heads have no place there and are left out.

    Raises:
        ValueError: no such model has this architecture.
    """
    folder = Path(folder)
    kind = _kind(config)
    tensors = _to_gpt2(params) if kind == "gpt2" else _to_llama(params, config)
    tensors = {name: np.asarray(value).astype(dtype) for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / WEIGHTS, tensors, {"format": "pt"})
    with replacing(folder / CONFIG) as unfinished:
        unfinished.write_text(
            json.dumps(_to_config(config, kind, np.dtype(dtype).name), indent=2), encoding="utf-8"
        )


def _kind(config: Config) -> str:
    choices = (config.norm, config.positions, config.bias, config.mlp, config.qk_norm)
    kinds = {
        ("layernorm", "learned", "all", "gelu", False): "gpt2",
        ("rms", "rope", "none", "swiglu", False): "llama",
        ("rms", "rope", "qkv", "swiglu", False): "qwen2",
        ("rms", "rope", "none", "swiglu", True): "qwen3",
    }
    kind = kinds.get(choices)
    if kind is None or (
        kind == "gpt2"
        and (config.num_kv_heads != config.num_heads or config.d * config.num_heads != config.width)
    ):
        raise ValueError(
            f"no GPT-2, Llama or Qwen has this architecture: {config}. Keep it as a checkpoint of jrl."
        )
    return kind


def _to_config(config: Config, kind: str, dtype: str) -> dict[str, Any]:
    common = {
        "model_type": kind,
        "architectures": [
            {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}.get(kind, f"{kind.title()}ForCausalLM")
        ],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
    }
    if kind == "gpt2":
        return common | {
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_embd": config.width,
            "n_inner": config.mlp_width,
            "n_positions": config.max_length,
            "n_ctx": config.max_length,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
        }
    return common | {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.d,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
    }


def _to_gpt2(params: Params) -> dict[str, Any]:
    names = {
        "attention_norm": "ln_1",
        "qkv": "attn.c_attn",
        "attention_out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp_in": "mlp.c_fc",
        "mlp_out": "mlp.c_proj",
    }
    tensors = {"wte.weight": params["embedding"], "wpe.weight": params["positions"]}
    for part, name in names.items():
        for leaf, values in params["layers"][part].items():
            for i, value in enumerate(values):
                tensors[f"h.{i}.{name}.{'bias' if leaf == 'bias' else 'weight'}"] = value
    tensors |= {"ln_f.weight": params["norm"]["gain"], "ln_f.bias": params["norm"]["bias"]}
    return tensors | ({"lm_head.weight": params["unembedding"].T} if "unembedding" in params else {})


def _to_llama(params: Params, config: Config) -> dict[str, Any]:
    d, H, K = config.d, config.num_heads, config.num_kv_heads
    tensors = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]["gain"]}
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: np.asarray(leaf[i]), params["layers"])  # noqa: B023
        at = f"model.layers.{i}"
        cuts = [H * d, (H + K) * d]
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
            if leaf in layer["qkv"]:
                for x, value in zip("qkv", np.split(layer["qkv"][leaf], cuts, axis=-1), strict=True):
                    tensors[f"{at}.self_attn.{x}_proj.{suffix}"] = value.T
        for x, value in zip(("gate", "up"), np.split(layer["mlp_in"]["kernel"], 2, axis=1), strict=True):
            tensors[f"{at}.mlp.{x}_proj.weight"] = value.T
        tensors[f"{at}.self_attn.o_proj.weight"] = layer["attention_out"]["kernel"].T
        tensors[f"{at}.mlp.down_proj.weight"] = layer["mlp_out"]["kernel"].T
        tensors[f"{at}.input_layernorm.weight"] = layer["attention_norm"]["gain"]
        tensors[f"{at}.post_attention_layernorm.weight"] = layer["mlp_norm"]["gain"]
        if config.qk_norm:
            tensors |= {f"{at}.self_attn.{x}_norm.weight": layer[f"{x}_norm"]["gain"] for x in "qk"}
    return tensors | ({} if config.tied_embeddings else {"lm_head.weight": params["unembedding"].T})


# ------------------------------------------------------------------------------------------------ llama2.c


def read_llama2c(path: str | Path) -> tuple[Params, Config]:
    """Read llama2.c's ``.bin`` (version 0): seven int32, then float32 tensors, all layers of a kind together.

    Its rotations pair neighbours; rows of queries and keys are put into the order of :mod:`jrl.networks.transformer`.

    Raises:
        ValueError: the sizes are impossible, or the file is not as long as they say.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) < 28:
        raise ValueError(f"{path} has {len(data)} bytes: no model of llama2.c, whose header takes 28.")
    D, F, L, H, K, vocab, T = struct.unpack("<7i", data[:28])
    V = abs(vocab)
    try:
        if D < 1 or H < 1 or D % H:
            raise ValueError(f"width {D} with {H} heads")
        config = Config(
            vocab_size=V, num_layers=L, num_heads=H, num_kv_heads=K, width=D, mlp_width=F, max_length=T,
            tied_embeddings=vocab > 0,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path} is no model of llama2.c: {error}.") from error
    d = D // H
    shapes = {
        "embedding": (V, D), "attention_norm": (L, D), "q": (L, H * d, D), "k": (L, K * d, D), "v": (L, K * d, D),
        "out": (L, D, H * d), "mlp_norm": (L, D), "gate": (L, F, D), "down": (L, D, F), "up": (L, F, D),
        "norm": (D,), "cosines": (T, d // 2), "sines": (T, d // 2), "unembedding": (0 if vocab > 0 else V, D),
    }  # fmt: skip
    needed = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if needed != len(data):
        raise ValueError(
            f"{path} has {len(data)} bytes, a model of its sizes (D={D}, L={L}, V={vocab} …) takes {needed}."
        )
    flat, at, w = np.frombuffer(data, "<f4", offset=28), 0, {}
    for name, shape in shapes.items():
        w[name] = flat[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)

    def halves_first(x: np.ndarray) -> np.ndarray:  # [L, n·d, D]: even rows of each head, then odd ones
        return x.reshape(L, -1, d // 2, 2, D).swapaxes(2, 3).reshape(x.shape)

    def kernel(*parts: np.ndarray) -> Params:
        return {"kernel": np.concatenate(parts, axis=1).swapaxes(1, 2)}

    params: Params = {
        "embedding": w["embedding"],
        "layers": {
            "attention_norm": {"gain": w["attention_norm"]},
            "qkv": kernel(halves_first(w["q"]), halves_first(w["k"]), w["v"]),
            "attention_out": kernel(w["out"]),
            "mlp_norm": {"gain": w["mlp_norm"]},
            "mlp_in": kernel(w["gate"], w["up"]),
            "mlp_out": kernel(w["down"]),
        },
        "norm": {"gain": w["norm"]},
    }
    if not config.tied_embeddings:
        params["unembedding"] = w["unembedding"].T
    return jax.tree.map(jnp.array, params), config


def read(path: str | Path) -> tuple[Params, Config]:
    """Read a model: a folder of Hugging Face's layout, or a ``.bin`` of llama2.c.

    Raises:
        ValueError: as :func:`read_folder` and :func:`read_llama2c`.
    """
    return read_llama2c(path) if Path(path).suffix == ".bin" else read_folder(path)
