"""Commands of `lora` on a card, one after the other: the next one imports while one has the card, and then waits.

    python relay.py READY NAME,NAME ARGUMENT...     the child: import, say how long that took, wait, run `lora`

Knows nothing of what the commands do.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BORN = time.perf_counter()


@dataclass(frozen=True)
class Done:
    """A command that is over."""

    import_seconds: float
    run_seconds: float
    """From the word to the end of the process."""
    error: str | None
    log: str

    @property
    def seconds(self) -> float:
        """Of the whole process, had it not waited."""
        return self.import_seconds + self.run_seconds


class Waiting:
    """`lora` with these arguments, importing from now on."""

    def __init__(self, arguments: Sequence[str], imports: str, log: Path, environment: dict[str, str]) -> None:
        self.log, self.ready = log, log.with_suffix(".ready")
        self.ready.unlink(missing_ok=True)
        self._out = log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(self.ready), imports, *arguments],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def run(self, seconds: float) -> Done:
        """Let it have the card; ended when it takes longer than that, its imports aside."""
        while not self.ready.exists() and self.process.poll() is None:
            time.sleep(0.01)
        began = time.perf_counter()
        try:
            self.process.communicate("go\n", timeout=seconds)
            code = self.process.returncode
            error = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            error = "no end in time"
        took = time.perf_counter() - began
        self.end()
        imported = json.loads(self.ready.read_text(encoding="utf-8")) if self.ready.exists() else 0.0
        return Done(imported, took, error, self.log.read_text(encoding="utf-8", errors="replace"))

    def end(self) -> None:
        """It and nothing else."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._out.close()


def main() -> None:
    """The child."""
    ready, imports, *arguments = sys.argv[1:]
    for name in filter(None, imports.split(",")):
        importlib.import_module(name)
    written = Path(ready).with_suffix(".written")
    written.write_text(json.dumps(time.perf_counter() - BORN), encoding="utf-8")
    os.replace(written, ready)  # there at once as a whole
    if not sys.stdin.readline():
        sys.exit("nobody is waiting")
    sys.argv = ["lora", *arguments]
    runpy.run_module("lora_cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # no module of `bench` by its bare name
    main()
