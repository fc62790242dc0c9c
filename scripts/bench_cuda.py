"""lora's speed and memory on one CUDA card beside its peers': Llama-3.1-8B's shape in bf16, packed to 4,096 tokens.

    python scripts/bench_cuda.py --seconds 330             all ways that there is time for, by importance
    python scripts/bench_cuda.py --only lora --profile lora    with a table of where the time on the card goes
    python scripts/bench_cuda.py --tiny --only lora,qlora  a tiny shape, on a CPU too; its figures mean nothing
    python scripts/bench_cuda.py --only none --longest 4096,8192,16384 --limit 24    how long a document still trains

Needs no network: model, tokenizer and rows are made. Every way trains LoRA r 16 on all linear layers, one micro-batch
of 4,096 tokens a step, as a process of its own; the first steps are not timed. Appends a row of JSON for each way to
`OUT/cuda.jsonl`, failed ones with their last lines; logs and profiles lie beside it. Nothing runs past `--seconds`.
A way whose tool is not installed is left out; `--packages unsloth=FOLDER` gives a tool packages of its own. With
`--longest`, ways that recompute activations take single documents, longer with each step, to `OUT/cuda-longest.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cuda_page import cuda_table, longest_tables, write_cuda_page
from bench.cuda_run import Asked, Child, child_environment, warmed
from bench.cuda_ways import CUDA_WAYS, CudaWay, chosen, climbers
from bench.cuda_world import SHAPES

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 20
"""What a way needs at the least: none is begun with less."""


def main() -> int:
    """Make the world, run the ways, print the table."""
    arguments = parse()
    if arguments.page:
        write_cuda_page(ROOT / "docs" / "measurements", ROOT / "docs" / "speed.md")
        return 0
    ends = time.monotonic() + arguments.seconds
    name = "tiny" if arguments.tiny else "8b"
    packages = {tool: str(Path(path).absolute()) for tool, path in (each.split("=", 1) for each in arguments.packages)}
    ways = asked_for(arguments, packages)
    profiled = frozenset((arguments.profile or "").split(","))
    folder = world_folder(arguments.world, arguments.reuse)
    asked = Asked(folder, SHAPES[name], arguments.steps, profiled, packages, arguments.limit)
    first, warming = Child(ways[0], asked), warmed(ways, asked)  # while the world is made
    made = make_world(asked.folder, name, arguments.steps, arguments.longest)
    print(f"world: {made['seconds']}, bf16 peak {made['matmul_peak_flops'] / 1e12:.0f} TFLOP/s", flush=True)
    common = {"matmul_peak_flops": made["matmul_peak_flops"], "commit": arguments.commit or commit(), **card()}
    rows, climbed = [], []
    for way, report in run_all(first, ways, asked, arguments.most, ends):
        if way.ladder:
            climbed.append(rungs(way, arguments.limit, report) | common)
            note(climbed[-1], arguments.out / "cuda-longest.jsonl", said_of_climbing)
        else:
            rows.append(figures(way, asked.shape, arguments.skipped, report) | common)
            note(rows[-1], arguments.out / "cuda.jsonl", said)
        keep(asked.folder, way, arguments.out)
    for process in warming:
        process.kill()
    for table in [cuda_table(rows)] * bool(rows) + longest_tables(climbed):
        print("\n" + table, flush=True)
    if left_out := [way.name for way in ways[len(rows) + len(climbed) :]]:
        print(f"\nleft out, for there was no time: {', '.join(left_out)}")
    pack_logs(asked.folder, arguments.out)
    return int(any("error" in row for row in rows))


def asked_for(arguments: argparse.Namespace, packages: dict[str, str]) -> list[CudaWay]:
    """The ways on the world's rows, and behind them those that climb."""

    def absent(way: CudaWay) -> bool:
        return not installed(way, packages)

    ladder = tuple(map(int, arguments.longest.split(","))) if arguments.longest else ()
    climbing = climbers(ladder, arguments.longest_base) if ladder else []
    ways = chosen(CUDA_WAYS, arguments.only, absent) + chosen(climbing, arguments.climb if ladder else None, absent)
    if not ways:
        raise SystemExit("nothing is asked for: --only none goes with --longest")
    return ways


def note(row: dict[str, Any], file: Path, told: Callable[[dict[str, Any]], str]) -> None:
    """A row as soon as there is one: to the terminal and to its file."""
    print(told(row), flush=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def run_all(
    first: Child, ways: Sequence[CudaWay], asked: Asked, most: float, ends: float
) -> Iterator[tuple[CudaWay, dict[str, Any]]]:
    """Each way with its report, as long as there is time; the next one imports while one runs."""
    child = first
    for way, following in zip(ways, [*ways[1:], None], strict=True):
        if ends - time.monotonic() < LEAST_SECONDS:
            child.end()
            return
        waiting = Child(following, asked) if following else None
        yield way, child.train(most, ends)
        if waiting:
            child = waiting


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ",".join(way.name for way in CUDA_WAYS)
    parser.add_argument("--only", help=f"of {names}; or none")
    parser.add_argument("--seconds", type=float, default=330, help="for all of it (%(default)s)")
    parser.add_argument("--most", type=float, default=100, help="seconds for one way, imports left out (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of each way (%(default)s)")
    parser.add_argument("--skipped", type=int, default=4, help="first steps that are not timed (%(default)s)")
    parser.add_argument("--profile", help="ways that are profiled for two more steps")
    parser.add_argument("--packages", action="append", default=[], metavar="TOOL=FOLDER", help="for a tool alone")
    parser.add_argument("--world", type=Path, help="where model, rows and runs go (memory, if there is room)")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="where rows and logs go (%(default)s)")
    parser.add_argument("--commit", help="of this code, where there is no repository")
    parser.add_argument("--reuse", action="store_true", help="the model that an earlier call left in the world")
    climbing = parser.add_argument_group("how long a document still trains")
    climbing.add_argument(
        "--longest", metavar="LENGTHS", help="single documents of these, one a step, until memory ends"
    )
    climbing.add_argument("--longest-base", choices=("bf16", "nf4"), default="bf16", help="(%(default)s)")
    climbing.add_argument("--climb", help=f"of {','.join(way.name for way in climbers((1,), 'bf16'))}")
    climbing.add_argument("--limit", type=float, metavar="GIB", help="so much of the card, as a smaller one has")
    parser.add_argument("--page", action="store_true", help="only write docs/speed.md from docs/measurements/cuda-*")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, 32 wide")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def world_folder(asked: Path | None, reuse: bool) -> Path:
    """An empty one, or one that holds a model alone: in memory if 24 GB have room there, else beside the code."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 24e9
    folder = (
        asked or (memory if roomy or (reuse and (memory / "bench-cuda").exists()) else Path(".bench"))
    ) / "bench-cuda"
    for old in folder.iterdir() if folder.exists() else ():
        if reuse and old.name in ("model", "shape.json"):
            continue
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def make_world(folder: Path, shape: str, steps: int, ladder: str | None) -> dict[str, Any]:
    """Made by a process of its own, so that this one holds nothing on the card."""
    command = [
        sys.executable,
        "-m",
        "bench.cuda_world",
        str(folder),
        shape,
        str(steps + 4),
        *([ladder] if ladder else []),
    ]
    subprocess.run(command, check=True, cwd=ROOT / "scripts", env=child_environment(None))
    made: dict[str, Any] = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    return made


def installed(way: CudaWay, packages: dict[str, str]) -> bool:
    """Whether its tool is there, in its own folder or everywhere."""
    module = {"lora": "lora_cli", "trainer": "transformers"}.get(way.tool, way.tool)
    if way.tool in packages:
        return (Path(packages[way.tool]) / module).exists()
    return module == "lora_cli" or importlib.util.find_spec(module) is not None


def figures(way: CudaWay, shape: Any, skipped: int, report: dict[str, Any]) -> dict[str, Any]:
    """A row of measurements; of a failed way, how it failed."""
    row = {
        "way": way.name,
        "says": way.says,
        "tool": way.tool,
        "base": way.base,
        "checkpointing": way.checkpointing,
        "multiplied_parameters": shape.multiplied,
    } | report
    timed = report.get("step_seconds", [])[skipped - 1 :]
    if timed and "error" not in report:
        median = statistics.median(timed)
        tokens = [count or shape.tokens for count in report["step_tokens"][skipped : skipped + len(timed)]]
        row |= {
            "timed_seconds": timed,
            "seconds_per_step": median,
            "tokens_per_second": statistics.fmean(tokens or [shape.tokens]) / median,
            "mean_loss": statistics.fmean(report["losses"]) if report["losses"] else None,
        }
    return row


def rungs(way: CudaWay, limit_gib: float | None, report: dict[str, Any]) -> dict[str, Any]:
    """A row of a way that climbed; how far, its peaks tell."""
    limit = round(limit_gib * 2**30) if limit_gib else None
    row = {"way": way.name, "says": way.says, "tool": way.tool, "base": way.base, "options": way.options}
    return row | {"ladder": way.ladder, "limit_bytes": limit} | report


def said_of_climbing(row: dict[str, Any]) -> str:
    """A line as soon as a way has climbed as far as it can."""
    reached = row["ladder"][: len(row.get("step_peaks", ()))]
    top = f"{reached[-1]:,} tokens, {row['step_peaks'][-1][0] / 2**30:.1f} GiB" if reached else "no rung"
    line = f"{row['way']}: {top}, {row['run_seconds']:.0f} s in all; ended by {row.get('error', 'the list')}"
    unclear = row.get("error") not in (None, "out of memory", "no end in time")
    return f"{line}\n{row['last_lines']}" if unclear else line


def said(row: dict[str, Any]) -> str:
    """A line as soon as a way is over."""
    if "error" in row:
        return f"{row['way']}: {row['error']} after {row['run_seconds']:.0f} s\n{row['last_lines']}"
    parts = [f"{row['way']}: {row['tokens_per_second']:,.0f} tokens/s"]
    if row["matmul_peak_flops"]:
        share = 4 * row["multiplied_parameters"] * row["tokens_per_second"] / row["matmul_peak_flops"]
        parts += [f"{share:.1%} of peak", f"{row['peak_allocated_bytes'] / 2**30:.1f} GiB allocated"]
    parts += [f"imported in {row['import_seconds']:.1f} s, first step after {row['first_step_seconds']:.1f} s"]
    return ", ".join([*parts, f"{row['run_seconds']:.1f} s in all, loss {row['mean_loss'] or 0:.4f}"])


def keep(folder: Path, way: CudaWay, out: Path) -> None:
    """The profile where it can be read; of a run, nothing: it would fill the memory."""
    profile = folder / "reports" / f"{way.name}.profile.txt"
    if profile.exists():
        shutil.copy(profile, out / f"profile-{way.name}.txt")
    shutil.rmtree(folder / "runs" / way.name, ignore_errors=True)


def pack_logs(folder: Path, out: Path) -> None:
    """All logs in one file."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(folder / "reports", "reports")


def commit() -> str | None:
    """Of this code."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def card() -> dict[str, str]:
    """Name and driver of the first card, by nvidia-smi; asking PyTorch would take memory on it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    if shutil.which(command[0]) is None:
        return {"card": "none", "driver": "none"}
    name, driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    return {"card": name, "driver": driver}


if __name__ == "__main__":
    sys.exit(main())
