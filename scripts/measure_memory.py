"""Measure our own trainer's memory on the card at hand, beside what was predicted.

    python scripts/measure_memory.py                  # all cases, and the pairs around the edge; 10 minutes or so
    python scripts/measure_memory.py --only lora-32   # cases whose id holds this
    python scripts/measure_memory.py --dry-run        # without a card: predictions, and one tiny case run on the CPU

Each case runs in a process of its own: it loads the weights as `lora train` does and takes two of its steps on the
worst micro-batch. Rows, misses included, go to docs/measurements/memory-CARD.json with card, driver and versions.
A pair around the edge is the largest micro-batch said to fit a share of the card, which has to run under
`torch.cuda.set_per_process_memory_fraction`, and the first one that is larger by the margin than what can fit, which
has to fail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory_cases import TINY, Case, cases, config_of, write_model

from lora_cli.engine.assembly import attach, causal_lm, load_model, make_computation, trainable_parameters
from lora_cli.engine.memory.allocator import OutOfCard
from lora_cli.engine.memory.choice import largest_micro_batch
from lora_cli.engine.memory.need import MARGIN, Need, Rehearsals
from lora_cli.engine.memory.rehearsal import MicroBatches, worst_batches
from lora_cli.engine.memory.replay import replay
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.selftest import prove_run
from lora_cli.engine.step import Learner, train_step
from lora_cli.engine.target import Target
from lora_cli.engine.world import World
from lora_cli.model.architecture import read_architecture

FOLDER = Path(__file__).parents[1] / "docs" / "measurements"
MIB = 2**20
EDGES = (Case(tokens=8192), Case(method="nf4", tokens=8192), Case(tokens=8192, checkpointing=False))
EDGE_BYTES = 6 * 2**30
"""Of the card that the pairs around the edge may use."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose id holds this")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device: --dry-run predicts, and runs one tiny case on the CPU")
    chosen = [case for case in cases() if arguments.only in case.id]
    if arguments.dry_run:
        rows = [row(case, None) for case in chosen]
        print(json.dumps({"rows": rows, "on_cpu": in_own_process(TINY)}, indent=1))
        return
    rows = [row(case, in_own_process(case)) for case in chosen]
    edges = [] if arguments.only else [edge(case) for case in EDGES]
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"memory-{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    file.write_text(json.dumps({"made_by": made_by(), "rows": rows, "edges": edges}, indent=1) + "\n")
    print(f"wrote {file}", file=sys.stderr)


def row(case: Case, measured: dict[str, Any] | None) -> dict[str, Any]:
    """Predicted beside measured."""
    found: dict[str, Any] = {**case.as_json(), "predicted": predicted(case), "measured": measured}
    if measured is not None and "error" not in measured:
        for name in ("allocated_bytes", "reserved_bytes", "process_bytes"):
            found[f"{name}_error_percent"] = 100 * (found["predicted"][name] / measured[name] - 1)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def predicted(case: Case) -> dict[str, int]:
    need = need_of(case, target_at_hand())
    return {
        "allocated_bytes": need.replayed.peak_allocated_bytes,
        "reserved_bytes": need.replayed.peak_reserved_bytes,
        "process_bytes": need.process_bytes,
    }


def need_of(case: Case, target: Target) -> Need:
    with tempfile.TemporaryDirectory() as folder:
        write_model(case, Path(folder), weights=False)
        config = config_of(case, Path(folder))
        architecture = read_architecture(config.model)
        return Rehearsals(architecture, prove_run(config, architecture)).need(config, target)


def in_own_process(case: Case, cap_bytes: int | None = None) -> dict[str, Any]:
    """What the case takes; `error` where it ran out of memory or failed."""
    given = json.dumps({"case": {k: v for k, v in case.as_json().items() if k != "id"}, "cap_bytes": cap_bytes})
    command = [sys.executable, "-W", "ignore", __file__, "--one", given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(case: dict[str, Any], cap_bytes: int | None) -> dict[str, Any]:
    """Two steps of a case in this process, on a card if there is one."""
    wanted = Case(**case)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(wanted, folder)
        config = config_of(wanted, folder)
        architecture = read_architecture(config.model)
        computation = make_computation(config, prove_run(config, architecture), device)
        if device.type == "cuda":
            _, total = torch.cuda.mem_get_info(device)
            if cap_bytes is not None:
                torch.cuda.set_per_process_memory_fraction(cap_bytes / total, device)
            torch.cuda.reset_peak_memory_stats(device)
        model = attach(load_model(config, architecture, computation, device), config, computation)
        parameters = trainable_parameters(model)
        optimizer = make_optimizer(config.train, parameters, device)
        scaler = torch.amp.GradScaler(device.type, enabled=computation.dtype == torch.float16)
        scheduler = make_scheduler(config.train, optimizer, 1000)
        learner = Learner(
            causal_lm(model), parameters, optimizer, scheduler, scaler, computation, config.train.max_grad_norm
        )
        losses = steps(learner, worst_shape(wanted), device)
    if device.type == "cpu":
        return {"losses": losses}
    return {
        "losses": losses,
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "process_bytes": torch.cuda.max_memory_reserved(device) + context_of(device),
    }


def steps(learner: Learner, shape: MicroBatches, device: torch.device) -> list[float]:
    world = World(0, 1, device, state=None)
    losses = []
    for step in (1, 2):
        count = min(step, shape.per_step)
        supervised = count * sum(length - 1 for length in shape.document_lengths)
        losses.append(train_step(learner, worst_batches(count, shape, device), supervised, world).loss)
    return losses


def worst_shape(case: Case) -> MicroBatches:
    whole, rest = divmod(case.tokens, case.max_length)
    return MicroBatches((case.max_length,) * whole + ((rest,) if rest > 1 else ()), case.per_step)


def context_of(device: torch.device) -> int:
    """What is in use on the card besides PyTorch's cache: the context, where nobody else uses the card."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def edge(case: Case) -> dict[str, Any]:
    """The largest micro-batch said to fit, and the first that is said not to by more than the margin."""
    target = target_at_hand()
    with tempfile.TemporaryDirectory() as name:
        write_model(case, Path(name), weights=False)
        config = config_of(replace(case, per_step=64), Path(name))  # a step large enough not to be the limit
        architecture = read_architecture(config.model)
        rehearsals = Rehearsals(architecture, prove_run(config, architecture))
        some = rehearsals.need(config, target)
        fits = largest_micro_batch(rehearsals, config, target, EDGE_BYTES + some.context_bytes)
        tokens = fits.shape.num_tokens if fits is not None else case.max_length
        beyond = tokens
        while True:
            beyond += case.max_length
            trace = rehearsals.need(config_of(replace(case, tokens=beyond, per_step=64), Path(name)), target).trace
            try:
                replay(trace, capacity_bytes=int(EDGE_BYTES * (1 + MARGIN)))
            except OutOfCard:
                break
    inside = in_own_process(replace(case, tokens=tokens), EDGE_BYTES)
    outside = in_own_process(replace(case, tokens=beyond), EDGE_BYTES)
    found = {"id": case.id, "cap_bytes": EDGE_BYTES, "fits_tokens": tokens, "fails_tokens": beyond}
    found |= {"fitting": inside, "failing": outside}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def target_at_hand() -> Target:
    return Target("cuda", torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0))


def made_by() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return {
        "card": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "total_bytes": torch.cuda.get_device_properties(0).total_memory,
        "nvidia_smi": smi.stdout.strip(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
