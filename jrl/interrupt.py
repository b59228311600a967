"""Ctrl-C: the first one asks for a stop, the second one aborts; and waiting in which both are heard."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, and the second into a KeyboardInterrupt.

    A context manager; outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say, self._said = say, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        # No printing here: the signal may have come in the middle of a print.
        self.requested = True

    def announce(self) -> None:
        """Say once that a stop was requested."""
        if self.requested and not self._said:
            self._said = True
            self._say("stopping after this chunk; press Ctrl-C again to abort at once")


def wait(arrays: Any, stop: StopRequest | None, *, leave_early: bool = False) -> None:
    """Wait until ``arrays`` are computed, in small naps in which signals are handled."""
    nap = 0.0005
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        if stop is not None:
            stop.announce()
            if leave_early and stop.requested:
                return
        time.sleep(nap)
        nap = min(2 * nap, 0.02)
