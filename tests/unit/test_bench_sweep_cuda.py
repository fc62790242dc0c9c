"""What the bench of sweeps on a card computes from run folders, on figures that can be checked by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench.cuda_run import child_environment
from bench.relay import Done, Waiting
from bench.sweep_rows import Job, Table

DONE = Done(import_seconds=4.0, run_seconds=6.0, error=None, log="")


def run_folder(folder: Path, losses: list[float], step_seconds: float) -> None:
    """A run of steps with 100 tokens each; the first takes a second more."""
    folder.mkdir(parents=True)
    lines = [
        {"loss": loss, "num_tokens": 100, "tokens_per_second": 100 / (step_seconds + (not number)), "step": number}
        for number, loss in enumerate(losses)
    ]
    text = "".join(json.dumps(line | {"peak_memory_bytes": 5}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + json.dumps({"eval_loss": 1.0}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"train_seconds": 1 + step_seconds * len(losses)}))


def swept(folder: Path, way: str, losses: dict[str, list[float]], step_seconds: float) -> Job:
    for name, each in losses.items():
        run_folder(folder / name, each, step_seconds)
    (folder / "leaderboard.json").write_text(json.dumps({"train_seconds": 12.0}))
    return Job(folder.name, (), way, 16, folder)


def alone(folder: Path, losses: list[float], step_seconds: float) -> Job:
    run_folder(folder, losses, step_seconds)
    return Job(folder.name, (), "alone", 16, folder)


def test_eight_runs_are_counted_by_those_that_were_measured(tmp_path: Path) -> None:
    table = Table(1, 16, {"card": "X"})
    assert table.add(alone(tmp_path / "a", [2.0, 1.0, 1.0], 0.25), DONE) is None
    assert table.add(alone(tmp_path / "b", [2.0, 1.5, 1.0], 0.75), DONE) is None
    losses = {"a": [2.0, 1.0, 1.001], "b": [2.0, 1.5, 1.0]}
    row = table.add(swept(tmp_path / "s", "in turn", losses, 0.5), DONE)
    assert row is not None and row["card"] == "X" and row["runs_measured"] == 2
    assert (row["seconds"], row["runs_seconds"]) == (10.0, 80.0)
    assert row["runs_round_seconds"] == pytest.approx(8 * 0.5) and row["round_seconds"] == pytest.approx(2 * 0.5)
    assert row["runs_step_seconds"] == pytest.approx(8 * (1 + 3 * 0.5)) and row["step_seconds"] == 12.0
    assert row["largest_difference_from_alone"] == pytest.approx(1e-3) and not table.failed


def test_losses_that_lie_too_far_apart_fail(tmp_path: Path) -> None:
    """Side by side and in turn agree on `a`, which ran alone, and not on `b`."""
    table = Table(0, 16, {})
    table.add(alone(tmp_path / "a", [2.0, 1.0], 0.5), DONE)
    table.add(swept(tmp_path / "t", "in turn", {"a": [2.0, 1.0], "b": [2.0, 1.0]}, 0.5), DONE)
    assert not table.failed
    row = table.add(swept(tmp_path / "s", "side by side", {"a": [2.0, 1.0], "b": [2.0, 1.01]}, 0.5), DONE)
    assert row is not None and row["largest_difference_from_alone"] == 0.0
    assert row["largest_difference_from_in_turn"] == pytest.approx(1e-2) and table.failed


def test_a_sweep_that_failed_leaves_a_row(tmp_path: Path) -> None:
    table = Table(0, 16, {"card": "X"})
    job = Job("s", (), "in turn", 16, tmp_path / "nothing")
    row = table.add(job, Done(1.0, 2.0, "exit code 2", "first\nlast"))
    assert row is not None and row["error"] == "exit code 2" and row["last_lines"] == "first\nlast" and table.failed


def test_a_command_waits_for_the_word(tmp_path: Path) -> None:
    waiting = Waiting(["--version"], "json", tmp_path / "log.txt", child_environment(None))
    done = waiting.run(100)
    assert done.error is None and done.log.startswith("lora ") and 0 < done.import_seconds < done.seconds
    unknown = Waiting(["no-such-command"], "", tmp_path / "log.txt", child_environment(None)).run(100)
    assert unknown.error == "exit code 2" and "no-such-command" in unknown.log
