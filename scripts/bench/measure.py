"""One way as a child process: when each of its steps ended, what its losses were, how much memory it took."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bench.ways import Way


@dataclass(frozen=True)
class Run:
    """What one child did."""

    losses: list[float]
    """One for each step, in as many digits as the way gives."""
    ended: list[float]
    """Seconds from the process's start to the end of each step."""
    wall_seconds: float
    peak_memory_bytes: int
    """The most resident memory that the process ever had."""


def run_way(command: list[str], way: Way, threads: int, folder: Path) -> Run:
    """Run to the end; what it says goes to `FOLDER/logs`.

    Raises:
        RuntimeError: the child failed, or told of fewer than two steps; the message ends with what it said last.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }
    log = folder / "logs" / f"{way.name}.txt"
    log.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert child.stdout is not None
    losses, ended = [], []
    with log.open("w", encoding="utf-8") as file:
        for line in child.stdout:  # as it comes: a pipe of lines waits for no full buffer
            file.write(line)
            if (found := way.loss_in.search(line)) is not None:
                ended.append(time.perf_counter() - began)
                losses.append(float(found[1]))
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not ended:
        raise RuntimeError(f"{way.name} failed:\n{log.read_text(encoding='utf-8')[-1500:]}")
    if way.metrics is not None:
        lines = (folder / way.metrics).read_text(encoding="utf-8").splitlines()
        losses = [metrics["loss"] for line in lines if "loss" in (metrics := json.loads(line))]
    return Run(losses, ended, wall, usage.ru_maxrss * 1024)


def matmul_peak(dtype: str, threads: int, sizes: tuple[int, ...] = (1024, 2048)) -> float:
    """The most that a product of square matrices reaches here, in FLOPs per second."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        for _ in range(12):
            began = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
