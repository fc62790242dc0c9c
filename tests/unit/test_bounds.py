"""Bounds on time and memory: they hold, they say so in words, and nothing is left of them."""

from __future__ import annotations

import resource
import signal
import threading
import time
from contextlib import suppress

import pytest

from lora_cli.bounds import OutOfBounds, bounded


def go_on_for_ever() -> None:
    while True:
        with suppress(Exception):  # as a template or a library might: the alarm isn't stopped by it
            sum(range(1000))


def test_a_block_that_takes_too_long_is_ended():
    began = time.monotonic()
    with pytest.raises(OutOfBounds, match=r"longer than 0\.2 seconds"), bounded(seconds=0.2):
        go_on_for_ever()
    assert time.monotonic() - began < 2


def test_a_block_that_takes_too_much_memory_is_ended():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(OutOfBounds, match=r"more than 0\.0625 GiB"), bounded(memory_bytes=1 << 26):
        bytearray(1 << 28)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert len(bytearray(1 << 28)) == 1 << 28, "afterwards there is room again"


def test_what_stays_within_is_left_alone():
    with bounded(seconds=0.2):
        pass
    time.sleep(0.3)  # no alarm comes late
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_errors_pass_and_the_alarm_is_off():
    with pytest.raises(KeyError), bounded(seconds=5):
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_the_block_runs_without():
    done = []

    def work() -> None:
        with bounded(seconds=0.01):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
