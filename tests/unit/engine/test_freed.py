"""Memory kept from one step to the next."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from lora_cli.engine.freed import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12_000_000)  # above 32 MiB, to which glibc adapts by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
kept = keep_freed_memory()
faults()
print(kept, without, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
def test_freed_memory_is_used_again() -> None:
    """In a process of its own: the setting stays for good."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    kept, without, within = done.stdout.split()
    if kept == "False":
        pytest.skip("no glibc, or its variables are set")
    assert int(without) > 1000
    assert int(within) < int(without) / 20


def test_glibcs_own_variables_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_cli.engine.freed import keep_freed_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False
