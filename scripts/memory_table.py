"""Measured rows as a table for the eye: predicted, measured and signed error, and their spread."""

from __future__ import annotations

from statistics import median
from typing import Any

GIB = 2**30
FIGURES = ("allocated", "reserved", "process")


def with_errors(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the percentages by which the prediction is off, where there are both figures."""
    predicted, measured = row.get("predicted", {}), row.get("measured", {})
    errors = {
        f"{name}_error_percent": 100 * (predicted[f"{name}_bytes"] / measured[f"{name}_bytes"] - 1)
        for name in FIGURES
        if measured.get(f"{name}_bytes") and predicted.get(f"{name}_bytes") and "error" not in measured
    }
    return {**row, **errors}


def print_table(result: dict[str, Any]) -> None:
    rows = result["rows"]
    wide = max((len(row["id"]) for row in rows), default=0)
    heads = " ".join(f"{name:>8} measured   error" for name in FIGURES)
    print(f"{'GiB':{wide}}  {heads}")
    for row in rows:
        print(f"{row['id']:{wide}}  {_cells(row)}")
    for name in FIGURES:
        errors = [row[f"{name}_error_percent"] for row in rows if f"{name}_error_percent" in row]
        if errors:
            middle = median(map(abs, errors))
            spread = f"median {middle:.2f} %, lowest {min(errors):+.2f} %, highest {max(errors):+.2f} %"
            print(f"{name:9}  {len(errors)} rows: {spread}")
    for row in rows:
        measured = row.get("measured", {})
        if "bare_context_bytes" in measured:
            bare, whole = (measured[key] / 2**20 for key in ("bare_context_bytes", "context_bytes"))
            print(f"context of {row['id']}, alone: {bare:.0f} MiB bare, {whole:.0f} MiB after two steps")
    for pair in result["edges"]:
        words = [f"{kind} {pair.get(f'{key}_tokens')}: {_word(pair.get(kind))}" for kind, key in _PAIR]
        print(f"edge {pair['id']} at {pair['cap_bytes'] / GIB:g} GiB  {'  '.join(words)}  {pair.get('error', '')}")
    if result["left_out"]:
        print(f"left out: {', '.join(result['left_out'])}")


_PAIR = (("fitting", "fits"), ("failing", "fails"))


def _word(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not run"
    return str(measured.get("error", f"ran, {measured.get('reserved_bytes', 0) / GIB:.2f} reserved"))[:100]


def _cells(row: dict[str, Any]) -> str:
    for kind in ("predicted", "measured"):
        if "error" in row.get(kind, {}):
            return f"{kind}: {row[kind]['error'][:100]}"
    return " ".join(
        f"{_gib(row, 'predicted', name)} {_gib(row, 'measured', name)} {_percent(row, name)}" for name in FIGURES
    )


def _gib(row: dict[str, Any], kind: str, name: str) -> str:
    size = row.get(kind, {}).get(f"{name}_bytes")
    return f"{'-':>8}" if size is None else f"{size / GIB:8.3f}"


def _percent(row: dict[str, Any], name: str) -> str:
    error = row.get(f"{name}_error_percent")
    return f"{'-':>7}" if error is None else f"{error:+6.2f}%"
