"""Where the real data are: the environment variable JRL_DATA, or ../shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ.get("JRL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def path(name: str) -> Path:
    """Return a file of the bundle; the test is skipped where it is absent."""
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} is not in {FOLDER} (set JRL_DATA)")
    return FOLDER / name


def pairs(name: str, limit: int | None = None) -> list[tuple[str, ...]]:
    """Return the last two columns of a table."""
    lines = path(name).read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    return [tuple(line.split("\t")[-2:]) for line in lines[:limit]]


def encode(texts, size: int | None = None, known: dict | None = None):
    """Return lists of words as int32 ``[N, L]`` and lengths ``[N]``, by a dictionary that grows."""
    known = {} if known is None else known
    ids = [[known.setdefault(word, len(known)) for word in text] for text in texts]
    size = size or max(map(len, ids))
    return (
        np.array([row + [0] * (size - len(row)) for row in ids], np.int32),
        np.array([len(row) for row in ids], np.int32),
    )
