"""Give the commands thousands of configs and datasets that nobody would write: none may end in a traceback.

    python scripts/fuzz.py                    10,000 cases, about half an hour
    python scripts/fuzz.py --cases 500

A case is one command in a folder of its own: what it meets is either done (exit code 0), refused in words (2), or
answered with no (3), and a command that was refused has written nothing. hypothesis makes the cases and, where one
fails, the smallest that does; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from proofs import forks, tiny, wild

FINE = (0, 2, 3)
SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    forks.import_everything()
    with tempfile.TemporaryDirectory(prefix="lora-fuzz-") as folder:
        os.chdir(folder)
        os.environ["LORA_CACHE_DIR"] = str(Path(folder) / "cache")
        with contextlib.redirect_stderr(io.StringIO()):
            tiny.make_model(Path("model"))
        tiny.make_rows(Path("rows.jsonl"), 9)
        share = max(1, arguments.cases // 5)
        found = [
            run("configs", _meet_config, wild.config_files(_plain()), 2 * share, arguments.seed),
            run("rows", _meet_rows, st.tuples(wild.row_files(), wild.data_settings()), 3 * share, arguments.seed),
        ]
    return int(not all(found))


def run(
    name: str, meet: Callable[[Any, int, Counter[str]], None], cases: st.SearchStrategy[Any], count: int, start: int
) -> bool:
    """Whether so many cases were met without a failure; says what became of them."""
    tally: Counter[str] = Counter()
    began = time.monotonic()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(cases, st.integers(0, 9))
    def each(case: Any, number: int) -> None:
        meet(case, number, tally)

    try:
        each()
    except Exception as failure:
        print(f"{name}: failed\n{failure}", file=sys.stderr, flush=True)
        return False
    finally:
        ends = ", ".join(f"{what} {number:,}" for what, number in sorted(tally.items()))
        print(
            f"{name}: {tally.total():,} cases in {time.monotonic() - began:.0f} s: {ends}", file=sys.stderr, flush=True
        )
    return True


def _plain() -> dict[str, Any]:
    path = tiny.write_config(Path("plain.json"), Path("model"), Path("rows.jsonl"), Path("run"))
    plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return plain


def _meet_config(content: bytes, number: int, tally: Counter[str]) -> None:
    Path("case.yaml").write_bytes(content)
    _meet(_command("case.yaml", number), tally, content)


def _meet_rows(case: tuple[tuple[str, bytes], dict[str, Any]], number: int, tally: Counter[str]) -> None:
    (name, content), changes = case
    rows = Path("wild") / name
    shutil.rmtree(rows.parent, ignore_errors=True)
    rows.parent.mkdir()
    rows.write_bytes(content)
    tiny.write_config(Path("case.json"), Path("model"), rows, Path("run"), data=changes)
    _meet(_command("case.json", number), tally, content)


def _command(config: str, number: int) -> list[str]:
    """Most cases are checked; some are looked at or trained, which is slower."""
    if number % 10 == 9:
        short = ["--set", "train.max_steps=1", "--set", "train.report_to=[]", "--set", "adapter.r=2"]
        return ["train", config, *short, "--output-dir", "run"]
    return [("check", "preview", "params")[(number % 10 > 5) + (number % 10 > 7)], config]


def _meet(arguments: list[str], tally: Counter[str], content: bytes) -> None:
    shutil.rmtree("run", ignore_errors=True)
    began = time.monotonic()
    code, said = command(arguments)
    tally[f"{arguments[0]} {code}"] += 1
    case = f"{' '.join(arguments)}\n{content!r}\n"
    assert code in FINE and "Traceback" not in said, f"{case}ended with {code}:\n{said[-3000:]}"
    assert code != 2 or "error:" in said, f"{case}was refused without a word:\n{said[-3000:]}"
    assert code == 0 or not Path("run").exists(), f"{case}left something, and ended with {code}:\n{said[-3000:]}"
    assert time.monotonic() - began < SECONDS, f"{case}took longer than {SECONDS:.0f} s"


def command(arguments: list[str]) -> tuple[int, str]:
    """`lora ARGUMENTS` in this process: its exit code, and all that it printed."""
    from lora_cli.cli import main as lora

    said = io.StringIO()
    before, sys.argv = sys.argv, ["lora", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                lora()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            else:
                code = 0
    finally:
        sys.argv = before
    return code, said.getvalue()


if __name__ == "__main__":
    sys.exit(main())
