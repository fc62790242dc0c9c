"""Time and memory of `lora estimate-vram`: python scripts/bench_estimate.py

Runs the command as a user would, in a process of its own: 8B in at most 10 s and 70B in at most 20 s on two cores,
under 2 GB each, imports included. Exits 1 where one of them is missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory_claims import Line, config_of

from lora_cli.config import dump_config

CASES = (
    (Line("Llama 3.1 8B", "LoRA", 2048), 10.0),
    (Line("Llama 3.1 8B", "QLoRA", 8192), 10.0),
    (Line("Llama 3.1 70B", "QLoRA", 2048, "a6000-48gb"), 20.0),
)
MOST_BYTES = 2e9


def main() -> None:
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for line, most_seconds in CASES:
            path = Path(folder) / "run.yaml"
            path.write_text(dump_config(config_of(line, Path(folder))), encoding="utf-8")
            seconds, user_seconds, peak_bytes, code = run(["estimate-vram", str(path), "--json"])
            good = code == 0 and seconds <= most_seconds and peak_bytes <= MOST_BYTES
            missed |= not good
            print(
                f"{line.model} {line.method} {line.length:,}: {seconds:.1f} s ({user_seconds:.1f} s of CPU) of "
                f"{most_seconds:.0f}, {peak_bytes / 1e9:.2f} GB of {MOST_BYTES / 1e9:.0f}"
                f"{'' if good else f'  MISSED (exit {code})'}",
                flush=True,
            )
    sys.exit(missed)


def run(arguments: list[str]) -> tuple[float, float, int, int]:
    """Seconds by the clock, seconds of CPU, peak resident bytes, and the exit code of `lora ARGUMENTS`."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lora_cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
