"""What tests of the C++ kernels share."""

from __future__ import annotations

import shutil

import pytest

from jrl.native import build

if not any(map(shutil.which, ("c++", "g++", "clang++"))):
    collect_ignore_glob = ["test_*.py"]  # no C++ compiler on this machine


@pytest.fixture
def afresh(tmp_path, monkeypatch):
    """As in a process that has loaded no kernel, on a machine that has compiled none; gives the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (build.load, build._digest):
        function.cache_clear()
    yield tmp_path / "cache" / "jrl"
    for function in (build.load, build._digest):
        function.cache_clear()
