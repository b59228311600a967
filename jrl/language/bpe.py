"""Byte-pair encoding with a vocabulary of other people's making: the record, and how their patterns are read."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def known(vocab_size: int, tokens: Iterable[int]) -> list[int]:
    """Return the tokens as a list; raises ValueError for one outside the vocabulary."""
    tokens = [int(token) for token in tokens]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {vocab_size} tokens.")
    return tokens


@dataclasses.dataclass(frozen=True, eq=False)
class BPE:
    """Byte-pair encoding (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909) with a given vocabulary.

    A text is split by ``pattern``; within each part the pair of neighbours that comes first in ``ranks`` is joined,
    leftmost first, until no pair is left.

    Attributes:
        pieces: the bytes that each token stands for.
        ranks: lower is joined earlier; of a pair ``(left, right)``, or of what it joins to.
        pattern: regular expression of the parts, what lies between two matches being one as well; None: the whole text
            is one.
        characters: start from characters, with single bytes for those that are no token; otherwise from bytes.
        bytes_at: the tokens of the 256 bytes.
        specials: names of tokens that no text is encoded to.
        start_token: what a text begins with, or -1.
        end_token: what ends a text, or -1.
        prefix: put before each text (a blank, for Llama), and taken off again.
        normalization: a Unicode form such as NFC, or "".
        whole_first: a part that is a token is not split.
        prefix_once: the prefix is not put before a text that begins with it; a text and the same behind one prefix
            then have the same tokens, which are decoded to the shorter.
    """

    pieces: tuple[bytes, ...]
    ranks: Mapping[Any, float]
    pattern: str | None
    characters: bool
    bytes_at: tuple[int, ...]
    specials: Mapping[str, int] = dataclasses.field(default_factory=dict)
    start_token: int = -1
    end_token: int = -1
    prefix: str = ""
    normalization: str = ""
    whole_first: bool = False
    prefix_once: bool = False

    def __post_init__(self) -> None:
        if len(self.bytes_at) != 256 or not all(0 <= token < len(self.pieces) for token in self.bytes_at):
            raise ValueError("bytes_at: the vocabulary needs a token for each of the 256 bytes.")
        for key in self.ranks:
            joined = b"".join(key) if isinstance(key, tuple) else key
            if joined not in self._ids:
                raise ValueError(f"ranks: {key!r} joins to what is not in the vocabulary.")

    vocab_size = property(lambda self: len(self.pieces))

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        reserved = set(self.specials.values()) | (set(self.bytes_at) if self.characters else set())
        ids: dict[bytes, int] = {}
        for i, piece in enumerate(self.pieces):
            if i not in reserved:
                ids.setdefault(piece, i)
        return ids

    @functools.cached_property
    def _split(self) -> Callable[[str], list[str]]:
        if self.pattern is None:
            return lambda text: [text]
        matches = re.compile(_expand(self.pattern)).finditer

        def split(text: str) -> list[str]:
            parts, at = [], 0
            for match in matches(text):
                parts += [text[at : match.start()], match[0]]
                at = match.end()
            return [part for part in (*parts, text[at:]) if part]

        return split

    @functools.cached_property
    def _of_part(self) -> Callable[[str], tuple[int, ...]]:
        return functools.lru_cache(maxsize=1 << 16)(self._join)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, without start or end; special names in it are plain text."""
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)  # type: ignore[arg-type]
        if not text:
            return []
        if not (self.prefix_once and text.startswith(self.prefix)):
            text = self.prefix + text
        return [token for part in self._split(text) for token in self._of_part(part)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text; specials are left out, bytes that are no UTF-8 become U+FFFD."""
        specials = set(self.specials.values())
        joined = b"".join(self.pieces[t] for t in known(self.vocab_size, tokens) if t not in specials)
        text = joined.decode("utf-8", "replace")
        rest = text.removeprefix(self.prefix)
        if self.prefix_once and (not rest or rest.startswith(self.prefix)):
            return text  # the prefix is the text's own: none was put before it
        return rest

    def _join(self, part: str) -> tuple[int, ...]:
        if self.whole_first and (whole := self._ids.get(part.encode())) is not None:
            return (whole,)
        pieces: list[bytes] = []
        fallback: dict[int, int] = {}  # where a byte stands for itself: such are joined to nothing
        if self.characters:
            for letter in part:
                encoded = letter.encode()
                if encoded in self._ids:
                    pieces.append(encoded)
                    continue
                for byte in encoded:
                    fallback[len(pieces)] = self.bytes_at[byte]
                    pieces.append(bytes([byte]))
        else:
            pieces = [bytes([byte]) for byte in part.encode()]
        # A linked list and a heap of candidate pairs: n log n, where the obvious loop is n².
        after = [*range(1, len(pieces)), -1]
        before = [*range(-1, len(pieces) - 1)]
        heap: list[tuple[float, int, bytes, bytes]] = []

        def consider(left: int) -> None:
            right = after[left]
            if right < 0 or left in fallback or right in fallback:
                return
            pair = (pieces[left], pieces[right])
            rank = self.ranks.get(pair)
            if rank is None:
                rank = self.ranks.get(pair[0] + pair[1])
            if rank is not None:
                heapq.heappush(heap, (rank, left, *pair))

        for i in range(len(pieces)):
            consider(i)
        while heap:
            _, left, first, second = heapq.heappop(heap)
            right = after[left]
            if right < 0 or pieces[left] != first or pieces[right] != second:
                continue  # one of them was joined to something else meanwhile
            pieces[left], pieces[right] = first + second, b""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(left)
            if before[left] >= 0:
                consider(before[left])
        return tuple(
            fallback[i] if i in fallback else self._ids[piece] for i, piece in enumerate(pieces) if piece
        )


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _expand(pattern: str) -> str:
    r"""Write Unicode categories, ``\p{L}``, as the ranges that Python's ``re`` knows; groups do not capture."""
    out, inside, i = [], False, 0
    while i < len(pattern):
        category = re.compile(r"\\([pP])\{(\w{1,2})\}").match(pattern, i)
        if category:
            ranges = _ranges(category[2])
            if inside and category[1] == "P":
                raise ValueError(f"pattern {pattern!r}: \\P within brackets is not known here.")
            out.append(ranges if inside else f"[{'^' if category[1] == 'P' else ''}{ranges}]")
            i = category.end()
            continue
        if pattern[i] == "\\":
            out.append(pattern[i : i + 2])
            i += 2
            continue
        if pattern[i] == "(" and not inside and pattern[i + 1 : i + 2] != "?":
            out.append("(?:")
        else:
            out.append(pattern[i])
        inside = (inside or pattern[i] == "[") and not (inside and pattern[i] == "]")
        i += 1
    return "".join(out)


@functools.cache
def _ranges(category: str) -> str:
    found, start = [], None
    for code in range(sys.maxunicode + 2):
        member = code <= sys.maxunicode and unicodedata.category(chr(code)).startswith(category)
        if member and start is None:
            start = code
        elif not member and start is not None:
            found.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(found)


@functools.cache
def byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
