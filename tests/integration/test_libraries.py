"""Imports with the garbage collector standing still: it runs again afterwards, and passes over what was imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, sys
from lora_cli.cli.libraries import load_libraries
heard, collected = [], []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
load_libraries(heard.append)
assert {"torch", "peft", "transformers.models.auto.modeling_auto"} <= set(sys.modules)
assert not collected, len(collected)
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
assert [event.what for event in heard] == ["loading PyTorch and transformers"]
frozen, kept = gc.get_freeze_count(), []
kept.append(kept)
load_libraries(heard.append)  # a second time freezes nothing: there could be garbage by now
assert len(heard) == 1 and gc.get_freeze_count() <= frozen
"""


def test_the_collector_stands_still_and_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
