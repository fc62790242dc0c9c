"""Measure our own trainer's memory on the card at hand, beside what was predicted.

    python scripts/measure_memory.py                    # all cases, and the pairs around the edge; 2 minutes, 16 cores
    python scripts/measure_memory.py --only nf4         # cases whose id holds this
    python scripts/measure_memory.py --seconds 150      # begin nothing after it, and say what was left out
    python scripts/measure_memory.py --dry-run          # without a card: predictions, and tiny cases run on the CPU

Each case runs in a process of its own, several at once: the allocator's figures are a process's own. Three cases run
alone on the card first, which tells what CUDA's context takes. Rows, misses included, go to
docs/measurements/memory-CARD.json with card, driver and versions, and are written anew after each.
A pair around the edge is the largest micro-batch said to fit a part of the card, which has to run under
`torch.cuda.set_per_process_memory_fraction`, and the first one that is larger by the margin than what can fit, which
has to fail. Exit code 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from memory_cases import ALONE, DRY, EDGES, cases
from memory_pool import Outcome, Pool, Task
from memory_table import print_table

BEGAN = time.monotonic()
FOLDER = Path(__file__).parents[1] / "docs" / "measurements"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose id holds this")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the rows (docs/measurements; of a dry run, .bench)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this time")
    parser.add_argument("--case-seconds", type=float, default=90, help="end what takes longer")
    parser.add_argument("--processes", type=int, default=max(2, (os.cpu_count() or 2) - 2), help="at once")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question about cards must not spoil the forks
    from memory_plan import NO_CARD, Plan

    pool = Pool(arguments.processes, 0, arguments.case_seconds, BEGAN + arguments.seconds)
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    card = NO_CARD if arguments.dry_run else card_at_hand(pool)
    pool.card_bytes = int(0.92 * card["total_bytes"])
    folder = arguments.out or (Path(".bench") if arguments.dry_run else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"memory-{card['card'].replace(' ', '-').lower()}.json"
    chosen = [case for case in cases() if arguments.only in case.id]
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(Path(scratch), card, file, BEGAN)
        if arguments.dry_run:
            tasks = plan.begin(DRY, alone=DRY[:1], edges=()) + plan.predicting(chosen)
        else:
            tasks = plan.begin(chosen, alone=ALONE, edges=() if arguments.only else EDGES)
        plan.left_out = pool.run(tasks, plan.finished)
        plan.write()
    print_table(plan.result())
    print(f"{time.monotonic() - BEGAN:.0f} s; wrote {file}")
    return int(plan.failed())


def card_at_hand(pool: Pool) -> dict[str, Any]:
    """Asked in a process of its own; where a fork can't, what follows is spawned."""
    from memory_tasks import look

    outcome: Outcome = {}

    def keep(_: Task, found: Outcome) -> list[Task]:
        outcome.update(found)
        return []

    for pool.method in ("fork", "spawn"):
        outcome.clear()
        pool.run([Task("look", look, card_bytes=1)], keep)
        if "value" in outcome:
            card: dict[str, Any] = outcome["value"]
            print(json.dumps(card), f"processes: {pool.method}", file=sys.stderr, flush=True)
            return card
    sys.exit(f"no CUDA device ({outcome.get('error')}): --dry-run predicts, and runs tiny cases on the CPU")


if __name__ == "__main__":
    sys.exit(main())
