"""Bounds on time and memory for what others wrote and we run: chat templates, regular expressions.

Both bounds are the system's own, since neither a long loop nor a large allocation asks anyone: an alarm, and a limit on
the address space. They hold in the main thread, on systems that have them; elsewhere the block runs without. To enter
and leave takes about five microseconds, as every row of a data set does it.

Knows nothing about what runs within.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from functools import lru_cache
from types import FrameType, TracebackType

SECONDS = 10.0
MEMORY_BYTES = 1 << 30


class OutOfBounds(Exception):
    """The block took too long, or too much memory. Says so in words that follow what it was."""


class bounded:  # noqa: N801 - used as a word: `with bounded():`
    """Within it, at most so much time and so much more memory than the process has.

    Raises:
        OutOfBounds: it was more.
    """

    def __init__(self, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._limits: tuple[int, int] | None = None
        self._holds = False

    def __enter__(self) -> None:
        self._holds = threading.current_thread() is threading.main_thread()
        if not self._holds:
            return
        _listen()
        held = _address_space_bytes()
        if held is not None:
            self._limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            wanted = held + self._memory_bytes
            if soft == resource.RLIM_INFINITY or wanted < soft:
                resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._holds:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._limits is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._limits)
        if kind is MemoryError:
            raise OutOfBounds(f"takes more than {self._memory_bytes / 2**30:g} GiB of memory") from error
        if kind is _TooLong:
            raise OutOfBounds(f"takes longer than {self._seconds:g} seconds") from error


class _TooLong(BaseException):
    """Raised by the alarm; no `except Exception` on the way stops it."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLong


@lru_cache(maxsize=1)
def _listen() -> None:
    """Once for the process, which has no other use for this signal."""
    signal.signal(signal.SIGALRM, _too_long)


def _address_space_bytes() -> int | None:
    """What this process has mapped; None where the system doesn't say, and so doesn't limit it either."""
    if sys.platform != "linux":
        return None
    try:
        pages = os.pread(_statm(os.getpid()), 64, 0).split(maxsplit=1)[0]
    except OSError:  # no /proc
        return None
    return int(pages) * resource.getpagesize()


@lru_cache(maxsize=1)
def _statm(pid: int) -> int:
    """Kept open: opening it takes longer than all the rest. A fork of this process opens its own."""
    return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
