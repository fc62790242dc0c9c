"""The bench of sweeps on a card, on a tiny world and a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_ways_are_run_and_agree(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_sweep_cuda.py"), "--tiny", "--steps", "3"]
    command += ["--skipped", "1", "--sizes", "4", "--runs", "1", "--seconds", "400"]
    done = subprocess.run(
        [*command, "--world", str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "cuda-sweep.jsonl").read_text().splitlines()]
    assert [row["way"] for row in rows] == ["in turn", "side by side"]
    in_turn, side_by_side = rows
    assert in_turn["largest_difference_from_alone"] == 0.0  # the very passes of a run of its own
    assert 0.0 < side_by_side["largest_difference_from_in_turn"] < 2e-3  # and here others
    assert {row["runs_measured"] for row in rows} == {1} and {row["steps"] for row in rows} == {3}
    assert all(0 < row["round_seconds"] < row["step_seconds"] < row["seconds"] for row in rows)
    assert not (tmp_path / "bench-sweep").exists()
