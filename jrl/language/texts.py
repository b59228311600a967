"""``Text-jrl``: go on with prompts in the tokens of a trained model, rewarded by name.

::

    env = jrl.make("Text-jrl", model="runs/lm", reward=["lexicon:happy,sad=-1"], max_new_tokens=64)
    algo = jrl.grpo.make(env, jrl.grpo.Config(model="pretrained", cache=True))

What ``jrl train grpo --model runs/lm --reward …`` runs on. Any algorithm runs on it; with ``model="pretrained"`` the
policy starts from the model, and the model is the reference that it is kept near.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrl import checkpoint, records
from jrl.language import data, generation, named_rewards, runs, tokenizers
from jrl.language.environments import Decoder, Prompts, token_mdp, token_step
from jrl.networks import transformer
from jrl.types import Environment

ID = "Text-jrl"


def make(
    model: str | None = None,
    reward: str | Sequence[str] = "ngram:3",
    prompts: str = "",
    corpus: str = "",
    prompt_length: int = 8,
    num_prompts: int = 256,
    max_new_tokens: int = 32,
    end: str = "",
    seed: int = 0,
) -> Environment:
    """Make the environment; files are read here.

    Args:
        model: folder of ``jrl pretrain``, of a run of ``grpo`` that started from one, folder in Hugging Face's layout,
            or llama2.c's ``.bin``. None: the characters of the corpus, and no decoder.
        reward: what texts earn, as :mod:`jrl.language.named_rewards` has it; several are added up.
        prompts: a text file with a prompt a line, or ``corpus``: pieces of the corpus. By default what a model with a
            start token starts from, and pieces of the corpus otherwise.
        corpus: a text file, or ``builtin``; for prompts and n-grams. By default what the model was trained on.
        prompt_length: tokens of a piece of the corpus.
        num_prompts: pieces of the corpus, at random places.
        max_new_tokens: a text is cut after as many.
        end: what ends a text: one token of the model, such as ``.`` or a line's end. By default the model's end token,
            if it has one.
        seed: of the places.

    Raises:
        ValueError: a prompt that leaves no room in the context, something that the tokenizer cannot spell, a reward
            that is none, a file that cannot be read.
    """
    step = None if model is None else checkpoint.latest_step(Path(model) / records.CHECKPOINTS)
    read = None if model is None else runs.load(model)
    name = corpus or (_corpus_of(Path(model)) if model else "") or data.BUILTIN
    files: dict[str, Any] = {}

    def text(what: str, path: str) -> str:
        content = data.read(path)
        files[what] = {"name": path, "sha256": runs.sha256(content)}
        return content

    def sources() -> dict[str, Any]:
        if read is None:
            return files
        return {
            "model": {"name": str(model), "step": step, "sha256": runs.params_sha256(read.params)},
            **files,
        }

    tokenizer = tokenizers.Char.of(text("corpus", name)) if read is None else read.tokenizer
    vocab_size = tokenizer.vocab_size if read is None else read.config.vocab_size

    @functools.cache  # most choices need no corpus
    def tokens() -> np.ndarray:
        return np.asarray(tokenizer.encode(text("corpus", name)), np.int64)

    lines = functools.partial(text, "prompts", prompts)
    given = _prompts(prompts, lines, tokenizer, tokens, prompt_length, num_prompts, seed)
    if read is not None:
        generation.check_lengths(read.config, int(given.tokens.shape[1]), max_new_tokens)
    source = named_rewards.Source(
        tokenizers.pieces(tokenizer, vocab_size),
        max_new_tokens,
        tokens,
        None if read is None else functools.partial(transformer.log_probs, read.params, read.config),
    )
    per_token, rating = named_rewards.build([reward] if isinstance(reward, str) else reward, source)
    env = token_mdp(
        given,
        per_token,
        vocab_size=vocab_size,
        max_new_tokens=max_new_tokens,
        eos=_end(end, tokenizer),
        at_limit="terminate",
        rating=rating,
        decoder=None if read is None else Decoder(read.params, read.config),
        name=ID,
    )
    return env._replace(step=dataclasses.replace(token_step(env, ID), sources=sources))


def _corpus_of(folder: Path) -> str:
    """Return what a model was trained on, "" where its folder does not say."""
    if runs.is_run(folder):
        return records.read_run(folder)["corpus"]["name"]
    if not (folder / records.RUN).exists():
        return ""
    kwargs = records.read_run(folder)["environment"]["kwargs"]  # of Text-jrl
    return kwargs.get("corpus") or _corpus_of(Path(kwargs["model"]))


def _end(end: str, tokenizer: tokenizers.Tokenizer) -> int | None:
    if not end:
        return None if tokenizer.end_token < 0 else tokenizer.end_token
    blank = " " if isinstance(tokenizer, tokenizers.Word) else ""  # which its words have before them
    pieces = enumerate(tokenizers.pieces(tokenizer))
    found = [token for token, piece in pieces if end in (piece, piece.removeprefix(blank))]
    if not found:
        raise ValueError(f"end={end!r}: no token of the model is that; a text ends with one token.")
    return found[0]


def _prompts(
    prompts: str,
    read: Callable[[], str],
    tokenizer: tokenizers.Tokenizer,
    corpus: Callable[[], np.ndarray],
    length: int,
    count: int,
    seed: int,
) -> Prompts:
    start = [] if tokenizer.start_token < 0 else [tokenizer.start_token]
    if prompts in ("", "corpus"):
        if not prompts and start:
            return Prompts(np.array([start]), np.ones(1, int))
        tokens = corpus()
        if not 1 <= length <= len(tokens) or count < 1:
            raise ValueError(
                f"prompt_length={length}, num_prompts={count}: both must be at least 1, and the corpus has "
                f"{len(tokens)} tokens."
            )
        first = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, count)
        pieces = tokens[first[:, None] + np.arange(length)]
        pieces = np.concatenate([np.tile(np.array(start, np.int64), (count, 1)), pieces], axis=1)
        return Prompts(pieces, np.full(count, pieces.shape[1]))
    lines = [line for line in read().split("\n") if line.strip()]
    encoded = [[*start, *tokenizer.encode(line)] for line in lines]
    longest = max(map(len, encoded))
    table = np.array([[*row, *[0] * (longest - len(row))] for row in encoded])
    return Prompts(table, np.array([len(row) for row in encoded]))
