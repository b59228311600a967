"""The ids of the token environments (:mod:`jrl.language.tasks`), which are imported when one is first asked for."""

from __future__ import annotations

import functools
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
