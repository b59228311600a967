"""Where the tests find real text: JRL_DATA, or ../shared/data beside the checkout; they skip where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


def path(name: str) -> Path:
    root = Path(os.environ.get("JRL_DATA") or Path(__file__).parents[3] / "shared" / "data")
    file = root / name
    if not file.exists():
        pytest.skip(f"{name} is not there: set JRL_DATA to a folder that has it")
    return file


def pairs(name: str, limit: int | None = None) -> list[tuple[str, str]]:
    """The last two columns of a table."""
    lines = path(name).read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    return [tuple(line.split("\t")[-2:]) for line in lines[:limit]]


def encode(texts, size: int | None = None, known: dict | None = None):
    """Lists of words as int32 ``[N, L]`` and lengths ``[N]``, by a dictionary that grows."""
    known = {} if known is None else known
    ids = [[known.setdefault(word, len(known)) for word in text] for text in texts]
    size = size or max(map(len, ids))
    return (
        np.array([row + [0] * (size - len(row)) for row in ids], np.int32),
        np.array([len(row) for row in ids], np.int32),
    )
