"""How much main memory this process takes, and how much more a part of the work needs, at its highest.

What the system counts for a process is more than what it uses: memory that was freed stays with the allocator, half
a gigabyte of it after a compilation. :func:`release` gives it back. Without that, what comes next would in part fill
those holes and seem to take less than it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int | None:
    """Return the bytes of main memory that this process takes now, or None where it is not Linux."""
    return _status("VmRSS")


def release() -> None:
    """Give memory that is free within the process back to the system, where the C library can (glibc)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class Watch:
    """By how many bytes the process grows beyond what it takes now, at the highest, by what it is doing.

    ::

        watch = Watch()
        with watch.during("training"):
            ...
        watch.peaks["training"]

    The system keeps the highest number since it was last asked to forget it. Where it does not let a process ask
    for that, numbers are those of the moments at which :meth:`look` is called.

    Attributes:
        peaks: bytes by name; 0 where the system does not say.
    """

    def __init__(self) -> None:
        release()
        self.before = resident()
        self.peaks: dict[str, int] = {}
        self._doing: list[str] = []

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Count what is taken from here on for ``what``; what was done before goes on afterwards."""
        self.look()
        _forget_peak()
        self._doing.append(what)
        self.peaks.setdefault(what, 0)
        try:
            yield
        finally:
            self.look()
            self._doing.pop()
            release()
            _forget_peak()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Leave out what is done here and what is left of it, such as a compiled program."""
        self.look()
        release()
        at_first = resident()
        try:
            yield
        finally:
            release()
            if self.before is not None and at_first is not None:
                self.before += (resident() or at_first) - at_first
            _forget_peak()

    def look(self) -> None:
        """Enter the highest number so far."""
        if not self._doing or self.before is None:
            return
        highest = (_status("VmHWM") if _CAN_FORGET else resident()) or 0
        self.peaks[self._doing[-1]] = max(self.peaks[self._doing[-1]], highest - self.before)


def _status(name: str) -> int | None:
    try:
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _forget_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


_CAN_FORGET = _forget_peak()
