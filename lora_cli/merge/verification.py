"""Does the merged model say what base + adapter says? Measured on text, in float32, module by module.

A right merge into bfloat16 moves logits by the rounding of its weights alone. How far that is, is measured here by
rounding at random: base + adapter, not merged, with an error of up to half a unit in the last place on each weight
that the merge rounds. Four times that is the tolerance. It doesn't depend on the merge, so a wrong one can't widen it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli.engine.trained import Target
from lora_cli.merge.adapter import AdaptedModel
from lora_cli.merge.base import Base
from lora_cli.merge.forward import Weights, adapted_logits, plain_logits, skeleton
from lora_cli.merge.layout import Group
from lora_cli.merge.merger import Merger
from lora_cli.merge.placing import lay_over
from lora_cli.merge.result import Distance, Verification
from lora_cli.merge.rows import Rows
from lora_cli.merge.work import Job, Work
from lora_cli.report.events import Emit, Working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTOR = 4.0
_SUMMATION = 1e-5
"""Relative: what another order of summation may do in float32."""
_FINEST = 2.0**-20
"""Errors of weights are drawn no smaller than this, relative: sums in float32 differ by more than rounding one weight
to float32 does, and a model that amplifies the one amplifies the other."""
_CHUNK = 64
"""Positions compared at a time."""


@dataclass(frozen=True)
class Stage:
    """What every pass needs."""

    target: Target
    base: Base
    rows: Rows
    device: torch.device
    emit: Emit

    def base_logits(self, *, as_quantized: bool) -> Tensor:
        return self._plain(self.base, parameter_reader(self.base, as_quantized=as_quantized), "the base")

    def merged_logits(self, merged: Base) -> Tensor:
        """Of a merged model on disk."""
        return self._plain(merged, parameter_reader(merged, as_quantized=False), "the merged model")

    def candidate_logits(self, work: Work, merger: Merger) -> Tensor:
        """Of a merge that isn't written."""
        return self._plain(self.base, merged_reader(work, merger), f"a merge into the {_kind(work)} base")

    def adapter_logits(self, *, as_quantized: bool, noise: Mapping[str, torch.dtype] | None = None) -> Tensor:
        """Of base + adapter; with `noise`, each weight named there is rounded at random to that dtype."""
        self.emit(Working(f"running base + adapter{', rounded at random' if noise else ''}"))
        adapted = self._adapted()
        weights = parameter_reader(self.base, as_quantized=as_quantized)
        return self._valid(adapted_logits(adapted, _noisy(weights, noise or {}), self._input_ids))

    def _plain(self, base: Base, weights: Weights, what: str) -> Tensor:
        self.emit(Working(f"running {what}"))
        return self._valid(plain_logits(self._skeleton(base), weights, self._input_ids))

    def _adapted(self) -> AdaptedModel:
        return lay_over(self._skeleton(self.base), self.target.result)

    def _skeleton(self, base: Base) -> PreTrainedModel:
        return skeleton(base.config, trust_remote_code=self.target.model.trust_remote_code, device=self.device)

    @property
    def _input_ids(self) -> Tensor:
        return torch.from_numpy(self.rows.input_ids).to(self.device)

    def _valid(self, logits_BLV: Tensor) -> Tensor:
        """[P, V]: the logits at real positions."""
        return logits_BLV[torch.from_numpy(self.rows.real).to(self.device)]

    def loss(self, logits_PV: Tensor) -> float:
        """The mean loss of the scored tokens."""
        real, scored = torch.from_numpy(self.rows.real), torch.from_numpy(self.rows.scored)
        position = torch.full(real.shape, -1)
        position[real] = torch.arange(int(real.sum()))
        rows, columns = scored.nonzero(as_tuple=True)
        predictors = position[rows, columns - 1].to(self.device)
        targets = torch.from_numpy(self.rows.input_ids)[rows, columns].to(self.device)
        total = 0.0
        for start in range(0, len(targets), _CHUNK):
            some = slice(start, start + _CHUNK)
            losses = F.cross_entropy(logits_PV[predictors[some]].float(), targets[some], reduction="sum")
            total += float(losses.double())
        return total / len(targets)


def distance(reference_PV: Tensor, other_PV: Tensor) -> Distance:
    """How far `other` is from `reference`."""
    largest = mean = kl = agreed = 0.0
    for start in range(0, len(reference_PV), _CHUNK):
        expected, found = reference_PV[start : start + _CHUNK], other_PV[start : start + _CHUNK]
        difference = (expected - found).abs()
        # max() of Python would drop a NaN.
        largest = float(torch.stack([difference.max(), torch.tensor(largest).to(difference)]).max())
        mean += float(difference.double().sum())
        log_p, log_q = F.log_softmax(expected.double(), -1), F.log_softmax(found.double(), -1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        agreed += float((expected.argmax(-1) == found.argmax(-1)).sum())
    positions = len(reference_PV)
    return Distance(largest, mean / reference_PV.numel(), max(0.0, kl / positions), agreed / positions)


def verify(
    stage: Stage, work: Work, merged: Base, written: Mapping[str, torch.dtype], reference: Tensor | None
) -> Verification:
    """Compare the merged model on disk with base + adapter, and with the base. `reference`: logits of base + adapter,
    where they are known by now; `written`: dtypes of the merged tensors, by parameter."""
    import time

    began = time.monotonic()
    if reference is None:
        reference = stage.adapter_logits(as_quantized=work.as_quantized)
    noise = stage.adapter_logits(as_quantized=work.as_quantized, noise=written)
    by_rounding = distance(reference, noise)
    del noise
    tolerance = FACTOR * by_rounding.largest + _SUMMATION * float(reference.abs().max())
    mean_tolerance = FACTOR * by_rounding.mean + _SUMMATION * float(reference.abs().mean())
    found = stage.merged_logits(merged)
    apart = distance(reference, found)
    loss_adapter, loss_merged = stage.loss(reference), stage.loss(found)
    del reference
    base = stage.base_logits(as_quantized=work.as_quantized)
    control = distance(base, found)
    return Verification(
        rows=stage.rows.source,
        positions=stage.rows.positions,
        max_logit_difference=apart.largest,
        mean_logit_difference=apart.mean,
        kl=apart.kl,
        top1_agreement=apart.top1_agreement,
        loss_base=stage.loss(base),
        loss_adapter=loss_adapter,
        loss_merged=loss_merged,
        tolerance=tolerance,
        mean_tolerance=mean_tolerance,
        control=control.largest,
        mean_control=control.mean,
        verified=apart.largest <= tolerance and apart.mean <= mean_tolerance,  # False for NaN
        seconds=time.monotonic() - began,
    )


def parameter_reader(base: Base, *, as_quantized: bool) -> Weights:
    """The base's parameters by name, straight from disk; of one conversion, all come at once and wait their turn."""
    of = base.layout.group_of()
    last: tuple[Group, dict[str, Tensor]] | None = None

    def read(name: str) -> Tensor:
        nonlocal last
        group = of[name]
        if last is None or last[0] is not group:
            last = None
            last = (group, base.read(group, as_quantized=as_quantized))
        value = last[1][base.layout.tied.get(name, name)]
        if group.conversion is None:
            last = None
        return value

    return read


def merged_reader(work: Work, merger: Merger) -> Weights:
    """The parameters of a merge that isn't written, rounded as they would be."""
    of: dict[str, Job] = {name: job for job in work.jobs for group in job.groups for name in group.parameters}
    of |= {job.parted: job for job in work.jobs if job.parted is not None}
    tied = merger.base.layout.tied
    last: tuple[Job, dict[str, Tensor]] | None = None

    def read(name: str) -> Tensor:
        nonlocal last
        job = of[name if name in of else tied[name]]
        if last is None or last[0] is not job:
            last = None
            dtype = job.slots[0].dtype
            merged = merger.merged(job, merger.read(job))
            last = (job, {key: value.to(dtype) for key, value in merged.items()})
        return last[1][name if name in last[1] else tied[name]]

    return read


def _noisy(weights: Weights, dtypes: Mapping[str, torch.dtype]) -> Weights:
    """`weights`, each one in `dtypes` with an error as large as rounding to that dtype makes."""
    generators: Iterator[int] = iter(range(10**9))

    def read(name: str) -> Tensor:
        value = weights(name)
        if name not in dtypes or not value.is_floating_point():
            return value
        value = value.float()
        generator = torch.Generator().manual_seed(next(generators))
        error = torch.rand(value.shape, generator=generator).sub_(0.5)
        _, exponent = torch.frexp(value)
        return value + torch.ldexp(error * max(torch.finfo(dtypes[name]).eps, _FINEST), exponent - 1)

    return read


def _kind(work: Work) -> str:
    return "quantized" if work.as_quantized else "original"
