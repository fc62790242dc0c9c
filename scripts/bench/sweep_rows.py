"""What sweeps and runs alone came to on a card: rows of figures, from the run folders that they left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.relay import Done

TOLERANCE = 2e-3
"""Of a loss, by which it may differ."""
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    arguments: tuple[str, ...]
    way: str
    """`warm`, `alone`, `in turn`, `side by side`."""
    size: int
    """Rows a step."""
    output: Path

    @property
    def is_sweep(self) -> bool:
        return self.way in ("in turn", "side by side")


class Table:
    """What the commands came to, and rows as soon as all of them can be told."""

    def __init__(self, skipped: int, alone_size: int, common: dict[str, Any]) -> None:
        self.skipped, self.alone_size, self.common = skipped, alone_size, common
        self.failed = False
        self._alone: list[dict[str, Any]] = []
        self._losses: dict[tuple[str, int], Losses] = {}

    def add(self, job: Job, done: Done) -> dict[str, Any] | None:
        """A sweep's row, also of one that failed; of other commands None."""
        self.failed |= done.error is not None
        asked = {"way": job.way, "rows_per_step": job.size}
        if done.error is not None:
            last = "\n".join(done.log.splitlines()[-12:])[-1500:]
            return asked | {"error": done.error, "last_lines": last} | self.common if job.is_sweep else None
        if job.way == "warm":
            return None
        runs = sorted(file.parent for file in job.output.rglob("metrics.jsonl"))
        lines = {run.name: _steps(run) for run in runs}
        found = self._figures(lines, done)
        self._losses[job.way if job.is_sweep else job.name, job.size] = {
            name: [line["loss"] for line in each] for name, each in lines.items()
        }
        if not job.is_sweep:
            own = json.loads((job.output / "summary.json").read_text(encoding="utf-8"))
            self._alone.append(found | {"step_seconds": own["train_seconds"]})
            return None
        board = json.loads((job.output / "leaderboard.json").read_text(encoding="utf-8"))
        found |= {"step_seconds": board["train_seconds"]} | self._runs(job) | self._apart(job)
        self.failed |= any(value > TOLERANCE for key, value in found.items() if key.startswith("largest_"))
        return asked | found | self.common

    def _figures(self, lines: dict[str, list[dict[str, Any]]], done: Done) -> dict[str, Any]:
        """Of one command: its seconds, and the median of its rounds."""
        taken = [[line["num_tokens"] / line["tokens_per_second"] for line in each] for each in lines.values()]
        rounds = [sum(each) for each in zip(*taken, strict=True)][self.skipped :]
        every = [line["num_tokens"] for each in lines.values() for line in each]
        return {
            "steps": len(taken[0]),
            "tokens_per_step": statistics.fmean(every),
            "seconds": done.seconds,
            "round_seconds": statistics.median(rounds),
            "rounds_seconds": rounds,
            "peak_memory_bytes": max((line["peak_memory_bytes"] or 0) for each in lines.values() for line in each),
        }

    def _runs(self, job: Job) -> dict[str, Any]:
        """Eight runs alone, by those that were measured; where they had as many rows a step."""
        if job.size != self.alone_size or not self._alone:
            return {"runs_measured": 0}
        keys = ("seconds", "step_seconds", "round_seconds")
        counted = {f"runs_{key}": 8 * statistics.fmean(each[key] for each in self._alone) for key in keys}
        return {"runs_measured": len(self._alone)} | counted

    def _apart(self, job: Job) -> dict[str, Any]:
        """The largest difference of a loss, as a share of it: from the runs alone, and from the members in turn."""
        own, found = self._losses[job.way, job.size], {}
        alone = {name: each for (name, size), each in self._losses.items() if size == job.size and name in own}
        if alone:
            found["largest_difference_from_alone"] = max(
                _apart(own[name], losses) for name, each in alone.items() for losses in each.values()
            )
        in_turn = self._losses.get(("in turn", job.size))
        if job.way == "side by side" and in_turn is not None:
            found["largest_difference_from_in_turn"] = max(_apart(own[name], in_turn[name]) for name in own)
        return found


def _steps(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "loss" in line]


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


def said(job: Job, done: Done, row: dict[str, Any] | None) -> str:
    """A few lines as soon as a command is over."""
    began = f"{job.name}: {done.seconds:.1f} s whole, of which imports {done.import_seconds:.1f} s"
    if done.error:
        return f"{job.name}: {done.error} after {done.run_seconds:.0f} s\n" + "\n".join(done.log.splitlines()[-12:])
    if row is None:
        return began
    lines = [f"{began}, steps {row['step_seconds']:.1f} s, a round {1000 * row['round_seconds']:.1f} ms"]
    lines += [f"  {row['steps']} steps of 8 members, {row['tokens_per_step']:,.0f} tokens each"]
    if row["runs_measured"]:
        whole, steps, a_round = (row[f"runs_{key}"] for key in ("seconds", "step_seconds", "round_seconds"))
        lines += [
            f"  8 runs, by {row['runs_measured']}: whole {whole:.1f} s, {whole / row['seconds']:.2f} times",
            f"    steps {steps:.1f} s, {steps / row['step_seconds']:.2f} times",
            f"    a round {1000 * a_round:.1f} ms, {a_round / row['round_seconds']:.2f} times",
        ]
    for key, value in row.items():
        if key.startswith("largest_"):
            lines += [f"  {key.replace('_', ' ')}: {value:.1e}{' TOO MUCH' if value > TOLERANCE else ''}"]
    return "\n".join(lines)
