"""What a run needs of a card: rehearsed once, asked often."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.config import Config
from lora_cli.engine.computation import Computation
from lora_cli.engine.memory.allocator import OutOfCard
from lora_cli.engine.memory.context import context_bytes
from lora_cli.engine.memory.rehearsal import MicroBatches, rehearse, worst_micro_batches
from lora_cli.engine.memory.replay import Replay, replay
from lora_cli.engine.memory.scratch import workspace_bytes
from lora_cli.engine.memory.trace import Trace
from lora_cli.engine.selftest import Proof
from lora_cli.engine.target import Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MARGIN = 0.03
"""Of what is reserved: kept free on top of the estimate. Reserved memory has been at most that much too low on most
published runs."""


@dataclass(frozen=True)
class Need:
    """The memory of a run whose every `auto` is resolved."""

    config: Config
    target: Target
    shape: MicroBatches
    replayed: Replay
    trace: Trace = field(repr=False)
    expandable: bool = False
    """Replayed under `expandable_segments`."""
    _capped: dict[int, int | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def context_bytes(self) -> int:
        return context_bytes(self.target)

    @property
    def process_bytes(self) -> int:
        """What nvidia-smi shows."""
        return self.replayed.peak_reserved_bytes + self.context_bytes

    @property
    def flops_per_token(self) -> float:
        """Of one forward and backward pass, recomputed layers included, over a full micro-batch."""
        return self.trace.flops["step 1"] / self.shape.num_tokens

    def process_bytes_on(self, card_bytes: int) -> int:
        """On a card that is nearly full the allocator gives back what it has cached; elsewhere `process_bytes`."""
        return self.taken_on(card_bytes) or self.process_bytes

    @property
    def base_bytes(self) -> int:
        """The weights alone, as they lie on the card."""
        kinds = ("quantized weights", "quantization state", "other weights")
        return sum(self.replayed.components.get(kind, 0) for kind in kinds)

    def fits(self, card_bytes: int) -> bool:
        """Whether a card of this size runs it with the margin to spare."""
        return self.taken_on(card_bytes) is not None

    def with_expandable_segments(self) -> Need:
        """The same steps under `expandable_segments`."""
        if self.expandable:
            return self
        return replace(self, replayed=replay(self.trace, expandable=True), expandable=True, _capped={})

    def taken_on(self, card_bytes: int) -> int | None:
        """What it takes of a card of this size with the margin kept free, its allocator giving back what it must.

        None when it doesn't fit.
        """
        room = int((card_bytes - self.context_bytes) / (1 + MARGIN))
        if self.replayed.peak_reserved_bytes <= room:
            return self.process_bytes
        if self.replayed.peak_allocated_bytes > room:
            return None
        if room not in self._capped:
            try:
                found = replay(self.trace, capacity_bytes=room, expandable=self.expandable)
                self._capped[room] = found.peak_reserved_bytes + self.context_bytes
            except OutOfCard:
                self._capped[room] = None
        return self._capped[room]


_OF_NO_SIZE: dict[str, Any] = {
    "output_dir": True,
    "adapter": {"lora_alpha"},
    "train": {
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
    },
}
"""Settings that no tensor's size follows from: members of a sweep that differ in these alone are rehearsed once."""


class Rehearsals:
    """Needs of variants of one config, each rehearsed once.

    Args:
        expandable: PyTorch's allocator will run under `expandable_segments`.
    """

    def __init__(self, architecture: PretrainedConfig, proof: Proof, *, expandable: bool = False) -> None:
        self._architecture = architecture
        self._proof = proof
        self.expandable = expandable
        self._known: dict[tuple[str, Target], Need] = {}
        self._traces: dict[tuple[str, Target], Trace] = {}
        self._replays: dict[tuple[str, Target, int], tuple[Replay, Trace]] = {}

    def need(self, config: Config, target: Target) -> Need:
        """The need of `config`; `micro_batch_tokens` and `gradient_checkpointing` must be resolved."""
        key = (config.model_dump_json(exclude=_OF_NO_SIZE), target)
        if key not in self._known:
            computation = self.computation(config, target)
            tokens = config.train.micro_batch_tokens
            assert isinstance(tokens, int), "resolved by the caller"
            shape = worst_micro_batches(config, tokens, computation)
            replayed, trace = self._replayed(key[0], config, target, shape)
            self._known[key] = Need(config, target, shape, replayed, trace, self.expandable)
        return replace(self._known[key], config=config)

    def _replayed(self, name: str, config: Config, target: Target, shape: MicroBatches) -> tuple[Replay, Trace]:
        """Ampere and what came after it run the same kernels, but for FlashAttention 4's; only cuBLAS's workspace
        differs."""
        alike = target if target.capability < (8, 0) or self._proof.flash4 else Target("cuda", (8, 0))
        workspace = workspace_bytes(target)
        if (name, alike) not in self._traces:
            computation = self.computation(config, alike)
            self._traces[name, alike] = rehearse(config, self._architecture, computation, alike, shape)
        if (name, alike, workspace) not in self._replays:
            trace = self._traces[name, alike].with_workspace(workspace)
            self._replays[name, alike, workspace] = (replay(trace, expandable=self.expandable), trace)
        return self._replays[name, alike, workspace]

    def computation(self, config: Config, target: Target) -> Computation:
        """How the run's forward pass will go on the target."""
        wanted = config.train.loss
        dtype = target_dtype(config, target)
        fusion = self._proof.fusion_on(target, dtype, config.model.quantization)
        return Computation(
            packing=self._proof.packing,
            loss="full" if wanted == "full" else self._proof.loss,
            dtype=dtype,
            attention=self._proof.attention,
            fusion="layers" if fusion == "native" else fusion,  # compiled kernels can't be rehearsed, and need less
            flash4=self._proof.flash4 and target.kind == "cuda",
        )


def target_dtype(config: Config, target: Target) -> torch.dtype:
    """What `model.dtype: auto` means on the target."""
    if config.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        return dtype
    if target.kind == "cuda":
        return torch.bfloat16 if target.native_bfloat16 else torch.float16
    return torch.float32
