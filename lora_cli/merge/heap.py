"""Memory that is used again instead of being handed back after each module, and one thread of arithmetic per core.

Every module of a model takes arrays of the same few sizes. The C library gets such large ones fresh from the system
each time, which fills them with zeros page by page: three quarters of a merge's processor time, measured.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the two settings."""
_DEFAULT_BYTES = 128 * 2**10
_NEVER_BYTES = 2**30
_MOST_THREADS = 8
"""More would only wait for the memory and the disk."""


@contextmanager
def reused_memory() -> Iterator[None]:
    """Within it, freed memory stays with the process; afterwards it goes back. Does nothing without glibc."""
    library = ctypes.CDLL(None)
    try:
        set_option, trim = library.mallopt, library.malloc_trim
    except AttributeError:
        yield
        return
    set_option(_MMAP_THRESHOLD, _NEVER_BYTES)
    set_option(_TRIM_THRESHOLD, _NEVER_BYTES)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _DEFAULT_BYTES)
        set_option(_TRIM_THRESHOLD, _DEFAULT_BYTES)
        trim(0)


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Within it, arithmetic stays in the thread that asks for it; how many such threads there is a core for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    finally:
        torch.set_num_threads(threads)
