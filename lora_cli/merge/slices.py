"""A plain linear layer, merged in slices that stay in the processor's cache.

PEFT's own layer does the sum, holding only some rows of the weight and what belongs to them of its factors: the same
products and sums as for the whole, without taking the whole through memory a dozen times. That is most of the modules
of most adapters. What isn't a plain sum of a product (DoRA, quantized weights, experts) is not for here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lora_cli.merge.adapter import AdaptedModel, Unit
from lora_cli.merge.merger import Merger, check_numbers, differs
from lora_cli.merge.shards import StoredTensor
from lora_cli.merge.work import Job

_SLICE = 2**19
"""Numbers at a time: fewer cost more calls, more leave the cache."""
_TILE = 64
"""Rows: a multiple of what matrix products take at a time."""


@dataclass(frozen=True)
class Sliced:
    """A job that can be done in slices."""

    adapted: AdaptedModel
    unit: Unit
    parameter: str
    stored: StoredTensor
    dtype: torch.dtype
    """Of what is written."""

    def merge(self, write: Callable[[Tensor, int], None]) -> bool:
        """Hand each merged slice, with its place in bytes, to `write`; whether any number changed."""
        columns = self.stored.shape[1]
        changed = False
        a, b, turned = self._factors()
        with open(self.stored.file, "rb", buffering=0) as file:
            for some in row_slices(*self.stored.shape):
                first = some.start * columns
                part = torch.empty((some.stop - some.start) * columns * self.stored.dtype.itemsize, dtype=torch.uint8)
                self.stored.read_bytes(file.fileno(), first * self.stored.dtype.itemsize, part)
                before = part.view(self.stored.dtype).view(-1, columns)
                own = {"lora_A": a[:, some].contiguous(), "lora_B": b} if turned else {"lora_A": a, "lora_B": b[some]}
                exact = self.adapted.merge_slice(self.unit, before.to(torch.float32, copy=True), own)
                merged = exact.to(self.dtype)
                check_numbers(self.parameter, exact, merged, before)
                changed = changed or differs(merged, before)
                write(merged, first * self.dtype.itemsize)
        return changed

    def _factors(self) -> tuple[Tensor, Tensor, bool]:
        """A, B in float32, and whether the weight lies turned (GPT-2's Conv1D)."""
        prefix = f"{self.unit.name}.lora_"
        a, b = (self.adapted.values[f"{prefix}{one}.default.weight"].float() for one in "AB")
        layer: Any = self.unit.module
        return a, b, bool(layer.fan_in_fan_out)


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of about `_SLICE` numbers, of whole tiles; what is left over goes with the last one.

    A matrix product's last rows, and a few rows alone, may be summed in another order than the rest. Sliced so, each
    row is summed as it is in the whole: bit-equal for every shape and rank tried.
    """
    step = max(_TILE, _SLICE // max(1, columns) // _TILE * _TILE)
    count = max(1, rows // step)
    for number in range(count):
        yield slice(number * step, rows if number == count - 1 else (number + 1) * step)


def find_sliced(job: Job, merger: Merger) -> Sliced | None:
    """The job as one that is done in slices, if it is a plain linear layer's."""
    if len(job.groups) != 1 or len(job.units) != 1 or job.parted is not None or merger.replaced(job):
        return None
    (group,), (unit,) = job.groups, job.units
    layer = unit.module
    if group.conversion is not None or type(layer) is not Linear:
        return None
    if layer.lora_variant or any(layer.lora_bias.values()) or unit.writes != group.parameters:
        return None
    if merger.as_quantized and merger.base.quantized is not None:
        return None
    stored = job.stored[0]
    if stored.packed or len(stored.shape) != 2 or stored.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return Sliced(merger.adapted, unit, group.parameters[0], stored, job.slots[0].dtype)
