"""The bench of sweeps on a card, on a tiny world and a CPU."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.benches import run_bench


def test_both_ways_are_run_and_agree(tmp_path: Path) -> None:
    options = ("--steps", "3", "--skipped", "1", "--sizes", "4", "--runs", "1", "--seconds", "400")
    out = run_bench(tmp_path, "bench_sweep_cuda.py", *options)
    rows = [json.loads(line) for line in (out / "cuda-sweep.jsonl").read_text().splitlines()]
    assert [row["way"] for row in rows] == ["in turn", "side by side"]
    in_turn, side_by_side = rows
    assert in_turn["largest_difference_from_alone"] == 0.0  # the very passes of a run of its own
    assert 0.0 < side_by_side["largest_difference_from_in_turn"] < 2e-3  # and here others
    assert {row["runs_measured"] for row in rows} == {1} and {row["steps"] for row in rows} == {3}
    assert all(0 < row["round_seconds"] < row["step_seconds"] < row["seconds"] for row in rows)
    assert not (tmp_path / "bench-sweep").exists()
