"""A script that measures, run as its user would, on a tiny world."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_bench(folder: Path, script: str, *options: str) -> Path:
    """Run it in `folder`; the folder of its rows."""
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPTS / script),
            "--tiny",
            *options,
            "--world",
            str(folder),
            "--out",
            str(folder / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return folder / "out"
