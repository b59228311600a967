"""Where the real data are: the environment variable JRL_DATA, or ../shared/data beside the checkout."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("JRL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def path(name: str) -> Path:
    """Return a file of the bundle; the test is skipped where it is absent."""
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} is not in {FOLDER} (set JRL_DATA)")
    return FOLDER / name
