"""The work of a merge, done: from the base's shards to new ones, a few modules in memory at a time.

Every core has a worker that reads, sums, rounds and writes; the disk catches up beside them. Knows nothing about where
the files go in the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

import torch

from lora_cli.merge.adapter import AdaptedModel
from lora_cli.merge.base import Base
from lora_cli.merge.heap import one_thread_each, reused_memory
from lora_cli.merge.merger import Merger
from lora_cli.merge.output import Output
from lora_cli.merge.shards import Slot, byte_size
from lora_cli.merge.slices import find_sliced
from lora_cli.merge.work import Job, Work
from lora_cli.report.events import Emit, Working
from lora_cli.runs.atomic import write_json

INDEX = "model.safetensors.index.json"
_ROOM_BYTES = 256 * 2**20
"""For the modules that are being merged as wholes; one that is larger has all of it to itself."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    tensors: int
    changed: int
    num_bytes: int
    shards: int
    used: frozenset[str]
    """Tensors of the adapter that went into it."""


@dataclass(frozen=True)
class _Done:
    """What a job came to."""

    num_bytes: int
    changed: int
    used: tuple[str, ...]


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
    with reused_memory(), one_thread_each() as threads, Output(folder, shards) as output:
        for one in _in_parallel(work.jobs, threads, lambda job, room: _run(job, merger, output, room)):
            changed += one.changed
            used.update(one.used)
            done += one.num_bytes
            emit(Working("merging", done, total, "bytes"))
    if len(shards) > 1:
        names = {slot.name: path for path, slots in shards.items() for slot in slots}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    return Written(len(work.slots), changed, total, len(shards), frozenset(used))


def _run(job: Job, merger: Merger, output: Output, room: _Room) -> _Done:
    if job.as_they_are:
        for stored in job.stored:
            output.copy(stored)
        return _Done(job.num_bytes, 0, ())
    used = tuple(name for unit in job.units for name in unit.tensors)
    sliced = find_sliced(job, merger)
    if sliced is not None:
        changed = sliced.merge(lambda part, at: output.write(sliced.stored.name, part, at))
        return _Done(job.num_bytes, int(changed), used)
    changed_tensors = 0
    with room.taken(_weight(job)):
        for name, (tensor, differs) in merger.run(job, merger.read(job)).items():
            changed_tensors += differs
            output.write(name, tensor.contiguous())
    replaced = tuple(merger.adapted.replaced[name] for name in merger.replaced(job))
    return _Done(job.num_bytes, changed_tensors, used + replaced)


def _in_parallel(jobs: Sequence[Job], threads: int, run: Callable[[Job, _Room], _Done]) -> Iterator[_Done]:
    """What each job came to, as they end, in no order. The first failure ends all of it."""
    room = _Room(_ROOM_BYTES)
    with ThreadPoolExecutor(threads, "merge") as pool:
        ahead: deque[Future[_Done]] = deque()
        try:
            for job in jobs:
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
                for stored in job.stored:
                    stored.announce()
                ahead.append(pool.submit(run, job, room))
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


class _Room:
    """Memory that threads share out among themselves."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Within it, `amount` bytes are taken; waits until there is room, or nobody else."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + amount <= self._limit)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


def _weight(job: Job) -> int:
    """About how many bytes a job holds at its peak: base, sum and delta in float32, and what is read and written."""
    return sum(4 * byte_size(torch.float32, stored.shape) for stored in job.stored)


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
