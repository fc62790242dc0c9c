"""lora's speed, start-up and peak memory beside its peers: the same model and rows, in turn, each a process of its own.

    python scripts/bench_peers.py --trl .peers/trl              about eight minutes on two cores
    python scripts/bench_peers.py --only lora,loop --tiny       a smoke test; its figures mean nothing

`--trl` and `--llama-factory` are virtual environments that hold them (`python -m venv .peers/trl`, then
`.peers/trl/bin/pip install trl peft`); without them these rows are left out. Every way trains one epoch with LoRA r 16
on all linear layers, 16 rows a step; a first start of two steps fills what it caches. Appends a row of JSON for each to
`--rows`, prints a table, and fails where losses that should agree don't. Tokens per second count no padding, and are
taken between the ends of the first and the last step. `--page` writes table and plot from the rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.measure import Run, matmul_peak, run_way
from bench.page import read_rows, table, write_page
from bench.ways import WAYS, Way
from bench.world import Facts, Shape, make_world

TINY = Shape(rows=40, hidden=32, intermediate=64, layers=2, vocabulary=600)
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure, write, compare."""
    arguments = parse()
    if arguments.page:
        write_page(arguments.rows, ROOT / "docs")
        return compare(read_rows(arguments.rows))
    wanted = set(arguments.only.split(",")) if arguments.only else {way.name for way in WAYS}
    pythons = {"lora": Path(sys.executable).parent} | {
        name: getattr(arguments, name) and getattr(arguments, name).absolute() / "bin"
        for name in ("trl", "llama_factory")
    }
    ways = [way for way in WAYS if way.name in wanted and pythons[way.environment] is not None]
    folder = arguments.world.absolute()
    facts = ready_world(folder, TINY if arguments.tiny else Shape(rows=arguments.data_rows))
    peaks = {dtype: matmul_peak(dtype, arguments.threads) for dtype in sorted({way.dtype for way in ways})}
    rows = []
    for way in ways:
        print(f"{way.name} ...", file=sys.stderr, flush=True)
        bin_folder = pythons[way.environment]
        assert bin_folder is not None
        if not arguments.cold:
            train(way, folder, facts, bin_folder, arguments.threads, steps=2)
        run = train(way, folder, facts, bin_folder, arguments.threads)
        row = figures(way, facts, run, peaks[way.dtype], arguments.threads)
        rows.append(row)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print(table(rows))
    return compare(rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"of {','.join(way.name for way in WAYS)}")
    parser.add_argument("--trl", type=Path, help="virtual environment with TRL")
    parser.add_argument("--llama-factory", type=Path, help="virtual environment with LLaMA-Factory")
    parser.add_argument("--world", type=Path, default=Path(".bench"), help="where model and data go (%(default)s)")
    parser.add_argument("--rows", type=Path, default=Path(".bench/rows.jsonl"), help="measurements (%(default)s)")
    parser.add_argument("--data-rows", type=int, default=400, help="conversations (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, 32 wide, and 40 rows")
    parser.add_argument("--cold", action="store_true", help="no first start that fills caches")
    parser.add_argument("--page", action="store_true", help="only write docs/speed.md and docs/speed.svg from --rows")
    arguments = parser.parse_args()
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def ready_world(folder: Path, shape: Shape) -> Facts:
    """The world in `folder`, made anew unless it has this shape already."""
    stamp = folder / "shape.json"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != asdict(shape):
        make_world(folder, shape)
        stamp.write_text(json.dumps(asdict(shape)), encoding="utf-8")
    return Facts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def train(way: Way, folder: Path, facts: Facts, bin_folder: Path, threads: int, steps: int | None = None) -> Run:
    """One run, its output in `FOLDER/logs`, its results thrown away."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    program, *rest = way.command(folder, facts, steps)
    return run_way([str(bin_folder / program), *rest], way, threads, folder)


def figures(way: Way, facts: Facts, run: Run, peak: float, threads: int) -> dict[str, Any]:
    """A row of measurements."""
    steps = len(run.ended)
    share = (steps - 1) / steps
    seconds = run.ended[-1] - run.ended[0]
    return {
        "way": way.name,
        "says": way.says,
        "dtype": way.dtype,
        "steps": steps,
        "tokens": facts.tokens,
        "supervised_tokens": facts.supervised,
        "tokens_per_second": facts.tokens * share / seconds,
        "supervised_tokens_per_second": facts.supervised * share / seconds,
        "wall_seconds": run.wall_seconds,
        "first_step_seconds": run.ended[0],
        "peak_memory_bytes": run.peak_memory_bytes,
        "matmul_peak_flops": peak,
        "share_of_peak": facts.flops * share / seconds / peak,
        "losses": run.losses,
        "parameters": facts.parameters,
        "data_rows": facts.rows,
        "threads": threads,
        "machine": machine(),
    }


def machine() -> str:
    """The processor, by the name that Linux gives."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def compare(rows: list[dict[str, Any]]) -> int:
    """Say how far losses are apart that should be those of the first of their kind; 1 where that is too far."""
    same = {way.name for way in WAYS if way.same_steps}
    alike = [row for row in rows if row["way"] in same]
    failed = 0
    for row in alike[1:]:
        pairs = list(zip(row["losses"], alike[0]["losses"], strict=True))
        rounded = all(round(a, 4) == a for a, _ in pairs)  # some print no more
        worst = max(abs(a - b) / b for a, b in pairs)
        print(f"{row['way']}: losses at most {worst:.1e} from those of {alike[0]['way']}")
        failed |= worst > (1e-4 if rounded else 1e-6)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
