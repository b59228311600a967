"""Tokenizers of other libraries, read from their files: GPT-2's, Hugging Face's, tiktoken's and llama2.c's.

:func:`jrl.language.tokenizers.read` finds out which of them a file or folder holds. Malformed files raise ValueError;
nothing in a file is executed.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jrl.language.bpe import BPE, CL100K_PATTERN, GPT2_PATTERN, byte_letters

_MAX_BYTES = 1 << 28  # of a tokenizer's file


def read_gpt2(vocab: str | Path, merges: str | Path) -> BPE:
    """Read ``vocab.json`` (piece -> token) and ``merges.txt`` (a pair a line, in order).

    Raises:
        ValueError: malformed.
    """
    return checked(Path(vocab), lambda file: _gpt2(json_object(file), _text(Path(merges)).splitlines()))


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

    return checked(Path(path), parse)


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

    return checked(Path(path), parse)


def hugging_face(record: Mapping[str, Any]) -> BPE:
    """Understand ``tokenizer.json`` where it is byte-level BPE, or SentencePiece's with byte fallback."""
    model = record["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a model of type {model.get('type')!r}: only BPE is read")
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(mark):
            raise ValueError(f"a model with {mark}={model[mark]!r}: only pieces without such marks are read")
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
        prepended = len(normal) < len(normalizers)
        prefix = prepended or any(step.get("prepend_scheme", "always") != "never" for step in splitters)
        named = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        table = {token: named.get(piece, blank(piece).encode()) for piece, token in vocab.items()}
        pieces = _table({}, {}, table | {token: name.encode() for name, token in specials.items()})
        ranks = {(blank(a).encode(), blank(b).encode()): i for i, (a, b) in enumerate(pairs)}
        bytes_at = tuple(vocab[f"<0x{b:02X}>"] for b in range(256))
        names = {name: specials[name] for name in specials if name not in named}
        start, end = _ends(names)
        # Metaspace also splits unless told otherwise: each blank begins a part.
        pattern = " ?[^ ]+| " if any(step.get("split", True) for step in splitters) else None
        bpe = BPE(pieces, ranks, pattern, True, bytes_at, names, start, end, " " if prefix else "")
        return dataclasses.replace(bpe, prefix_once=prefix and not prepended)
    unknown = [kind for kind in kinds if kind not in ("Split", "ByteLevel")]
    forms = [step["type"] for step in normalizers]
    if (
        "ByteLevel" not in kinds
        or unknown
        or any(form not in ("NFC", "NFD", "NFKC", "NFKD") for form in forms[:1])
    ):
        raise ValueError(f"pre_tokenizer {kinds} with normalizer {forms}: only byte-level BPE is read")
    splits = [step for step in splitters if step["type"] == "Split"]
    for step in splits:
        # The other way to write a pattern that matches all there is, as that of GPT-4: what it leaves is removed.
        kind = step.get("behavior", "Isolated"), step.get("invert", False)
        if kind not in (("Isolated", False), ("Removed", True)):
            raise ValueError(
                f"a Split with behavior={kind[0]!r} and invert={kind[1]!r}: only 'Isolated' and False, or "
                "'Removed' and True are read"
            )
    patterns = [step["pattern"]["Regex"] for step in splits]
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
        prefix_once=bool(byte_level.get("add_prefix_space")),
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


def checked(file: Path, parse: Callable[[Path], Any]) -> Any:
    """Return ``parse(file)``; whatever is malformed raises ValueError with the file's name."""
    try:
        return parse(file)
    except OSError as error:
        raise ValueError(f"{error.filename or file} cannot be read: {error.strerror or error}.") from error
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


def json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ValueError where there is none."""
    record = json.loads(_text(file))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record
