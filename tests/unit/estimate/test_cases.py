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


def test_a_dry_run_predicts_and_takes_two_steps_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "measure_memory.py"), "--dry-run", "--only", "lora-32000-plain-512"]
    subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, check=True)
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        predicted = row["predicted"]
        assert 0 < predicted["allocated_bytes"] <= predicted["reserved_bytes"] < predicted["process_bytes"]
    taken = [row["measured"]["losses"] for row in rows if row.get("measured")]
    assert taken and all(len(losses) == 2 for losses in taken)
    assert any(not row.get("measured") for row in rows)
