"""The work of a merge, done: from the base's shards to new ones, one module in memory at a time.

The sum is taken in float32 and rounded once. Reading, arithmetic, writing and flushing overlap. Knows nothing about
where the files go in the end.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.merge.adapter import AdaptedModel
from lora_cli.merge.base import Base
from lora_cli.merge.heap import core_to_spare, reused_memory
from lora_cli.merge.shards import ShardWriter, Slot
from lora_cli.merge.work import Job, Work
from lora_cli.report.events import Emit, Working
from lora_cli.runs.atomic import write_json

INDEX = "model.safetensors.index.json"
_WAITING_WRITES = 1
"""Tensors that may wait for the disk before the arithmetic waits for them."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    tensors: int
    changed: int
    num_bytes: int
    shards: int
    used: frozenset[str]
    """Tensors of the adapter that went into it."""


def write_merged(
    work: Work, base: Base, adapted: AdaptedModel, folder: Path, *, max_shard_bytes: int, emit: Emit
) -> Written:
    """Write every tensor of `work` to shards in `folder`.

    Raises:
        ModelError: a sum that isn't a number, or doesn't fit the dtype asked for.
        UserError: the folder can't be written.
    """
    shards = _shards(work, max_shard_bytes)
    total = sum(slot.num_bytes for slot in work.slots)
    merger = Merger(base, adapted, as_quantized=work.as_quantized)
    changed = done = 0
    used: set[str] = set()
    with reused_memory(), core_to_spare(), _Output(folder, shards) as output:
        for job, following in zip_longest(work.jobs, work.jobs[1:]):
            for stored in following.stored if following is not None else ():
                stored.announce()
            if job.as_they_are:
                for stored in job.stored:
                    output.put(stored.name, None, job)
            else:
                for name, (tensor, differs) in merger.run(job, merger.read(job)).items():
                    changed += differs
                    output.put(name, tensor, job)
                used.update(name for unit in job.units for name in unit.tensors)
                used.update(adapted.replaced[name] for name in merger.replaced(job))
            done += job.num_bytes
            emit(Working("merging", done, total, "bytes"))
    if len(shards) > 1:
        names = {slot.name: path for path, slots in shards.items() for slot in slots}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    return Written(len(work.slots), changed, total, len(shards), frozenset(used))


@dataclass(frozen=True)
class Merger:
    """Turns the base's parameters into merged ones."""

    base: Base
    adapted: AdaptedModel
    as_quantized: bool

    def read(self, job: Job) -> dict[str, Tensor]:
        """The parameters of a job, as the base has them."""
        found: dict[str, Tensor] = {}
        for group in job.groups:
            found |= self.base.read(group, as_quantized=self.as_quantized)
        if job.parted is not None:
            (value,) = found.values()
            return {job.parted: value}
        return found

    def replaced(self, job: Job) -> list[str]:
        return [name for group in job.groups for name in group.parameters if name in self.adapted.replaced]

    def run(self, job: Job, parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, bool]]:
        """The tensors of a job as they are written, each with whether the adapter changed it."""
        dtypes = {slot.name: slot.dtype for slot in job.slots}
        of = {
            name: dtypes[group.stored[0].name]
            for group in job.groups
            if job.parted is None
            for name in group.parameters
        }
        rounded = {}
        for name, value in self.merged(job, parameters).items():
            rounded[name] = value.to(dtypes[name] if job.parted else of[name])
            if rounded[name] is not parameters[name]:
                _check_numbers(name, value, rounded[name], parameters[name])
        if job.parted is not None:
            return {job.parted: (rounded[job.parted], _differs(rounded[job.parted], parameters[job.parted]))}
        outputs: dict[str, tuple[Tensor, bool]] = {}
        for group in job.groups:
            stored = group.to_stored({name: rounded[name] for name in group.parameters})
            before = group.to_stored({name: parameters[name] for name in group.parameters})
            for one in group.stored:
                tensor = stored[one.name].to(dtypes[one.name])
                outputs[one.name] = (tensor, _differs(tensor, before[one.name]))
        return outputs

    def merged(self, job: Job, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a job with the adapter in them, those that it changes in float32."""
        merged = dict(parameters)
        for unit in job.units:
            base = {name: _single_precision(parameters[name]) for name in unit.reads}
            merged |= self.adapted.merge(unit, base)
        for name in self.replaced(job):
            merged[name] = self.adapted.values[self.adapted.replaced[name]].float()
        return merged if job.parted is None else {job.parted: merged[job.parted]}


def _single_precision(tensor: Tensor) -> Tensor:
    """In float32, in memory of its own: PEFT adds to it in place."""
    return tensor.to(torch.float32, copy=True)


def _differs(tensor: Tensor, before: Tensor) -> bool:
    return not torch.equal(tensor, before.to(tensor.dtype))


def _check_numbers(name: str, exact: Tensor, rounded: Tensor, before: Tensor) -> None:
    if not rounded.is_floating_point() or _finite(rounded):
        return
    if _finite(exact):
        raise ModelError(
            f"{name}: a merged value of {float(exact.abs().max()):g} doesn't fit {rounded.dtype}".replace("torch.", ""),
            remedy="Give --dtype bfloat16 or float32.",
        )
    culprit = "the sum" if _finite(before) else "the base"
    raise ModelError(f"{name}: {culprit} holds NaN or infinity")


def _finite(tensor: Tensor) -> bool:
    """Without NaN and infinity. One pass that allocates nothing; isfinite() takes thirty times as long."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _shards(work: Work, max_shard_bytes: int) -> dict[str, list[Slot]]:
    """The slots of each file, by its name."""
    parts: list[list[Slot]] = [[]]
    room = max_shard_bytes
    for slot in work.slots:
        if slot.num_bytes > room and parts[-1]:
            parts.append([])
            room = max_shard_bytes
        parts[-1].append(slot)
        room -= slot.num_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, start=1)}


class _Output:
    """The shards, written by a thread of their own and flushed by another."""

    def __init__(self, folder: Path, shards: Mapping[str, list[Slot]]) -> None:
        self._folder = folder
        self._shards = iter(shards.items())
        self._left = 0
        self._shard: ShardWriter | None = None
        self._writer = ThreadPoolExecutor(1, "write")
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._writes: deque[Future[None]] = deque()
        self._flushes: list[Future[None]] = []

    def __enter__(self) -> _Output:
        return self

    def put(self, name: str, tensor: Tensor | None, job: Job) -> None:
        """The next tensor; None to copy the base's."""
        while len(self._writes) >= _WAITING_WRITES:
            self._writes.popleft().result()
        self._writes.append(self._writer.submit(self._write, name, tensor, job))

    def _write(self, name: str, tensor: Tensor | None, job: Job) -> None:
        if self._left == 0:
            file, slots = next(self._shards)
            self._shard, self._left = ShardWriter(self._folder / file, slots, self._flush), len(slots)
        assert self._shard is not None
        if tensor is None:
            self._shard.copy(next(one for one in job.stored if one.name == name))
        else:
            self._shard.write(name, tensor)
        self._left -= 1
        if self._left == 0:
            self._flushes.append(self._flusher.submit(self._shard.close))

    def _flush(self, descriptor: int) -> None:
        self._flushes.append(self._flusher.submit(os.fdatasync, descriptor))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                for write in self._writes:
                    write.result()
                for flush in self._flushes:
                    flush.result()
                assert self._left == 0, f"{self._left} tensors were never written"
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._flusher.shutdown(cancel_futures=True)
            if kind is not None and self._shard is not None:
                self._shard.abandon()
