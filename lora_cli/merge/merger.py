"""From the base's parameters to merged ones, a job at a time, with a look at every number that comes out.

The sum is taken in float32 and rounded once. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.merge.adapter import AdaptedModel
from lora_cli.merge.base import Base
from lora_cli.merge.work import Job


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
                check_numbers(name, value, rounded[name], parameters[name])
        if job.parted is not None:
            return {job.parted: (rounded[job.parted], differs(rounded[job.parted], parameters[job.parted]))}
        outputs: dict[str, tuple[Tensor, bool]] = {}
        for group in job.groups:
            stored = group.to_stored({name: rounded[name] for name in group.parameters})
            before = group.to_stored({name: parameters[name] for name in group.parameters})
            for one in group.stored:
                tensor = stored[one.name].to(dtypes[one.name])
                outputs[one.name] = (tensor, differs(tensor, before[one.name]))
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


def differs(tensor: Tensor, before: Tensor) -> bool:
    return not torch.equal(tensor, before.to(tensor.dtype))


def check_numbers(name: str, exact: Tensor, rounded: Tensor, before: Tensor) -> None:
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
