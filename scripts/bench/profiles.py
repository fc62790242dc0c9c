"""A profile as a page: where the device's time goes, by class of kernel and kernel by kernel, and how long it idles.

Knows nothing of what was profiled.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("copies and fills", r"^mem(cpy|set)|copy_kernel|direct_copy|CatArrayBatchedCopy|FillFunctor"),
        ("attention", r"flash|fmha|attention|attn|sdpa|cudnn_generated_fort_native_sdpa|efficient_attention"),
        ("cross-entropy", r"cross_entropy|softmax|nll_loss|logsumexp|linear_cross"),
        ("dequantize", r"dequant|quantize|kgemm_4bit|gemv_4bit"),
        ("matrix products", r"gemm|gemv|nvjet|cutlass|wgmma|splitk|cublas|_mm\b|matmul|s16816|xmma"),
        ("optimizer", r"multi_tensor|adam|lpnorm|foreach"),
        ("collectives", r"nccl"),
        ("Triton", r"^[a-z_][a-z0-9_]*$"),
        ("reductions", r"reduce_kernel|reduce"),
        ("elementwise", r"elementwise|vectorized|at::native"),
    )
)
"""The first that is found in a kernel's name has it. Triton's kernels carry plain Python names, ATen's C++ ones."""


@dataclass(frozen=True)
class Kernel:
    """One run of one kernel on the device; times in microseconds."""

    name: str
    start: float
    end: float


def class_of(name: str) -> str:
    """The class of a kernel, by its name."""
    return next((label for label, pattern in CLASSES if pattern.search(name)), "other")


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them ran."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda each: each.start):
        total += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return total


def page_of(kernels: list[Kernel], steps: int, host: Iterable[str] = (), most: int = 25) -> str:
    """The table, per step."""
    span = max(k.end for k in kernels) - min(k.start for k in kernels)
    idle = span - busy(kernels)
    by_class: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_class[class_of(kernel.name)].append(kernel.end - kernel.start)
        by_name[kernel.name].append(kernel.end - kernel.start)
    lines = [f"{steps} steps, {span / steps / 1000:.2f} ms each, {len(kernels) // steps:,} kernels a step", ""]
    lines += [f"{'class':<20}{'ms/step':>10}{'share':>9}{'kernels/step':>14}"]
    rows = [(name, sum(each), len(each)) for name, each in by_class.items()] + [("idle", idle, 0)]
    for name, total, count in sorted(rows, key=lambda row: -row[1]):
        lines.append(f"{name:<20}{total / steps / 1000:>10.2f}{total / span:>9.1%}{count / steps:>14,.0f}")
    lines += ["", f"{'ms/step':>9}{'share':>8}{'calls':>8}{'mean us':>10}  kernel"]
    for name, each in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:most]:
        total = sum(each)
        lines.append(
            f"{total / steps / 1000:>9.2f}{total / span:>8.1%}{len(each) / steps:>8,.0f}{total / len(each):>10.1f}"
            f"  [{class_of(name)}] {name[:150]}"
        )
    return "\n".join([*lines, *host]) + "\n"


def _kernels(profiler: Any, device: str) -> Iterator[Kernel]:
    for event in profiler.events():
        if event.is_user_annotation or (event.device_type.name == "CUDA") != (device == "cuda"):
            continue
        if device == "cpu" and event.cpu_children:  # its children are counted
            continue
        yield Kernel(event.name, event.time_range.start, event.time_range.end)


def profile_page(profiler: Any, steps: int, device: str) -> str:
    """The page of a stopped `torch.profiler.profile` over so many steps; on a CPU, operations instead of kernels."""
    kernels = list(_kernels(profiler, device))
    host = []
    if device == "cuda":
        averages = profiler.key_averages()
        heaviest = sorted(averages, key=lambda each: -each.self_cpu_time_total)[:15]
        host = ["", f"{'ms/step':>9}{'calls':>8}  on the host (self)"] + [
            f"{each.self_cpu_time_total / steps / 1000:>9.2f}{each.count / steps:>8,.0f}  {each.key[:100]}"
            for each in heaviest
        ]
    return page_of(kernels, steps, host)
