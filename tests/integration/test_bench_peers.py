"""The bench beside peers, on a tiny world with the peers that need no environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_bench_runs_and_its_losses_agree(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--tiny", "--cold", "--threads", "1"]
    done = subprocess.run(
        [*command, "--only", "lora,loop", "--world", str(tmp_path / "world"), "--rows", str(rows)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "loop: losses at most" in done.stdout
    lora, loop = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert (lora["way"], loop["way"]) == ("lora", "loop")
    assert lora["data_rows"] == 40 and lora["steps"] == loop["steps"] == 3
    assert lora["tokens"] > lora["supervised_tokens"] > 0
    for row in (lora, loop):
        assert 0 < row["first_step_seconds"] < row["wall_seconds"]
        assert row["peak_memory_bytes"] > 2**26
        assert len(row["losses"]) == 3 and 5 < row["losses"][0] < 8


def test_losses_that_differ_fail_the_bench(tmp_path: Path) -> None:
    """In a row that is changed in its sixth digit; `--page` would write docs, so the function is asked."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_peers as b;"
        "rows = [{'way': 'lora', 'losses': [2.0, 3.0]}, {'way': 'loop', 'losses': [2.0, 3.00001]}];"
        "print(b.compare(rows), b.compare([rows[0], rows[0] | {'way': 'loop'}]))"
    )
    command = [sys.executable, "-c", program, str(ROOT / "scripts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "1 0"
