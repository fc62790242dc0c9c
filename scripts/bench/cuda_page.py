"""The measurements on a card as a table, for the terminal and for docs/speed.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cuda_ways import CUDA_WAYS
from bench.page import put_between

Row = dict[str, Any]
BEGIN, END = "<!-- cuda: begin -->", "<!-- cuda: end -->"
_HEAD = (
    "way",
    "base",
    "tokens/s",
    "lora is faster",
    "of matmul peak",
    "ms a step (spread)",
    "allocated",
    "reserved",
    "on the card",
    "first step",
    "mean loss",
)


def cuda_table(rows: Sequence[Row]) -> str:
    """Markdown, in the order of the rows; a failed way has its error's last line."""
    lines = [" | ".join(_HEAD), "|".join("---" for _ in _HEAD)]
    for row in rows:
        says = f"{row['says']} | {'NF4' if row['base'] == 'nf4' else 'bf16'}"
        if "error" in row:
            last = (row["last_lines"].splitlines() or [""])[-1]
            lines.append(f"{says} | failed: {row['error']}: {last[:120].replace('|', '/')}" + " |" * (len(_HEAD) - 3))
        else:
            lines.append(f"{says} | {' | '.join(_cells(row, rows))}")
    return "\n".join(f"| {line} |" for line in lines)


_LIKE = ("base", "checkpointing")


def _is_ours(row: Row) -> bool:
    return "error" not in row and row["way"] in ("lora", "lora-ckpt", "qlora", "qlora-ckpt")


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """What stands behind way and base. lora is compared as it is by default, with the same base and checkpointing."""
    ours = next((each for each in rows if _is_ours(each) and all(each[key] == row[key] for key in _LIKE)), None)
    faster = f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f} times" if ours else "-"
    timed, peak = row["timed_seconds"], row["matmul_peak_flops"]
    share = 4 * row["multiplied_parameters"] * row["tokens_per_second"] / peak if peak else None
    return [
        f"{row['tokens_per_second']:,.0f}",
        faster,
        f"{share:.1%}" if share else "-",
        f"{1000 * row['seconds_per_step']:.1f} ({1000 * min(timed):.1f} to {1000 * max(timed):.1f})",
        *(_gib(row.get(key)) for key in ("peak_allocated_bytes", "peak_reserved_bytes", "card_bytes")),
        f"{row['import_seconds'] + row['first_step_seconds']:.1f} s",
        f"{row['mean_loss']:.4f}" if row["mean_loss"] is not None else "-",
    ]


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.1f} GiB"


def longest_table(rows: Sequence[Row]) -> str:
    """Peaks of memory over the length of a single document, the longest that trained, and where a straight line through
    the two longest meets the card's memory: an estimate, since a step of that length takes minutes."""
    ladder = rows[0]["ladder"]
    head = ["way", *(f"{length:,}" for length in ladder), "longest that trained", "by a straight line", "ended by"]
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for row in rows:
        peaks = [peak for peak, _ in row.get("step_peaks", [])]
        cells = [_gib(peak) for peak in peaks] + ["-"] * (len(ladder) - len(peaks))
        longest = f"{ladder[len(peaks) - 1]:,}" if peaks else "-"
        lines.append(" | ".join([row["says"], *cells, longest, _by_line(row, peaks), row.get("error", "the list")]))
    return "\n".join(f"| {line} |" for line in lines)


def _by_line(row: Row, peaks: Sequence[int]) -> str:
    """Tokens, rounded down to a thousand."""
    ladder, total = row["ladder"], row.get("total_bytes")
    if len(peaks) < 2 or not total:
        return "-"
    each = (peaks[-1] - peaks[-2]) / (ladder[len(peaks) - 1] - ladder[len(peaks) - 2])
    return f"{(ladder[len(peaks) - 1] + (total - peaks[-1]) / each) // 1000 * 1000:,.0f}"


def write_cuda_page(measurements: Path, page: Path) -> None:
    """Put a table for each file `cuda-*.jsonl` into the page, with the card and versions above it; its rows below."""
    parts = [_section(file) for file in sorted(measurements.glob("cuda-*.jsonl"))]
    for file in sorted(measurements.glob("longest-*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        parts.append(f"One document in one step, {rows[0]['card']}; peak of allocated memory:\n\n{longest_table(rows)}")
    put_between(page, BEGIN, END, "\n\n".join(parts) or "No rows have been measured yet.")


def _section(file: Path) -> str:
    """The last row of each way that was measured to the end, or of those that never were, how they failed."""
    found: dict[str, Row] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if "error" not in row or "error" in found.get(row["way"], row):
            found[row["way"]] = row
    rows = list(found.values())
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row.get("versions", {})
    first = rows[0]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    peak = first["matmul_peak_flops"] / 1e12
    head = f"{first['card']}, driver {first['driver']}; bf16 product {peak:.0f} TFLOP/s; {said}."
    missing = [f"`{way.name}`" for way in CUDA_WAYS if way.name not in found]
    absent = f"\n\nNot measured: {', '.join(missing)}." if missing else ""
    return f"{head} Rows: [measurements/{file.name}](measurements/{file.name}).\n\n{cuda_table(rows)}{absent}"
