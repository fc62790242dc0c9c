"""Score the tracer against peaks that others measured: python scripts/score_estimator.py ROWS.json --models DIR

Each row names a model (its config.json lies in DIR) and a stock recipe, see `stock_recipe.py`; the peak is the second
step's. The recipe is rebuilt on `meta` and traced with the tracer that `lora estimate-vram` uses. No constant is fitted
to a row, a model or a recipe; what was inferred from published rows is said in docs/memory.md. A row that can't be
traced is named with the reason, and the others are scored.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from published_rows import attention_of
from stock_recipe import stock_trace

from lora_cli.engine.memory.replay import Replay, replay

MIB = 2**20
PHASES = {"forward": "peak_forward_mib", "backward": "peak_backward_mib", "update": "peak_optimizer_mib"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders, each with a config.json")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="*", help="ids of rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    given = json.loads(arguments.rows.read_text(encoding="utf-8"))
    rows = given["rows"] if isinstance(given, dict) else given
    scores, failed = [], []
    for row in rows:
        if arguments.only and row["id"] not in arguments.only:
            continue
        began = time.perf_counter()
        try:
            found = replay(stock_trace(row, arguments.models), since="step 2")
            scored = score(row, found, time.perf_counter() - began)
        except Exception as error:  # one row that can't be traced must not hide the others
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            failed.append({"id": row["id"], "reason": reason})
            print(f"{row['id']}: can't be traced: {reason}", file=sys.stderr)
            continue
        scores.append(scored)
        print(line(row, scores[-1]), file=sys.stderr, flush=True)
    columns = {name: [s[f"{name}_error_percent"] for s in scores] for name in ("allocated", "reserved")}
    columns |= {name: [s["phases"].get(name) for s in scores] for name in PHASES}
    summary = {name: spread([error for error in errors if error is not None]) for name, errors in columns.items()}
    if arguments.json:
        print(json.dumps({"rows": scores, "summary": summary, "failed": failed}, indent=2))
        return
    for name, figures in summary.items():
        if figures:
            print(f"{name:9}  " + "  ".join(f"{key} {value:+.2f} %" for key, value in figures.items()))
    print(f"{len(scores)} rows scored, {len(failed)} could not be traced")


def score(row: dict[str, Any], found: Replay, seconds: float) -> dict[str, Any]:
    allocated, reserved = found.peak_allocated_bytes / MIB, found.peak_reserved_bytes / MIB
    return {
        "id": row["id"],
        "allocated_mib": allocated,
        "reserved_mib": reserved,
        "measured_allocated_mib": row.get("peak_allocated_mib"),
        "measured_reserved_mib": row.get("peak_reserved_mib"),
        "allocated_error_percent": percent(allocated, row.get("peak_allocated_mib")),
        "reserved_error_percent": percent(reserved, row.get("peak_reserved_mib")),
        "phases": {
            name: percent(found.phases.get(name, 0) / MIB, row[key]) for name, key in PHASES.items() if row.get(key)
        },
        "peak": f"{found.moment.phase} {found.moment.place} {found.moment.operator}",
        "seconds": seconds,
    }


def line(row: dict[str, Any], scored: dict[str, Any]) -> str:
    name = f"{row['id']} {row['model'].split('/')[-1][:14]:14} {row.get('method') or 'lora':5} "
    name += f"{attention_of(row)[:5]:5} {row.get('batch') or 1:2} x {row['seq_len']:5}"
    parts = [
        f"{kind} {scored[f'measured_{kind}_mib'] or 0:8.1f} {scored[f'{kind}_mib']:8.1f} {signed(scored, kind)}"
        for kind in ("allocated", "reserved")
    ]
    phases = " ".join(f"{key[:3]} {value:+.2f}" for key, value in scored["phases"].items())
    return f"{name}  {'  '.join(parts)}  {phases}  {scored['seconds']:.1f} s"


def signed(scored: dict[str, Any], kind: str) -> str:
    error = scored[f"{kind}_error_percent"]
    return "  not measured" if error is None else f"{error:+6.2f} %"


def percent(predicted: float, measured: float | None) -> float | None:
    return 100 * (predicted / measured - 1) if measured else None


def spread(errors: list[float]) -> dict[str, float]:
    """Median and p95 of the errors' sizes, and the errors that lie lowest and highest."""
    if not errors:
        return {}
    sizes = sorted(map(abs, errors))
    p95 = sizes[min(len(sizes) - 1, round(0.95 * (len(sizes) - 1)))]
    return {"median": statistics.median(sizes), "p95": p95, "lowest": min(errors), "highest": max(errors)}


if __name__ == "__main__":
    main()
