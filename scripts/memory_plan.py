"""Which task of `measure_memory.py` follows from which, and the rows that come of them.

Importing it imports all that the tasks need but PEFT, which brings bitsandbytes, which asks for the card: a parent that
has touched CUDA can't fork.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 - here and in the next line for the forks' sake
import transformers.models.llama.modeling_llama  # noqa: F401
from memory_cases import Case, write_config, write_weights
from memory_pool import Outcome, Task
from memory_table import with_errors
from memory_tasks import EDGE_BYTES, measure, predict, search_edge

GIB = 2**30
NO_CARD: dict[str, Any] = {"card": "dry run", "capability": (8, 0), "total_bytes": 16 * GIB}
"""For tiny cases on a CPU."""


class Plan:
    """Which task follows from which, and the rows that come of them."""

    def __init__(self, folder: Path, card: dict[str, Any], file: Path, began: float) -> None:
        self.left_out: list[str] = []
        self._began = began
        self._folder = folder
        self._card = card
        self._file = file
        self._capability = tuple(card["capability"])
        self._rows: dict[str, dict[str, Any]] = {}
        self._edges: dict[str, dict[str, Any]] = {}
        self._written: set[str] = set()
        self._open: list[Case] = []
        self._alone: set[str] = set()
        self._held: list[Task] = []

    def begin(self, chosen: Iterable[Case], alone: Iterable[Case], edges: Iterable[Case]) -> list[Task]:
        """Weights first, then what can be known without the card; measuring follows from these."""
        self._open = list(chosen)
        self._alone = {case.id for case in alone if case in self._open}
        searching = [Task(f"edge {case.id}", search_edge, (case, self._of(case), self._capability)) for case in edges]
        models = {case.model: self._of(case) for case in (*self._open, *edges)}
        writing = [Task(f"write {name}", write_weights, (folder,)) for name, folder in models.items()]
        return [*writing, *searching, *self.predicting(self._open)]

    def predicting(self, chosen: Iterable[Case]) -> list[Task]:
        chosen = list(chosen)
        self._rows |= {case.id: case.as_json() for case in chosen}
        return [Task(f"predict {case.id}", predict, (case, self._of(case), self._capability)) for case in chosen]

    def finished(self, task: Task, outcome: Outcome) -> list[Task]:
        """Note what a task found; what can be begun now."""
        kind, _, name = task.name.partition(" ")
        found = {"error": outcome["error"]} if "error" in outcome else outcome["value"] or {}
        more: list[Task] = []
        if kind == "write":
            self._written.add(name)
        elif kind == "edge":
            self._edges[name] = {"id": name, "cap_bytes": EDGE_BYTES, **found}
            more = self._pair(task.arguments[0], found)
        elif kind in ("fitting", "failing"):
            self._edges[name][kind] = found
        else:
            self._rows[name]["predicted" if kind == "predict" else "measured"] = found
            self._rows[name] = with_errors(self._rows[name])
            self._alone -= {name} if kind == "measure" else set()
        if kind != "write" or "error" in found:
            print(
                f"{time.monotonic() - self._began:5.1f} s  {task.name}  {json.dumps(found)}",
                file=sys.stderr,
                flush=True,
            )
            self.write()
        return self._next(more)

    def _next(self, more: list[Task]) -> list[Task]:
        """What sees the card waits for those that run alone on it, which need no prediction."""
        ready = [
            case
            for case in self._open
            if case.model in self._written and (case.id in self._alone or "predicted" in self._rows[case.id])
        ]
        self._open = [case for case in self._open if case not in ready]
        first = [self._measuring(case, alone=True) for case in ready if case.id in self._alone]
        self._held += more + [self._measuring(case, alone=False) for case in ready if case.id not in self._alone]
        if self._alone:
            return first
        now, self._held = self._held, []
        return first + now

    def _measuring(self, case: Case, *, alone: bool) -> Task:
        claim = self._card["total_bytes"] if alone else self._claim(case)
        return Task(f"measure {case.id}", measure, (case, self._of(case), None, alone), claim, urgent=True)

    def _claim(self, case: Case) -> int:
        """Of the card: what was predicted and a quarter more, and a context."""
        return int(1.25 * self._rows[case.id]["predicted"].get("reserved_bytes", 24 * GIB)) + 2 * GIB

    def _pair(self, case: Case, found: dict[str, Any]) -> list[Task]:
        return [
            Task(
                f"{kind} {case.id}",
                measure,
                (replace(case, tokens=found[f"{which}_tokens"]), self._of(case), EDGE_BYTES),
                EDGE_BYTES + 2 * GIB,
            )
            for kind, which in (("fitting", "fits"), ("failing", "fails"))
            if f"{which}_tokens" in found
        ]

    def _of(self, case: Case) -> Path:
        """The folder of a case's model, with its config.json."""
        folder = self._folder / case.model
        if not folder.exists():
            write_config(case, folder)
        return folder

    def result(self) -> dict[str, Any]:
        rows = list(self._rows.values())
        unmeasured = [row["id"] for row in rows if "measured" not in row and self._card is not NO_CARD]
        return {
            "made_by": self._card,
            "rows": rows,
            "edges": list(self._edges.values()),
            "left_out": sorted({*self.left_out, *(f"measure {name}" for name in unmeasured)}),
        }

    def failed(self) -> bool:
        return any("error" in row.get(kind, {}) for row in self._rows.values() for kind in ("predicted", "measured"))

    def write(self) -> None:
        self._file.write_text(json.dumps(self.result(), indent=1) + "\n")
