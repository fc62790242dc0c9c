"""Break real runs on purpose, hundreds of times, and see that nothing is lost.

    python scripts/torture.py                    everything: about half an hour
    python scripts/torture.py --only kills --kills 300

Each proof prints what it tried and what went wrong; the exit code is 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from proofs import canaries, forks, kills, shortages, stops, sweeps, syscalls
from proofs.bench import Tally, Workplace


def main() -> int:
    arguments = _arguments()
    forks.import_everything()
    with tempfile.TemporaryDirectory(prefix="lora-torture-") as folder:
        place = Workplace.made(Path(folder), arguments.seed)
        proofs: dict[str, Callable[[], Tally]] = {
            "kills": lambda: kills.killed_at_random(place, arguments.kills),
            "calls": lambda: kills.killed_before_each_call(place, arguments.every),
            "terms": lambda: stops.stopped_at_random(place, arguments.terms, processes=1),
            "terms2": lambda: stops.stopped_at_random(place, arguments.terms, processes=2),
            "memory": lambda: shortages.out_of_memory_at_random(place, arguments.shortages),
            "disk": lambda: shortages.full_disks(place),
            "sweeps": lambda: sweeps.killed_at_random(place, arguments.sweep_kills),
            "secrets": lambda: canaries.secrets_in_nothing(place),
        }
        if not syscalls.can_trace():
            print("calls: left out, since this machine doesn't let a process trace its children", file=sys.stderr)
            del proofs["calls"]
        chosen = arguments.only or list(proofs)
        tallies = [_run(proofs[name]) for name in proofs if name in chosen]
    if arguments.json:
        print(json.dumps([asdict(tally) for tally in tallies], indent=1))
    return int(any(tally.failures for tally in tallies) or not tallies)


def _run(proof: Callable[[], Tally]) -> Tally:
    began = time.monotonic()
    tally = proof()
    tally.facts["seconds"] = round(time.monotonic() - began)
    facts = ", ".join(f"{key} {value}" for key, value in tally.facts.items())
    print(f"{tally.name}: {tally.tried} tried, {len(tally.failures)} failed ({facts})", file=sys.stderr, flush=True)
    for failure in tally.failures[:20]:
        print(f"  {failure}", file=sys.stderr, flush=True)
    return tally


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", metavar="PROOF", help="kills, calls, terms, terms2, memory, disk, sweeps, ..."
    )
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="kills at random moments")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every nth system call")
    parser.add_argument("--terms", type=int, default=50, metavar="N", help="signals, for each number of processes")
    parser.add_argument("--shortages", type=int, default=50, metavar="N", help="runs that run out of memory")
    parser.add_argument("--sweep-kills", type=int, default=100, metavar="N", help="kills of sweeps at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the tallies as JSON on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
