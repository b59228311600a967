"""From text to tokens and back, on the host: characters, bytes, words, and byte-pair encodings of other models.

A tokenizer is a record with ``encode``, ``decode``, ``vocab_size``, ``start_token`` and ``end_token`` (-1 where it has
none). :func:`read` finds out what a file or folder holds: GPT-2's ``vocab.json`` and ``merges.txt``, ``tokenizer.json``
as GPT-2, Llama and Qwen have it, tiktoken's ranks, llama2.c's ``.bin``, or what :func:`write` wrote. Malformed files
raise ValueError; nothing in a file is executed.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jrl.language import tokenizer_files
from jrl.language.bpe import BPE, known
from jrl.records import TOKENIZER as FILE

FORMAT = "jrl-tokenizer-1"


class Tokenizer(Protocol):
    """What a tokenizer has."""

    @property
    def vocab_size(self) -> int:
        """Tokens are ``0 … vocab_size − 1``."""

    @property
    def start_token(self) -> int:
        """What a text begins with, or -1."""

    @property
    def end_token(self) -> int:
        """What ends a text, or -1."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; raises ValueError where it has something that no token stands for."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; raises ValueError for one outside the vocabulary."""


# ----------------------------------------------------------------------------------- characters, bytes, words


@dataclasses.dataclass(frozen=True)
class Char:
    """One token a character, then ``specials`` such as ``<end>``, which no text is encoded to."""

    alphabet: str
    specials: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        text = isinstance(self.alphabet, str)  # a record may hold anything
        if not text or len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
            raise ValueError(f"alphabet={self.alphabet!r}: needs a text of one character or more, each once.")

    @classmethod
    def of(cls, text: str, specials: tuple[str, ...] = ()) -> Char:
        """Return the tokenizer whose alphabet is the characters of ``text``, sorted."""
        return cls("".join(sorted(set(text))), specials)

    vocab_size = property(lambda self: len(self.alphabet) + len(self.specials))
    start_token = property(lambda self: _special(self, "<start>"))
    end_token = property(lambda self: _special(self, "<end>"))

    def encode(self, text: str) -> list[int]:
        """Return the tokens; raises ValueError for a character outside the alphabet."""
        index = _index(self.alphabet)
        try:
            return [index[letter] for letter in text]
        except KeyError as error:
            raise ValueError(
                f"the character {error.args[0]!r} is not in the alphabet of this tokenizer ({self.alphabet!r}); "
                "leave it out, or train a model whose corpus has it."
            ) from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text; specials are left out."""
        return "".join(self.alphabet[t] for t in known(self.vocab_size, tokens) if t < len(self.alphabet))


@dataclasses.dataclass(frozen=True)
class Byte:
    """One token a byte of UTF-8, then ``specials``: any text at all, whatever the corpus was."""

    specials: tuple[str, ...] = ("<end>",)

    vocab_size = property(lambda self: 256 + len(self.specials))
    start_token = property(lambda self: _special(self, "<start>"))
    end_token = property(lambda self: _special(self, "<end>"))

    def encode(self, text: str) -> list[int]:
        """Return the bytes."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD, specials are left out."""
        return bytes(t for t in known(self.vocab_size, tokens) if t < 256).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Word:
    """One token a word or mark; token 0 is ``<unk>``, for what is not among ``words``. White space is not kept."""

    words: tuple[str, ...]
    specials: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str, max_words: int = 10_000, specials: tuple[str, ...] = ()) -> Word:
        """Return the tokenizer of the commonest words of ``text``."""
        counts = Counter(_WORD.findall(text))
        return cls(tuple(word for word, _ in counts.most_common(max_words)), specials)

    vocab_size = property(lambda self: 1 + len(self.words) + len(self.specials))
    start_token = property(lambda self: _special(self, "<start>"))
    end_token = property(lambda self: _special(self, "<end>"))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of words, numbers and single marks."""
        index = _index(self.words)
        return [index.get(word, -1) + 1 for word in _WORD.findall(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words with blanks between them."""
        names = ("<unk>", *self.words)
        return " ".join(names[t] for t in known(self.vocab_size, tokens) if t < len(names))


_WORD = re.compile(r"\w+|[^\w\s]")


@functools.lru_cache(maxsize=16)
def _index(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def _special(tokenizer: Char | Byte | Word, name: str) -> int:
    specials = tokenizer.specials
    return tokenizer.vocab_size - len(specials) + specials.index(name) if name in specials else -1


# ------------------------------------------------------------------------------------------------- readers


def read(path: str | Path) -> Tokenizer:
    """Read the tokenizer in a file or folder, by its name.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    path = Path(path)
    candidates = [path / name for name in (FILE, "tokenizer.json", "vocab.json")] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            break
    else:
        raise ValueError(
            f"{path} holds no tokenizer: expected {FILE}, tokenizer.json, or vocab.json with merges.txt in a folder, "
            "or a file that ends in .json, .tiktoken or .bin."
        )
    if file.suffix == ".bin":
        return tokenizer_files.read_llama2c(file)
    if file.suffix == ".tiktoken":
        return tokenizer_files.read_tiktoken(file)
    if file.name == "vocab.json":
        return tokenizer_files.read_gpt2(file, file.with_name("merges.txt"))
    return tokenizer_files.checked(file, _from_json_file)


def _from_json_file(file: Path) -> Tokenizer:
    record = tokenizer_files.json_object(file)
    return from_json(record) if record.get("format") == FORMAT else tokenizer_files.hugging_face(record)


# ----------------------------------------------------------------------------------------- our own file


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what :func:`from_json` reads.

    Raises:
        TypeError: it is none of this module's tokenizers.
    """
    kind = type(tokenizer).__name__
    if not isinstance(tokenizer, Char | Byte | Word | BPE):
        raise TypeError(f"{kind} is none of jrl's tokenizers: Char, Byte, Word or BPE.")
    record = {field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(tokenizer)}
    if isinstance(tokenizer, BPE):
        record["pieces"] = [_base64(piece) for piece in tokenizer.pieces]
        record["ranks"] = [
            [*map(_base64, key if isinstance(key, tuple) else (key,)), rank]
            for key, rank in tokenizer.ranks.items()
        ]
    return {"format": FORMAT, "kind": kind, **record}


def from_json(record: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that :func:`to_json` described.

    Raises:
        ValueError: malformed.
    """
    try:
        return _from_json(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no tokenizer of jrl: {error!r}.") from error


def _from_json(record: Mapping[str, Any]) -> Tokenizer:
    kinds: dict[str, Any] = {"Char": Char, "Byte": Byte, "Word": Word, "BPE": BPE}
    kind = kinds[record["kind"]]
    fields = {name: value for name, value in record.items() if name not in ("format", "kind")}
    for name in ("specials", "words", "bytes_at"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    if kind is BPE:
        fields["pieces"] = tuple(base64.b64decode(piece, validate=True) for piece in fields["pieces"])
        keys = [tuple(base64.b64decode(k, validate=True) for k in row[:-1]) for row in fields["ranks"]]
        fields["ranks"] = {
            key if len(key) == 2 else key[0]: float(row[-1])
            for key, row in zip(keys, fields["ranks"], strict=True)
        }
    return kind(**fields)


def write(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer into a folder, as :data:`FILE`."""
    (Path(folder) / FILE).write_text(json.dumps(to_json(tokenizer)), encoding="utf-8")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def continuation(tokenizer: Tokenizer, prompt: Iterable[int], tokens: Iterable[int]) -> str:
    """Return the text that ``tokens`` add to a prompt: what both say together, without what the prompt says.

    Decoded alone, tokens are a text of their own, which has no blank before its first word where Llama or :class:`Word`
    have one. A character that the prompt begins and the tokens complete belongs to the continuation.

    Args:
        tokenizer: any.
        prompt: its tokens, start token and all.
        tokens: those after it.

    Raises:
        ValueError: a token outside the vocabulary.
    """
    prompt = list(prompt)
    whole, said = tokenizer.decode([*prompt, *tokens]), tokenizer.decode(prompt)
    while not whole.startswith(said):  # it ends with a character that is U+FFFD while bytes of it are missing
        said = said[:-1]
    return whole[len(said) :]


def pieces(tokenizer: Tokenizer, vocab_size: int | None = None) -> list[str]:
    """Return the text that each token stands for within a text, "" for specials.

    Bytes that are no UTF-8 by themselves are U+FFFD, words have a blank before them.

    Args:
        tokenizer: one of jrl's.
        vocab_size: of a model with more tokens than its tokenizer names; those are "".
    """
    specials: Iterable[int]
    if isinstance(tokenizer, BPE):
        texts = [piece.decode("utf-8", "replace") for piece in tokenizer.pieces]
        specials = tokenizer.specials.values()
    elif isinstance(tokenizer, Word):
        texts, specials = [f" {word}" for word in ("<unk>", *tokenizer.words)], ()
    else:
        texts, specials = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)], ()
    for token in specials:
        texts[token] = ""
    return texts + [""] * ((vocab_size or tokenizer.vocab_size) - len(texts))
