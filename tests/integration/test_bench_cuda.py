"""The bench for a card, on a tiny world and a CPU, with a peer that needs no environment of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.benches import run_bench


def test_the_bench_runs_and_the_trainer_sees_the_same_steps(tmp_path: Path) -> None:
    options = ["--steps", "4", "--skipped", "2", "--only", "lora,trainer", "--profile", "lora", "--seconds", "400"]
    options += ["--longest", "32,64", "--climb", "longest-lora", "--limit", "24"]
    out = run_bench(tmp_path, "bench_cuda.py", *options)
    lora, trainer = [json.loads(line) for line in (out / "cuda.jsonl").read_text().splitlines()]
    assert (lora["way"], trainer["way"]) == ("lora", "trainer")
    # The same documents in the same steps, in bfloat16: another order differs by about 1e-2.
    assert lora["losses"] == pytest.approx(trainer["losses"], abs=2e-3)
    assert len(lora["losses"]) == 4 and lora["step_tokens"] == [256] * 4
    for row in (lora, trainer):
        assert len(row["timed_seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds_per_step"])
    assert (out / "profile-lora.txt").read_text().startswith("2 steps")
    (longest,) = [json.loads(line) for line in (out / "cuda-longest.jsonl").read_text().splitlines()]
    assert longest["way"] == "longest-lora" and len(longest["step_peaks"]) == 2 and "error" not in longest
    assert longest["limit_bytes"] == 24 * 2**30 and longest["base"] == "bf16"
