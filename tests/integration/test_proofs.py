"""A small version of each long proof in scripts/: real runs, broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lora_cli

ROOT = Path(lora_cli.__file__).parents[1]


def prove(tmp_path, script, *arguments):
    """Run a proof by itself: it forks, and nothing may have been computed before."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_runs_survive_kills_signals_and_shortages(tmp_path):
    few = ("--sweep-kills", "1", "--kills", "4", "--every", "61", "--terms", "1", "--shortages", "2")
    done = prove(tmp_path, "torture.py", *few, "--seed", "1", "--json")
    tallies = {tally["name"].partition(" at")[0]: tally for tally in json.loads(done.stdout)}
    assert all(tally["tried"] and not tally["failures"] for tally in tallies.values())
    assert tallies["kill -9"]["tried"] == 4
    assert tallies["out of memory"]["facts"]["halvings"] > 0


def test_sweeps_survive_kills(tmp_path):
    done = prove(tmp_path, "torture.py", "--only", "sweeps", "--sweep-kills", "9", "--seed", "2", "--json")
    (tally,) = json.loads(done.stdout)
    assert tally["tried"] == 9 and not tally["failures"] and tally["facts"]["sweeps"] > 1


def test_hostile_folders_are_refused(tmp_path):
    chosen = ("pickle named", "pipe named model", "that imports", "never ends", "link out of a base to merge", "laughs")
    done = prove(tmp_path, "hostile.py", "--only", *chosen)
    assert int(done.stderr.split("hostile input: ")[1].split()[0]) >= 7


def test_nobody_would_write_this(tmp_path):
    prove(tmp_path, "fuzz.py", "--cases", "60", "--seed", "3")
