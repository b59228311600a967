"""The ids of the text environments, whose modules are imported when one is first asked for."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from jrl.envs.registry import register
from jrl.types import Environment


def _make(module: str, name: str, **kwargs: Any) -> Environment:
    # By name: some read files, which only the outer ring does, and nothing here may depend on that ring.
    return getattr(importlib.import_module(module), name)(**kwargs)


for _id, _module, _name in (
    ("RandomWalks-jrl", "jrl.language.tasks", "random_walks"),
    ("Addition-jrl", "jrl.language.tasks", "addition"),
    ("Sorting-jrl", "jrl.language.tasks", "sorting"),
    ("Reversing-jrl", "jrl.language.tasks", "reversing"),
    ("NextWord-jrl", "jrl.language.tasks", "next_word"),
    ("Text-jrl", "jrl.language.texts", "make"),
    ("MovieBooking-jrl", "jrl.language.booking", "movie_booking"),
):
    register(_id, functools.partial(_make, _module, _name))
