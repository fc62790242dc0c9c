"""What is to be measured on a card: enough of it, of every sort, and the measuring itself runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))


def test_there_are_at_least_forty_cases_of_every_sort() -> None:
    from memory_cases import cases

    found = cases()
    assert len({case.id for case in found}) == len(found) >= 40
    assert {case.method for case in found} >= {"lora", "nf4", "full"}
    assert len({case.vocab_size for case in found}) == 3
    assert {case.checkpointing for case in found} == {True, False}
    assert min(case.tokens for case in found) == 512
    assert max(case.tokens for case in found) == 32_768
    assert {case.optim for case in found} >= {"adamw_torch", "adamw_8bit", "paged_adamw_8bit"}


def test_a_dry_run_predicts_and_takes_two_steps_on_the_cpu() -> None:
    command = [sys.executable, str(SCRIPTS / "measure_memory.py"), "--dry-run", "--only", "lora-32000-plain-512"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(found["rows"]) == 1
    predicted = found["rows"][0]["predicted"]
    assert 0 < predicted["allocated_bytes"] <= predicted["reserved_bytes"] < predicted["process_bytes"]
    assert len(found["on_cpu"]["losses"]) == 2
