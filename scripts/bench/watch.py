"""Run a program as it is, and note when the device ended each of its optimizer steps and how much memory it took.

    python watch.py REPORT STEPS [--profile N] [--each] [--limit GIB] [--ready FILE] [--import NAME,NAME] \
        -- PROGRAM.py ARGUMENT...
    python watch.py REPORT STEPS ... -- -m MODULE ARGUMENT...

PyTorch's hook behind every optimizer step leaves an event on the device's stream: nothing waits, so that the program
runs as it would alone. After STEPS the report is written, the profiler sees N more, at most 2, and with the third step
the process ends; nothing is saved, since what a trainer does behind its last step isn't asked for. With `--ready`, the
modules are imported, the file is made, and a line on standard input is waited for: a process can import while the one
before it still has the card. With `--each`, the report is written behind each step, with the step's own peak of memory:
that waits for the device. With `--limit`, the program sees a card of so much memory and no more. Knows nothing of the
program.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

TOLD_LATER = 3
"""Steps that are taken behind those that are measured; the profiler sees some of them."""
BORN = time.perf_counter()


class Watch:
    """Sees every optimizer step of this process that moves parameters on the device."""

    def __init__(self, arguments: argparse.Namespace, said: dict[str, Any]) -> None:
        import torch

        self.report, self.steps, self.profiled, self.each = (
            arguments.report,
            arguments.steps,
            arguments.profile,
            arguments.each,
        )
        self.said = said
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.marks: list[Any] = []
        self.profiler: Any = None

    def __call__(self, optimizer: Any, *_: Any) -> None:
        """Behind a step."""
        import torch

        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        if first is None or first.is_meta or first.device.type != self.device:  # rehearsed on `meta`
            return
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.device == "cuda" else time.perf_counter())
        if self.device == "cuda":
            self.marks[-1].record()
        if len(self.marks) == 1:
            if self.device == "cuda":
                self.marks[0].synchronize()
            self.said["first_step_seconds"] = time.perf_counter() - self.said.pop("began")
            self.write()
        if self.each:
            self._note_peak()
        if len(self.marks) == self.steps:
            self.write()
            if self.profiled:
                self._start_profiler()
        if len(self.marks) == self.steps + self.profiled and self.profiler is not None:
            self._stop_profiler()
        # A few more, since a trainer may tell of a step's loss two steps later; none where a step can take minutes.
        if len(self.marks) >= self.steps + (0 if self.each else TOLD_LATER):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def write(self) -> None:
        """What is known by now."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            took = [a.elapsed_time(b) / 1000 for a, b in pairwise(self.marks)]
            memory = {
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
                "total_bytes": torch.cuda.mem_get_info()[1],
            }
        else:
            took = [b - a for a, b in pairwise(self.marks)]
            memory = {}
        versions = {name: getattr(sys.modules[name], "__version__", "?") for name in _VERSIONS if name in sys.modules}
        if "flash_attn.cute" in sys.modules:
            versions["flash-attn-4"] = version("flash-attn-4")
        report = self.said | memory | {"step_seconds": took, "versions": versions}
        self.report.write_text(json.dumps(report), encoding="utf-8")

    def _note_peak(self) -> None:
        import torch

        peaks = self.said.setdefault("step_peaks", [])
        if self.device == "cuda":
            torch.cuda.synchronize()
            peaks.append([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()])
            torch.cuda.reset_peak_memory_stats()
        else:
            peaks.append([0, 0])
        self.write()

    def _start_profiler(self) -> None:
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device == "cuda" else []
        self.profiler = torch.profiler.profile(activities=kinds)
        self.profiler.start()

    def _stop_profiler(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        self.profiler.stop()
        from bench.profiles import profile_page

        page = profile_page(self.profiler, self.profiled, self.device)
        self.report.with_suffix(".profile.txt").write_text(page, encoding="utf-8")


_VERSIONS = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger_kernel", "unsloth")


def limit_card(limit_bytes: int) -> None:
    """Let PyTorch's allocator have so much of the card, as a smaller one would, and let the program know: some look at
    what is free before they choose how. Nothing on a CPU, or where the card is no larger.

    The card isn't touched before the program does: how its allocator works is told by variables that tools set late.
    The total stays what it is, since whoever asks for the fraction multiplies it with that.
    """
    import torch

    whole = torch.cuda.mem_get_info

    def as_smaller(device: Any = None) -> tuple[int, int]:
        free, total = whole(device)
        return max(0, min(free, limit_bytes - torch.cuda.memory_reserved(device))), total

    def limit() -> None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if limit_bytes < total:
            torch.cuda.set_per_process_memory_fraction(limit_bytes / total)

    if torch.cuda.is_available():
        torch.cuda.mem_get_info = as_smaller  # at once: asking may be what begins CUDA
        torch.cuda._lazy_call(limit)


def main() -> None:
    """Import, wait, watch, run."""
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--limit", type=float, help="GiB")
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--import", dest="imports", default="")
    arguments = parser.parse_args(sys.argv[1:split])
    program = sys.argv[split + 1 :]
    said: dict[str, Any] = {}
    for name in filter(None, arguments.imports.split(",")):
        importlib.import_module(name)
    said["import_seconds"] = time.perf_counter() - BORN
    if arguments.ready:
        arguments.ready.touch()
        if not sys.stdin.readline():
            sys.exit("nobody is waiting")
    said["began"] = time.perf_counter()
    if arguments.limit:
        limit_card(int(arguments.limit * 2**30))
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(Watch(arguments, said))
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no module of it by its bare name
    main()
