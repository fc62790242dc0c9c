"""One way as a child process on a card, and the next one already importing while it runs.

A child imports what it needs and then waits for the card: what it imports costs no time on the device. Memory of the
whole card is sampled beside it, because PyTorch doesn't see what the driver and other libraries take.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cuda_ways import CudaWay
from bench.cuda_world import Shape
from bench.watch import TOLD_LATER

WATCH = Path(__file__).parent / "watch.py"
_FULL = re.compile("out of memory|OutOfMemoryError", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """What is asked of every way."""

    folder: Path
    """The world; reports and logs go to `FOLDER/reports`."""
    shape: Shape
    steps: int
    profiled: frozenset[str] = frozenset()
    """Ways that take two more steps, under the profiler."""
    paths: dict[str, str] | None = None
    """By tool, folders of packages that come before all others."""
    limit_gib: float | None = None
    """What a way that climbs may have of the card; all of it if None."""


class Child:
    """A process that is born importing, and trains when it is told to."""

    def __init__(self, way: CudaWay, asked: Asked) -> None:
        self.way, self.asked = way, asked
        reports = asked.folder / "reports"
        reports.mkdir(exist_ok=True)
        self.report, self.log, self.ready = (reports / f"{way.name}.{end}" for end in ("json", "txt", "ready"))
        for old in (self.report, self.ready):
            old.unlink(missing_ok=True)
        more = 2 if way.name in asked.profiled else 0
        steps = len(way.ladder) or asked.steps
        options = ["--each"] if way.ladder else []
        options += ["--limit", str(asked.limit_gib)] if way.ladder and asked.limit_gib else []
        options += ["--profile", str(more), "--ready", str(self.ready), "--import", way.imports]
        program = way.program(asked.folder, asked.shape, steps + (0 if way.ladder else TOLD_LATER))
        self._out = self.log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(WATCH), str(self.report), str(steps), *options, "--", *program],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=asked.folder,  # Unsloth writes where it stands
            env=child_environment((asked.paths or {}).get(way.tool)),
        )

    def train(self, seconds: float, deadline: float) -> dict[str, Any]:
        """Let it have the card; its report, `error` in it where it came to no end.

        Args:
            seconds: for its run, from when it is ready.
            deadline: by `time.monotonic`; it is ended then in any case.
        """
        while not self.ready.exists() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        began = time.monotonic()
        deadline = min(deadline, began + seconds)
        with CardMemory() as card:
            try:
                if self.process.poll() is None:
                    assert self.process.stdin is not None
                    self.process.stdin.write("go\n")
                    self.process.stdin.flush()
                code = self.process.wait(max(0.1, deadline - time.monotonic()))
                error = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                error = "no end in time"
            self.end()
        report: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8")) if self.report.exists() else {}
        report |= {"run_seconds": time.monotonic() - began, "card_bytes": card.most}
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if len(report.get("step_seconds", ())) < (len(self.way.ladder) or self.asked.steps) - 1:
            report["error"] = _why(error, text)
            report["last_lines"] = "\n".join(text.splitlines()[-12:])[-1500:]
        told = self.way.told(self.asked.folder, text)[: self.asked.steps]
        return report | {"losses": [loss for loss, _ in told], "step_tokens": [tokens for _, tokens in told]}

    def end(self) -> None:
        """It and nothing else."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._out.close()


def _why(error: str, log: str) -> str:
    """What ended a way before its steps were taken; a full card is named by whichever words its tool has for it."""
    if error != "no end in time" and _FULL.search("\n".join(log.splitlines()[-40:])):
        return "out of memory"
    return error or "it ended before its steps were taken"


def warmed(ways: Sequence[CudaWay], asked: Asked) -> list[subprocess.Popen[bytes]]:
    """Processes that import what the ways' tools import, so that no way pays for a cold disk; they see no card."""
    modules = {"lora": "peft, bitsandbytes", "trl": "trl, peft, bitsandbytes", "unsloth": "unsloth, trl"}
    (asked.folder / "warm").mkdir()
    return [
        subprocess.Popen(
            ["nice", sys.executable, "-c", f"import {modules[tool]}"],
            cwd=asked.folder / "warm",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=child_environment((asked.paths or {}).get(tool)) | {"CUDA_VISIBLE_DEVICES": ""},
        )
        for tool in sorted({way.tool for way in ways} & modules.keys())
    ]


class CardMemory:
    """The most memory that the whole card had in use meanwhile, in bytes, by nvidia-smi; None without a card."""

    def __init__(self) -> None:
        self.most: int | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> CardMemory:
        if shutil.which("nvidia-smi") is not None:
            command = [
                "nvidia-smi",
                "--query-gpu=memory.used",
                "--format=csv,noheader,nounits",
                "--id=0",
                "-lms",
                "200",
            ]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.most = max(self.most or 0, int(line) * 2**20)


def child_environment(path: str | None) -> dict[str, str]:
    root = str(WATCH.parents[2])
    paths = [each for each in (path, root, os.environ.get("PYTHONPATH")) if each]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }
