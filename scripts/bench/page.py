"""The measurements as a table and a plot, for the terminal and for docs/speed.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_HEAD = (
    "way",
    "dtype",
    "tokens/s",
    "lora is faster",
    "first step",
    "whole run",
    "peak memory",
    "of matmul peak",
    "mean loss",
)


def table(rows: Sequence[Row]) -> str:
    """Markdown, in the order of the rows."""
    base = next((row for row in rows if row["way"] == "lora"), rows[0])
    lines = [" | ".join(_HEAD), "|".join("---" for _ in _HEAD)]
    for row in rows:
        cells = (
            row["says"],
            row["dtype"],
            f"{row['tokens_per_second']:,.0f}",
            f"{base['tokens_per_second'] / row['tokens_per_second']:.2f} times",
            f"{row['first_step_seconds']:.1f} s",
            f"{row['wall_seconds']:.1f} s",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{row['share_of_peak']:.1%}",
            f"{sum(row['losses']) / len(row['losses']):.4f}",
        )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def read_rows(path: Path) -> list[Row]:
    """The last row of each way."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({row["way"]: row for row in rows}.values())


def put_between(page: Path, begin: str, end: str, body: str) -> None:
    """Put lines between two marks of a page, in the place of those that are there."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")


def write_page(path: Path, docs: Path) -> None:
    """Put table and plot of the rows in `path` into docs/speed.md and docs/speed.svg."""
    rows = read_rows(path)
    put_between(docs / "speed.md", BEGIN, END, table(rows))
    (docs / "speed.svg").write_text(plot(rows), encoding="utf-8")


def plot(rows: Sequence[Row]) -> str:
    """Bars of tokens per second."""
    most = max(row["tokens_per_second"] for row in rows)
    pitch, left, width = 26, 230, 760
    height = pitch * len(rows) + 34
    box = f'viewBox="0 0 {width} {height}" font-size="13" font-family="sans-serif"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="12" y="18" font-weight="bold">tokens per second, padding not counted</text>',
    ]
    for number, row in enumerate(rows):
        y = 30 + number * pitch
        length = row["tokens_per_second"] / most * (width - left - 80)
        colour = "#2f6f4f" if row["way"].startswith("lora") else "#9aa5b1"
        parts.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(row["says"].replace("`", ""))}</text>'
        )
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="19" fill="{colour}"/>')
        parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 15}">{row["tokens_per_second"]:,.0f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
