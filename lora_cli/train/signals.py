"""Signals to a run: noticed at once, heeded between two micro-batches.

SIGTERM and SIGINT ask it to stop, SIGUSR1 to write a checkpoint and go on. A second SIGINT doesn't wait.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopSignals:
    """What signals have asked for while `listening`."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that asked the run to stop."""
        self._save = False

    def save_asked(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are noted; after it, they go where they went before."""
        with _handled({signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._ask}):
            yield

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            # Raised as soon as Python runs again; the next one doesn't even wait for that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.received = number

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._save = True


@contextmanager
def without_save_requests() -> Iterator[None]:
    """Within it, SIGUSR1 doesn't end the process, as it would by itself: there is nothing to save yet, or no more."""
    with _handled({signal.SIGUSR1: lambda number, frame: None}):
        yield


@contextmanager
def _handled(handlers: Mapping[int, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: whoever runs us there listens to signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
