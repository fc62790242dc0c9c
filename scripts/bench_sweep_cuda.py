"""`lora sweep` of eight adapters on a CUDA card, both ways, beside runs of `lora train`: Llama-3.2-1B's shape in bf16.

    python scripts/bench_sweep_cuda.py --seconds 240 --out OUT
    python scripts/bench_sweep_cuda.py --tiny --steps 6            a tiny shape, on a CPU too; its figures mean nothing

Needs no network: model, tokenizer and chat rows are made. For each number of rows a step: the sweep in turn, which is
what a card takes by itself for this model; and side by side, which is what `train.fused: false` makes it take, with
`--row-tokens` for a row of all members, since `auto` is no more than a step of one run needs. `--runs` of the eight are
run alone, with as many rows as the first number says; eight of them count as the mean times eight.

*Whole* is a process from its first import to its end, its waiting for the card left out; *steps* are what it counts as
training; *a round* is the median step of all eight members together, the first `--skipped` left out. bfloat16 isn't
reproducible to the bit on a card, where attention's way back adds in whatever order: losses may differ by 2e-3 of
their size. A row of JSON for each way and size goes to `OUT/cuda-sweep.jsonl`, all logs beside it. Nothing runs past
`--seconds`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cuda_run import child_environment
from bench.cuda_ways import LORA_IMPORTS
from bench.cuda_world import Shape, write_model
from bench.relay import Done, Waiting
from bench.sweep_rows import Job, Table, said
from bench.world import lora_settings, write_conversations
from bench_cuda import LEAST_SECONDS, card, commit
from bench_sweep import GRID

SHAPES = {"1b": Shape(2048, 8192, 16, 32, 8, 128_256, tied=True), "tiny": Shape(32, 64, 2, 4, 2, 8192, tied=True)}
VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def main() -> int:
    """Make the world, run the commands, print as they come."""
    arguments = parse()
    ends = time.monotonic() + arguments.seconds
    folder = arguments.world / "bench-sweep"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    jobs = planned(folder, sizes, arguments)
    environment = child_environment(None) | {"LORA_CACHE_DIR": str(folder / "cache")}
    first = waiting(jobs[0], folder, environment)  # while the world is made
    shape = "tiny" if arguments.tiny else "1b"
    command = [sys.executable, __file__, "--make", str(folder), shape]
    subprocess.run([*command, "--steps", str(arguments.steps), "--sizes", arguments.sizes], check=True, env=environment)
    common = {"world": shape, "members": 8, "row_tokens_side_by_side": arguments.row_tokens}
    common |= {"commit": arguments.commit or commit(), **card(), "versions": versions()}
    table = Table(arguments.skipped, sizes[0], common)
    for job, done in run_all(first, jobs, folder, environment, arguments.most, ends):
        row = table.add(job, done)
        print(said(job, done, row), flush=True)
        if row is not None:
            with (arguments.out / "cuda-sweep.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        shutil.rmtree(job.output, ignore_errors=True)
    with tarfile.open(arguments.out / "sweep-logs.tar.gz", "w:gz") as archive:
        archive.add(folder / "logs", "logs")
    shutil.rmtree(folder)
    return int(table.failed)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="for all of it (%(default)s)")
    parser.add_argument("--most", type=float, default=80, help="seconds for one command, imports aside (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of each member (%(default)s)")
    parser.add_argument("--skipped", type=int, default=5, help="first steps that no median counts (%(default)s)")
    parser.add_argument("--sizes", default="16,2", help="rows a step, in this order (%(default)s)")
    parser.add_argument("--row-tokens", type=int, default=32_768, help="side by side, of all members (%(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="of the eight, that are run alone too (%(default)s)")
    parser.add_argument("--world", type=Path, default=Path("/dev/shm"), help="where all goes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="where rows and logs go (%(default)s)")
    parser.add_argument("--commit", help="of this code, where there is no repository")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, 32 wide")
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:  # a process of its own, so that the one that measures holds nothing on the card
        rows = arguments.steps * max(map(int, arguments.sizes.split(",")))
        make_world(Path(arguments.make[0]), SHAPES[arguments.make[1]], rows)
        sys.exit()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.world = arguments.world.absolute()
    return arguments


def make_world(folder: Path, shape: Shape, rows: int) -> None:
    """Model, tokenizer and chat rows, as skewed as those of the bench on a CPU."""
    write_conversations(folder, rows, 8000)
    write_model(folder / "model", shape, end=2, padding=0)


def planned(folder: Path, sizes: Sequence[int], arguments: argparse.Namespace) -> list[Job]:
    """The commands in their order, and a config for each number of rows: one that fills the caches, so that all others
    find what a user's second command does; `--runs` alone, and the sweeps."""
    sys.path.append(str(Path(__file__).parents[1]))  # where lora isn't installed, as its commands have it
    from lora_cli.config import load_grid

    configs = {size: _config(folder, size, arguments.steps) for size in sizes}
    members = load_grid(configs[sizes[0]], (), GRID).members

    def train(name: str, member: Any, *more: str) -> Job:
        own = [part for key, value in member.changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        output = folder / "runs" / name
        given = ("train", str(configs[sizes[0]]), *own, *more, "--output-dir", str(output))
        return Job(name, given, "warm" if more else "alone", sizes[0], output)

    def sweep(name: str, way: str, size: int, *more: str) -> Job:
        grid = [part for option in GRID for part in ("--grid", option)]
        output = folder / "runs" / name
        return Job(name, ("sweep", str(configs[size]), *grid, *more, "--output-dir", str(output)), way, size, output)

    # Members of both ranks, and of other rates: a wrong one would show in its losses.
    chosen = [members[(3 * number + 1) % 8] for number in range(min(arguments.runs, 8))]
    jobs = [train("warm", members[0], "--set", "train.max_steps=3")]
    jobs += [train(member.name, member) for member in chosen]
    for size in sizes:
        jobs.append(sweep(f"in-turn-{size}", "in turn", size))
        row = ("--set", "train.fused=false", "--set", f"train.micro_batch_tokens={arguments.row_tokens}")
        jobs.append(sweep(f"side-by-side-{size}", "side by side", size, *row))
    return jobs


def _config(folder: Path, size: int, steps: int) -> Path:
    settings: Any = lora_settings(folder, "bfloat16")
    settings["train"] |= {"batch_size": size, "max_steps": steps}
    path = folder / f"rows-{size}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def waiting(job: Job, folder: Path, environment: dict[str, str]) -> Waiting:
    return Waiting(job.arguments, LORA_IMPORTS, folder / "logs" / f"{job.name}.txt", environment)


def run_all(
    first: Waiting, jobs: Sequence[Job], folder: Path, environment: dict[str, str], most: float, ends: float
) -> Iterator[tuple[Job, Done]]:
    """Each command, as long as there is time; the next one imports while one runs."""
    child = first
    for job, following in zip(jobs, [*jobs[1:], None], strict=True):
        left = ends - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"no time is left for {job.name} and what follows")
            child.end()
            return
        after = waiting(following, folder, environment) if following else None
        yield job, child.run(min(most, left))
        if after:
            child = after


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
