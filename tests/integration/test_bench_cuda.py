"""The bench for a card, on a tiny world and a CPU, with a peer that needs no environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_bench_runs_and_the_trainer_sees_the_same_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_cuda.py"), "--tiny", "--steps", "4", "--skipped", "2"]
    command += ["--only", "lora,trainer", "--profile", "lora", "--longest", "32,64", "--seconds", "400"]
    command += ["--climb", "longest-lora", "--limit", "24"]
    done = subprocess.run(
        [*command, "--world", str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    lora, trainer = [json.loads(line) for line in (tmp_path / "out" / "cuda.jsonl").read_text().splitlines()]
    assert (lora["way"], trainer["way"]) == ("lora", "trainer")
    # The same documents in the same steps, in bfloat16: another order differs by about 1e-2.
    assert lora["losses"] == pytest.approx(trainer["losses"], abs=2e-3)
    assert len(lora["losses"]) == 4 and lora["step_tokens"] == [256] * 4
    for row in (lora, trainer):
        assert len(row["timed_seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds_per_step"])
    assert (tmp_path / "out" / "profile-lora.txt").read_text().startswith("2 steps")
    (longest,) = [json.loads(line) for line in (tmp_path / "out" / "cuda-longest.jsonl").read_text().splitlines()]
    assert longest["way"] == "longest-lora" and len(longest["step_peaks"]) == 2 and "error" not in longest
    assert longest["limit_bytes"] == 24 * 2**30 and longest["base"] == "bf16"
