"""The ids of the token environments (:mod:`jrl.language.tasks`), which are imported when one is first asked for.

``Text-jrl`` (:mod:`jrl.language.texts`) reads files, as only the outermost ring does: its id names a module, and that
is imported by its name.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from jrl.envs.registry import register
from jrl.types import Environment


def _make(name: str, **kwargs: Any) -> Environment:
    from jrl.language import tasks

    return getattr(tasks, name)(**kwargs)


for _id, _name in (
    ("RandomWalks-jrl", "random_walks"),
    ("Addition-jrl", "addition"),
    ("Sorting-jrl", "sorting"),
    ("Reversing-jrl", "reversing"),
    ("NextWord-jrl", "next_word"),
):
    register(_id, functools.partial(_make, _name))


def _text(**kwargs: Any) -> Environment:
    return importlib.import_module("jrl.language.texts").make(**kwargs)


register("Text-jrl", _text)
