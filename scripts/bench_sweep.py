"""`lora sweep` with eight adapters beside eight runs of `lora train`, processes and all: python scripts/bench_sweep.py

Two worlds: the demo's tiny GPT-2, as a grid is tried in CI, and the 8-million-parameter Llama of `bench_peers.py`. Of
each: the whole (from the start of the first process to the end of the last), and the steps alone (what the runs count
as training, without imports, loading, evaluation and writing). Fails when a loss differs by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.world import Shape, lora_settings, make_world
from make_tiny_gpt2 import build_tiny_gpt2

ROOT = Path(__file__).parents[1]
GRID = ("adapter.r=[8,16]", "train.learning_rate=[1e-4,2e-4,4e-4,8e-4]")
TOLERANCE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", default="tiny,llama", help="which of tiny and llama, in this order")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many; else 20 and an epoch of 13")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append rows of JSON here")
    arguments = parser.parse_args()
    for name in arguments.worlds.split(","):
        with tempfile.TemporaryDirectory(prefix="lora-bench-") as folder:
            config = _world(name, Path(folder), arguments.steps, arguments.batch_size)
            row = {"world": name, "batch_size": arguments.batch_size, **measure(config, arguments.threads)}
        print(_as_text(row))
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _world(name: str, folder: Path, steps: int | None, batch_size: int) -> Path:
    """Model, rows and config in a folder; the config."""
    settings: dict[str, Any] = lora_settings(folder, "float32")
    if name == "llama":
        make_world(folder, Shape(rows=13 * 16))
    else:
        build_tiny_gpt2(folder / "model")
        settings["data"] = {"train": str(ROOT / "scripts" / "demo" / "train.jsonl"), "max_length": 128}
        settings["train"]["max_steps"] = 20
    settings["train"]["batch_size"] = batch_size
    if steps is not None:
        settings["train"]["max_steps"] = steps
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def measure(config: Path, threads: int) -> dict[str, Any]:
    """Eight runs, then one sweep, in the same minutes; seconds and the largest difference of a loss.

    Raises:
        SystemExit: a command failed, or losses differ.
    """
    folder = config.parent
    offline = {"HF_HUB_OFFLINE": "1", "LORA_CACHE_DIR": str(folder / "cache")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": str(threads)}
    from lora_cli.config import load_grid

    members = load_grid(config, (), GRID).members
    seconds, steps, losses = [], [], []
    common = [sys.executable, "-W", "ignore", "-m", "lora_cli"]
    # Once for the caches, as a user's second run finds them.
    _run([*common, "check", str(config)], environment)
    for member in members:
        changes = [part for key, value in member.changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        run = folder / "alone" / member.name
        began = time.perf_counter()
        _run([*common, "train", str(config), *changes, "--output-dir", str(run)], environment)
        seconds.append(time.perf_counter() - began)
        steps.append(json.loads((run / "summary.json").read_text())["train_seconds"])
        losses.append(_losses(run))
    grid = [part for option in GRID for part in ("--grid", option)]
    began = time.perf_counter()
    _run([*common, "sweep", str(config), *grid, "--output-dir", str(folder / "sweep")], environment)
    sweep_seconds = time.perf_counter() - began
    leaderboard = json.loads((folder / "sweep" / "leaderboard.json").read_text())
    shared = [_losses(folder / "sweep" / member.name) for member in members]
    apart = max(
        abs(a - b) / b for one, other in zip(shared, losses, strict=True) for a, b in zip(one, other, strict=True)
    )
    if apart > TOLERANCE:
        raise SystemExit(f"losses differ by {apart:.1e}")
    shutil.rmtree(folder / "alone")
    return {
        "members": len(members),
        "steps": len(losses[0]),
        "tokens_per_member": leaderboard["num_tokens"] // len(members),
        "threads": threads,
        "runs_seconds": sum(seconds),
        "sweep_seconds": sweep_seconds,
        "runs_step_seconds": sum(steps),
        "sweep_step_seconds": leaderboard["train_seconds"],
        "largest_loss_difference": apart,
    }


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _as_text(row: dict[str, Any]) -> str:
    whole, steps = row["runs_seconds"] / row["sweep_seconds"], row["runs_step_seconds"] / row["sweep_step_seconds"]
    return (
        f"{row['world']}: {row['members']} members, {row['steps']} steps of {row['batch_size']} examples, "
        f"{row['tokens_per_member'] / row['steps']:,.0f} tokens each\n"
        f"  whole  {row['runs_seconds']:7.1f} s -> {row['sweep_seconds']:6.1f} s   {whole:.2f} times\n"
        f"  steps  {row['runs_step_seconds']:7.1f} s -> {row['sweep_step_seconds']:6.1f} s   {steps:.2f} times\n"
        f"  losses differ by {row['largest_loss_difference']:.1e} at most"
    )


if __name__ == "__main__":
    main()
