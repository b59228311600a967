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
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jrl.language.bpe import BPE, CL100K_PATTERN, GPT2_PATTERN, byte_letters, known
from jrl.records import TOKENIZER as FILE

FORMAT = "jrl-tokenizer-1"
_MAX_BYTES = 1 << 28  # of a tokenizer's file


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
        if len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
            raise ValueError(f"alphabet={self.alphabet!r}: needs one character or more, each once.")

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
        return read_llama2c(file)
    if file.suffix == ".tiktoken":
        return read_tiktoken(file)
    if file.name == "vocab.json":
        return read_gpt2(file, file.with_name("merges.txt"))
    return _checked(file, _from_json_file)


def read_gpt2(vocab: str | Path, merges: str | Path) -> BPE:
    """Read ``vocab.json`` (piece -> token) and ``merges.txt`` (a pair a line, in order).

    Raises:
        ValueError: malformed.
    """
    return _checked(Path(vocab), lambda file: _gpt2(_object(file), _text(Path(merges)).splitlines()))


def _gpt2(vocab: Mapping[str, int], lines: Sequence[str]) -> BPE:
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    return _byte_level(vocab, pairs, {}, GPT2_PATTERN)


def read_tiktoken(
    path: str | Path, pattern: str = CL100K_PATTERN, specials: Mapping[str, int] | None = None
) -> BPE:
    """Read tiktoken's ranks: a line has a piece in base64 and its token, which is also its rank.

    Args:
        path: the file.
        pattern: how a text is split, which the file does not say; the default is cl100k's, as Llama 3's.
        specials: name -> token, which the file does not say either.

    Raises:
        ValueError: malformed.
    """

    def parse(file: Path) -> BPE:
        ids = {}
        for line in _text(file).splitlines():
            if line.strip():
                piece, token = line.split()
                ids[base64.b64decode(piece, validate=True)] = int(token)
        names = dict(specials or {})
        pieces = _table(ids, {name.encode(): token for name, token in names.items()})
        ends = [names[n] for n in ("<|endoftext|>", "<|end_of_text|>") if n in names]
        starts = [names[n] for n in ("<|begin_of_text|>",) if n in names]
        return BPE(
            pieces, dict(ids), pattern, False, tuple(ids[bytes([b])] for b in range(256)), names,
            start_token=[*starts, -1][0], end_token=[*ends, -1][0], whole_first=True,
        )  # fmt: skip

    return _checked(Path(path), parse)


def read_llama2c(path: str | Path) -> BPE:
    """Read llama2.c's ``tokenizer.bin``: the longest length (int32), then score (float32), length (int32), bytes.

    Tokens 0, 1, 2 are ``<unk>``, start and end; 3 to 258 the single bytes. The pair whose joined token has the highest
    score is joined first.

    Raises:
        ValueError: malformed.
    """

    def parse(file: Path) -> BPE:
        data = _bytes(file)
        longest = struct.unpack_from("<i", data, 0)[0]
        pieces: list[bytes] = []
        scores, offset = [], 4
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if not 0 <= length <= longest or offset + length > len(data):
                raise ValueError(f"token {len(pieces)} has {length} bytes, at byte {offset} of {len(data)}")
            pieces.append(data[offset : offset + length])
            scores.append(score)
            offset += length
        if len(pieces) < 259 or pieces[3:259] != [b"<0x%02X>" % b for b in range(256)]:
            raise ValueError("tokens 3 to 258 are not the bytes <0x00> to <0xFF>")
        pieces[3:259] = [bytes([b]) for b in range(256)]
        ranks = {piece: -score for piece, score in zip(pieces[259:], scores[259:], strict=True)}
        names = {"<unk>": 0, "<s>": 1, "</s>": 2}
        return BPE(tuple(pieces), ranks, None, True, tuple(range(3, 259)), names, 1, 2, prefix=" ")

    return _checked(Path(path), parse)


def _from_json_file(file: Path) -> Tokenizer:
    record = _object(file)
    return from_json(record) if record.get("format") == FORMAT else _hugging_face(record)


def _hugging_face(record: Mapping[str, Any]) -> BPE:
    """Understand ``tokenizer.json`` where it is byte-level BPE, or SentencePiece's with byte fallback."""
    model = record["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a model of type {model.get('type')!r}: only BPE is read")
    specials = {t["content"]: t["id"] for t in record.get("added_tokens") or []}
    vocab = dict(model["vocab"])
    pairs = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    normalizers = _steps(record.get("normalizer"), "normalizers")
    splitters = _steps(record.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in splitters]
    if model.get("byte_fallback"):
        blank = lambda text: text.replace("\u2581", " ")  # noqa: E731
        normal = [step for step in normalizers if step["type"] != "Prepend"]
        if any(step["type"] != "Replace" for step in normal) or kinds not in ([], ["Metaspace"]):
            raise ValueError(f"normalizer {normal} with pre_tokenizer {kinds} is not known here")
        prefix = len(normal) < len(normalizers) or any(
            step.get("prepend_scheme", "always") != "never" for step in splitters
        )
        named = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        table = {token: named.get(piece, blank(piece).encode()) for piece, token in vocab.items()}
        pieces = _table({}, {}, table | {token: name.encode() for name, token in specials.items()})
        ranks = {(blank(a).encode(), blank(b).encode()): i for i, (a, b) in enumerate(pairs)}
        bytes_at = tuple(vocab[f"<0x{b:02X}>"] for b in range(256))
        names = {name: specials[name] for name in specials if name not in named}
        start, end = _ends(names)
        return BPE(pieces, ranks, None, True, bytes_at, names, start, end, " " if prefix else "")
    unknown = [kind for kind in kinds if kind not in ("Split", "ByteLevel")]
    forms = [step["type"] for step in normalizers]
    if (
        "ByteLevel" not in kinds
        or unknown
        or any(form not in ("NFC", "NFD", "NFKC", "NFKD") for form in forms[:1])
    ):
        raise ValueError(f"pre_tokenizer {kinds} with normalizer {forms}: only byte-level BPE is read")
    patterns = [step["pattern"]["Regex"] for step in splitters if step["type"] == "Split"]
    byte_level = splitters[kinds.index("ByteLevel")]
    if byte_level.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    if len(patterns) > 1 or len(forms) > 1:
        raise ValueError(f"{len(patterns)} patterns and {len(forms)} normalizers: one of each is read")
    bpe = _byte_level(vocab, pairs, specials, [*patterns, None][0])
    return dataclasses.replace(
        bpe,
        normalization=[*forms, ""][0],
        whole_first=bool(model.get("ignore_merges")),
        prefix=" " if byte_level.get("add_prefix_space") else "",
    )


def _steps(step: Any, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]


def _byte_level(
    vocab: Mapping[str, int], pairs: Sequence[Sequence[str]], specials: Mapping[str, int], pattern: str | None
) -> BPE:
    letters = byte_letters()
    ids, names = {}, dict(specials)
    for piece, token in vocab.items():
        if piece in specials or not all(letter in letters for letter in piece) or piece == "<|endoftext|>":
            names.setdefault(piece, token)
        else:
            ids[bytes(letters[letter] for letter in piece)] = token
    ranks: dict[Any, float] = {}
    for i, (left, right) in enumerate(pairs):
        ranks.setdefault(tuple(bytes(letters[letter] for letter in piece) for piece in (left, right)), i)
    pieces = _table(ids, {name.encode(): token for name, token in names.items()})
    start, end = _ends(names)
    return BPE(pieces, ranks, pattern, False, tuple(ids[bytes([b])] for b in range(256)), names, start, end)


def _ends(names: Mapping[str, int]) -> tuple[int, int]:
    start = [names[name] for name in ("<s>", "<|begin_of_text|>") if name in names]
    ends = ("<|endoftext|>", "</s>", "<|end_of_text|>")
    end = [names[name] for name in ends if name in names]
    return [*start, -1][0], [*end, -1][0]


def _table(
    ids: Mapping[bytes, int], more: Mapping[bytes, int], table: Mapping[int, bytes] | None = None
) -> tuple[bytes, ...]:
    """Return the pieces in the order of their tokens, which must be 0 … n − 1 with at most a few gaps."""
    found = {token: piece for piece, token in (*ids.items(), *more.items())} | dict(table or {})
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2 * len(found) + 1024:
            raise ValueError(f"token {token!r} of {len(found)}: must be numbers from 0 on")
    return tuple(found.get(token, b"") for token in range(max(found, default=-1) + 1))


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


def _checked(file: Path, parse: Callable[[Path], Any]) -> Any:
    try:
        return parse(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        struct.error,
        RecursionError,
    ) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is no tokenizer that jrl reads ({what}).") from error
    except re.error as error:
        raise ValueError(f"{file} has a pattern that Python does not know ({error}).") from error


def _bytes(file: Path) -> bytes:
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes, more than {_MAX_BYTES}")
    return file.read_bytes()


def _text(file: Path) -> str:
    return _bytes(file).decode("utf-8")


def _object(file: Path) -> dict[str, Any]:
    record = json.loads(_text(file))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


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
