"""What each process of `measure_memory.py` does: look at the card, predict a case, look for an edge, measure a case.

A prediction sees no card, as `lora estimate-vram` before the hardware is rented. A measurement loads the weights as
`lora train` does and takes two of its steps on the worst micro-batch. Results are plain values, for JSON.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory_cases import Case, config_of

from lora_cli.engine.assembly import attach, causal_lm, load_model, make_computation, trainable_parameters
from lora_cli.engine.memory.allocator import OutOfCard
from lora_cli.engine.memory.choice import largest_micro_batch
from lora_cli.engine.memory.need import MARGIN, Rehearsals
from lora_cli.engine.memory.rehearsal import MicroBatches, worst_batches
from lora_cli.engine.memory.replay import replay
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.selftest import prove_run
from lora_cli.engine.step import Learner, is_out_of_memory, train_step
from lora_cli.engine.step import OutOfMemory as StepOutOfMemory
from lora_cli.engine.target import Target
from lora_cli.engine.world import World
from lora_cli.model.architecture import read_architecture

EDGE_BYTES = 2 * 2**30
"""Of the card that the pairs around the edge may use."""

Values = dict[str, Any]


def look() -> Values:
    """The card at hand, its driver, and the versions of what measures it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False)
    before = device_bytes()
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "card": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "total_bytes": properties.total_memory,
        "free_bytes": free,
        "bare_context_bytes": total - free,
        "device_bytes_before": before,
        "device_bytes_with_context": device_bytes(),
        "nvidia_smi": smi.stdout.strip(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    }


def predict(case: Case, folder: Path, capability: tuple[int, int]) -> Values:
    torch.set_num_threads(1)
    config = config_of(case, folder)
    architecture = read_architecture(config.model)
    rehearsals = Rehearsals(architecture, prove_run(config, architecture), expandable=case.expandable)
    need = rehearsals.need(config, Target("cuda", capability))
    replayed = need.replayed
    return {
        "allocated_bytes": replayed.peak_allocated_bytes,
        "reserved_bytes": replayed.peak_reserved_bytes,
        "process_bytes": replayed.peak_reserved_bytes + need.context_bytes,
        "peak": f"{replayed.moment.phase} {replayed.moment.place} {replayed.moment.operator}",
    }


def search_edge(case: Case, folder: Path, capability: tuple[int, int]) -> Values:
    """Tokens of the largest micro-batch said to fit, and of the first said not to, by more than the margin."""
    torch.set_num_threads(1)
    target = Target("cuda", capability)
    config = config_of(replace(case, per_step=64), folder)  # a step large enough not to be the limit
    architecture = read_architecture(config.model)
    rehearsals = Rehearsals(architecture, prove_run(config, architecture))
    some = rehearsals.need(config, target)
    fits = largest_micro_batch(rehearsals, config, target, EDGE_BYTES + some.context_bytes)
    tokens = fits.shape.num_tokens if fits is not None else case.max_length

    def too_large(examples: int) -> bool:
        larger = config_of(replace(case, tokens=examples * case.max_length, per_step=64), folder)
        try:
            replay(rehearsals.need(larger, target).trace, capacity_bytes=int(EDGE_BYTES * (1 + MARGIN)))
        except OutOfCard:
            return True
        return False

    fitting = tokens // case.max_length
    beyond = fitting + 2
    while not too_large(beyond):
        fitting, beyond = beyond, 2 * beyond
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (fitting, middle) if too_large(middle) else (middle, beyond)
    return {"fits_tokens": tokens, "fails_tokens": beyond * case.max_length}


def measure(case: Case, folder: Path, cap_bytes: int | None = None, alone: bool = False) -> Values:
    """Two steps of a case in this process, on a card if there is one; `error` where its memory ran out.

    Args:
        cap_bytes: of the card that the process may take.
        alone: nobody else uses the card, so that what it holds is this process's.
    """
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return _two_steps(case, folder, torch.device("cpu"))
    device = torch.device("cuda", 0)
    found: Values = {"device_bytes_before": device_bytes()} if alone else {}
    if case.expandable:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    free, total = torch.cuda.mem_get_info(device)
    if alone:
        found["bare_context_bytes"] = total - free
    if cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(cap_bytes / total, device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        found |= _two_steps(case, folder, device)
    except (RuntimeError, MemoryError, StepOutOfMemory) as error:
        if not (isinstance(error, StepOutOfMemory) or is_out_of_memory(error)):
            raise
        found["error"] = f"OutOfMemory: {(str(error).strip().splitlines() or ['in a step'])[0]}"
    found["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    if alone:
        free, total = torch.cuda.mem_get_info(device)
        found["context_bytes"] = total - free - torch.cuda.memory_reserved(device)
        found["device_bytes_after"] = device_bytes()
    else:
        held = process_bytes()
        if held is not None:
            found["context_bytes"] = held - torch.cuda.memory_reserved(device)
    if "context_bytes" in found:
        found["process_bytes"] = found["reserved_bytes"] + found["context_bytes"]
    return found


def _two_steps(case: Case, folder: Path, device: torch.device) -> Values:
    config = config_of(case, folder)
    architecture = read_architecture(config.model)
    computation = make_computation(config, prove_run(config, architecture), device)
    model = attach(load_model(config, architecture, computation, device), config, computation)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(config.train, parameters, device)
    scaler = torch.amp.GradScaler(device.type, enabled=computation.dtype == torch.float16)
    scheduler = make_scheduler(config.train, optimizer, 1000)
    learner = Learner(
        causal_lm(model), parameters, optimizer, scheduler, scaler, computation, config.train.max_grad_norm
    )
    world = World(0, 1, device, state=None)
    shape = worst_shape(case)
    results = []
    for step in (1, 2):
        count = min(step, shape.per_step)
        supervised = count * sum(length - 1 for length in shape.document_lengths)
        results.append(train_step(learner, worst_batches(count, shape, device), supervised, world))
    return {
        "losses": [result.loss for result in results],
        "applied": [result.applied for result in results],
        "fusion": computation.fusion,
    }


def worst_shape(case: Case) -> MicroBatches:
    whole, rest = divmod(case.tokens, case.max_length)
    return MicroBatches((case.max_length,) * whole + ((rest,) if rest > 1 else ()), case.per_step)


def process_bytes() -> int | None:
    """What NVML says that this process holds of the card; None where it doesn't say, as in most containers."""
    nvml, handle = _nvml()
    if nvml is None:
        return None
    held = {p.pid: p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    return held.get(os.getpid())


def device_bytes() -> int | None:
    """What NVML says that all processes hold of the card, without what the driver keeps for itself."""
    nvml, handle = _nvml()
    if nvml is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
    except nvml.NVMLError:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _nvml() -> tuple[Any, Any]:
    """NVML's module and the card's handle, or None twice."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        if pynvml.nvmlDeviceGetCount() == 1:
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # several are seen, and PyTorch was given one
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except pynvml.NVMLError:
        return None, None
