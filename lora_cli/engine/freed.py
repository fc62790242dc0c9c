"""Memory that a step frees is kept for the next one, on a CPU.

glibc gives large freed blocks back to the system at once, and gets them again page by page: each step of a training run
then pays for the same pages. Told not to, it reuses them; the peak stays what it is, because the steps are alike.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""glibc's numbers, from malloc.h."""
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, from here on in this process; False where the C library is another one.

    Whoever has set glibc's own MALLOC_ variables is left alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no such function
        return False
    settings = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, 2**26))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
