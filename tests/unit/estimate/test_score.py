"""The score script on rows that its authors didn't have: fields missing, unknown, or misspelt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ROWS = [
    {"id": "least", "model": "openai-community/gpt2", "gpu": "NVIDIA A100-SXM4-80GB", "seq_len": 64},
    {
        "id": "most",
        "model": "gpt2",
        "gpu": "Tesla T4 (sm_75)",
        "seq_len": 64,
        "batch": 2,
        "method": "qlora",
        "quant": {"type": "nf4", "double_quant": True, "novel": 1},
        "rank": 8,
        "targets": ["c_attn"],
        "grad_ckpt": False,
        "optimizer": "paged_adamw_8bit",
        "compute_dtype": "fp16",
        "attn": "eager",
        "peak_allocated_mib": 500,
        "peak_reserved_mib": 600,
        "peak_backward_mib": None,
        "novel": {"x": 1},
    },
    {"id": "nowhere", "model": "nobody/nothing", "gpu": "T4", "seq_len": 64},
    {"id": "odd", "model": "gpt2", "gpu": "T4", "seq_len": 64, "optimizer": "novel"},
]


def test_rows_of_other_recipes_are_scored_or_named_with_the_reason(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "score_estimator.py"), str(rows)]
    command += ["--models", str(ROOT / "tests" / "models"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    scored = {row["id"]: row for row in found["rows"]}
    assert scored.keys() == {"least", "most"}
    assert scored["least"]["allocated_error_percent"] is None
    assert scored["least"]["allocated_mib"] > 124e6 * 2 / 2**20
    assert scored["most"]["reserved_error_percent"] != 0
    assert {failure["id"] for failure in found["failed"]} == {"nowhere", "odd"}
    assert "no config.json of nobody/nothing" in found["failed"][0]["reason"]
