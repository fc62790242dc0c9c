"""Our own trainer's memory on this card against what was predicted: `python -m pytest tests/gpu/test_memory.py -s`.

Measures every case of scripts/memory_cases.py with scripts/measure_memory.py, and leaves the rows, misses included, in
docs/measurements.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured():
    script = ROOT / "scripts" / "measure_memory.py"
    subprocess.run([sys.executable, str(script)], check=False)  # its exit code says what the tests say better
    newest = max((ROOT / "docs" / "measurements").glob("memory-*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))


def errors(measured, name):
    return {row["id"]: row[f"{name}_error_percent"] for row in measured["rows"] if f"{name}_error_percent" in row}


def test_every_case_ran(measured):
    assert not measured["left_out"]
    failed = {row["id"]: row["measured"]["error"] for row in measured["rows"] if "error" in row["measured"]}
    assert not failed
    assert len(measured["rows"]) >= 40


def test_allocated_memory_is_as_predicted(measured):
    found = errors(measured, "allocated_bytes")
    assert max(map(abs, found.values())) <= 2, found


def test_reserved_memory_is_as_predicted(measured):
    found = errors(measured, "reserved_bytes")
    assert median(map(abs, found.values())) <= 2, found
    assert min(found.values()) >= -3, found


def test_what_is_said_to_fit_runs_and_what_is_not_fails(measured):
    assert len(measured["edges"]) >= 3
    for pair in measured["edges"]:
        assert "error" not in pair["fitting"], pair
        assert "OutOfMemory" in pair["failing"]["error"], pair
