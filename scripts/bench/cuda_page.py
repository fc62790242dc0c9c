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
        says = f"{_says(row)} | {'NF4' if row['base'] == 'nf4' else 'bf16'}"
        if "error" in row:
            last = (row["last_lines"].splitlines() or [""])[-1]
            lines.append(f"{says} | failed: {row['error']}: {last[:120].replace('|', '/')}" + " |" * (len(_HEAD) - 3))
        else:
            lines.append(f"{says} | {' | '.join(_cells(row, rows))}")
    return "\n".join(f"| {line} |" for line in lines)


def _says(row: Row) -> str:
    """What the way is; with FlashAttention 4 where it was installed and used."""
    return f"{row['says']}{', FlashAttention 4' if _FLASH4 in row.get('versions', {}) else ''}"


_FLASH4 = "flash-attn-4"
_LIKE = ("base", "checkpointing")


def _is_ours(row: Row) -> bool:
    return (
        "error" not in row
        and _FLASH4 not in row.get("versions", {})
        and row["way"] in ("lora", "lora-ckpt", "qlora", "qlora-ckpt")
    )


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """What stands behind way and base. lora is compared as it is without more packages, with the same base and
    checkpointing."""
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


def longest_tables(rows: Sequence[Row]) -> list[str]:
    """A table for each card, base and limit, under a line that says them; of each way the last row on a ladder."""
    groups: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in rows:
        key = (row["card"], row["base"], row["limit_bytes"])
        groups.setdefault(key, {})[row["way"], tuple(row["ladder"])] = row
    return [f"{_of_ladder(*key)}\n\n{longest_table(list(group.values()))}" for key, group in groups.items()]


def _of_ladder(card: str, base: str, limit: int | None) -> str:
    of_it = f"{_gib(limit)} of it" if limit else "all of it"
    said = {"nf4": "NF4", "bf16": "bf16"}[base]
    return f"One document in one step, base in {said}, {card}, {of_it}; peak of allocated memory:"


def longest_table(rows: Sequence[Row]) -> str:
    """Peaks of memory over the length of a single document; the longest that trained, and the seconds of its step (not
    known of the first); where a straight line through the two longest meets the memory there is: an estimate. A length
    that a way wasn't asked for is left empty."""
    lengths = sorted({length for row in rows for length in row["ladder"]})
    head = ["way", *(f"{length:,}" for length in lengths), "longest that trained", "its step"]
    head += ["by a straight line", "ended by"]
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for row in rows:
        ladder, peaks = row["ladder"], [peak for peak, _ in row.get("step_peaks", [])]
        reached = dict(zip(ladder, map(_gib, peaks), strict=False))
        cells = [reached.get(length, "-" if length in ladder else "") for length in lengths]
        longest = f"{ladder[len(peaks) - 1]:,}" if peaks else "-"
        step = f"{row['step_seconds'][len(peaks) - 2]:.1f} s" if len(peaks) > 1 else "-"
        ended = row.get("error", "the list")
        lines.append(" | ".join([_says(row), *cells, longest, step, _by_line(row, peaks), ended]))
    return "\n".join(f"| {line} |" for line in lines)


def _by_line(row: Row, peaks: Sequence[int]) -> str:
    """Tokens, rounded down to a thousand."""
    ladder, total = row["ladder"], row.get("limit_bytes") or row.get("total_bytes")
    if len(peaks) < 2 or not total or peaks[-1] <= peaks[-2]:
        return "-"
    each = (peaks[-1] - peaks[-2]) / (ladder[len(peaks) - 1] - ladder[len(peaks) - 2])
    return f"{(ladder[len(peaks) - 1] + (total - peaks[-1]) / each) // 1000 * 1000:,.0f}"


def write_cuda_page(measurements: Path, page: Path) -> None:
    """Put a table for each file `cuda-*.jsonl` into the page, with the card and versions above it and its rows below,
    and those of `longest-*.jsonl`, a table for each base and limit."""
    parts = [_section(file) for file in sorted(measurements.glob("cuda-*.jsonl"))]
    for file in sorted(measurements.glob("longest-*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        named = f"Rows: [measurements/{file.name}](measurements/{file.name})."
        parts.append("\n\n".join([*longest_tables(rows), named]))
    put_between(page, BEGIN, END, "\n\n".join(parts) or "No rows have been measured yet.")


def _section(file: Path) -> str:
    """The last row of each way that was measured to the end, or of those that never were, how they failed."""
    found: dict[tuple[str, bool], Row] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        key = (row["way"], _FLASH4 in row.get("versions", {}))
        if "error" not in row or "error" in found.get(key, row):
            found[key] = row
    rows = list(found.values())
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row.get("versions", {})
    first = rows[0]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    peak = first["matmul_peak_flops"] / 1e12
    head = f"{first['card']}, driver {first['driver']}; bf16 product {peak:.0f} TFLOP/s; {said}."
    missing = [f"`{way.name}`" for way in CUDA_WAYS if way.name not in {name for name, _ in found}]
    absent = f"\n\nNot measured: {', '.join(missing)}." if missing else ""
    return f"{head} Rows: [measurements/{file.name}](measurements/{file.name}).\n\n{cuda_table(rows)}{absent}"
