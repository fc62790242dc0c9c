"""The work of a merge, laid out before any of it is done: every tensor that will be written, once, and where its
values come from.

Tied weights come apart here where the adapter changes only one of them. Reads no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_cli.merge.adapter import AdaptedModel, Unit
from lora_cli.merge.base import Base
from lora_cli.merge.layout import Group
from lora_cli.merge.shards import Slot, StoredTensor


@dataclass(frozen=True)
class Job:
    """Groups of tensors that are written together, because a unit of the adapter needs all of them, or because a
    conversion makes many of one."""

    groups: tuple[Group, ...]
    units: tuple[Unit, ...] = ()
    as_they_are: bool = False
    """Byte for byte as on disk."""
    parted: str | None = None
    """A tied parameter that is written by itself from now on; nothing else is."""
    slots: tuple[Slot, ...] = ()

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return tuple(one for group in self.groups for one in group.stored)

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self.slots)


@dataclass(frozen=True)
class Work:
    """All jobs, in the order in which the base lies on disk."""

    jobs: tuple[Job, ...]
    as_quantized: bool
    unties: bool
    """Whether tied weights come apart, which config.json must say."""

    @property
    def slots(self) -> list[Slot]:
        return [slot for job in self.jobs for slot in job.slots]

    @property
    def num_bytes(self) -> int:
        return sum(job.num_bytes for job in self.jobs)

    def rounded(self, base: Base, adapted: AdaptedModel) -> dict[str, torch.dtype]:
        """The parameters whose values the merge rounds, and to which dtype."""
        written = {name for unit in adapted.units for name in unit.writes} | set(adapted.replaced)
        found = {}
        for job in self.jobs:
            dtype = job.slots[0].dtype
            if job.parted is not None:
                found[job.parted] = dtype
            for group in job.groups if dtype.is_floating_point and job.parted is None else ():
                seen = base.quantized.dtype if self.as_quantized and base.quantized else group.stored[0].read_dtype
                coarser = torch.finfo(dtype).eps > torch.finfo(seen).eps
                found.update({name: dtype for name in group.parameters if coarser or name in written})
        return found


def plan_work(base: Base, adapted: AdaptedModel, *, as_quantized: bool, dtype: torch.dtype | None) -> Work:
    """Every tensor of the merged model; `dtype` for all weights, None to keep what each one has."""
    written = {name for unit in adapted.units for name in unit.writes} | set(adapted.replaced)
    parted = _parted(base, adapted, written)
    own_units = [unit for unit in adapted.units if not set(unit.writes) <= set(base.layout.tied)]
    jobs = [
        _job(base, adapted, groups, units, as_quantized=as_quantized, dtype=dtype)
        for groups, units in _together(base, own_units)
    ]
    of = base.layout.group_of()
    for name in parted:
        units = tuple(unit for unit in adapted.units if name in unit.writes)
        group = of[name]
        slot = Slot(name, _output_dtype(group.stored[0], dtype), tuple(group.stored[0].shape))
        jobs.append(Job((group,), units, parted=name, slots=(slot,)))
    for stored in base.layout.strangers:
        slot = Slot(stored.name, stored.dtype, stored.shape)
        jobs.append(Job((Group((stored,), ()),), as_they_are=True, slots=(slot,)))
    # Wide values first keeps all of them aligned; in nearly every model all are equally wide.
    jobs.sort(key=lambda job: -max(slot.dtype.itemsize for slot in job.slots))
    return Work(tuple(jobs), as_quantized, _comes_apart(base, adapted, written))


def _parted(base: Base, adapted: AdaptedModel, written: set[str]) -> list[str]:
    """Tied parameters that lie on disk under another's name and must have a tensor of their own from now on."""
    if adapted.keeps_ties:
        return []
    return [name for name, source in base.layout.tied.items() if name in written or source in written]


def _comes_apart(base: Base, adapted: AdaptedModel, written: set[str]) -> bool:
    tied = base.model.all_tied_weights_keys
    return not adapted.keeps_ties and any(one in written or other in written for one, other in tied.items())


def _job(
    base: Base,
    adapted: AdaptedModel,
    groups: tuple[Group, ...],
    units: tuple[Unit, ...],
    *,
    as_quantized: bool,
    dtype: torch.dtype | None,
) -> Job:
    slots = tuple(Slot(one.name, _output_dtype(one, dtype), one.shape) for group in groups for one in group.stored)
    parameters = {name for group in groups for name in group.parameters}
    recast = any(_output_dtype(one, dtype) != one.dtype for group in groups for one in group.stored)
    seen_otherwise = as_quantized and base.quantized is not None
    packed = any(one.packed for group in groups for one in group.stored)
    touched = bool(units) or recast or packed or seen_otherwise or bool(parameters & adapted.replaced.keys())
    return Job(groups, units, as_they_are=not touched, slots=slots)


def _output_dtype(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype


def _together(base: Base, units: Sequence[Unit]) -> list[tuple[tuple[Group, ...], tuple[Unit, ...]]]:
    """Each group of the base once, with those that a unit needs beside it and the units that change them."""
    of = base.layout.group_of()
    cluster = {group.stored[0].name: [group] for group in base.layout.groups}
    members: dict[int, list[Unit]] = {}
    for unit in units:
        needed = list({of[name].stored[0].name: of[name] for name in (*unit.reads, *unit.writes)}.values())
        first = cluster[needed[0].stored[0].name]
        for group in needed[1:]:
            other = cluster[group.stored[0].name]
            if other is not first:
                first.extend(other)
                members.setdefault(id(first), []).extend(members.pop(id(other), []))
                for one in other:
                    cluster[one.stored[0].name] = first
        members.setdefault(id(first), []).append(unit)
    seen: set[int] = set()
    found = []
    for group in base.layout.groups:
        groups = cluster[group.stored[0].name]
        if id(groups) not in seen:
            seen.add(id(groups))
            found.append((tuple(groups), tuple(members.get(id(groups), ()))))
    return found
