"""How a forward pass is carried out: packing, loss, dtype. Changes speed and memory, never the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lora_cli.data.packing import pack
from lora_cli.engine import attention, loss
from lora_cli.engine.fused.fitting import Fusion, fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_cli.engine.batch import FlatBatch

Packing = Literal["documents", "mask", "single"]
"""`documents`: attention by document. `mask`: the model's own attention under a block-diagonal mask that
transformers builds from restarting positions. `single`: one document per row, nothing to isolate."""


@dataclass(frozen=True)
class Computation:
    """How a forward pass is carried out."""

    packing: Packing
    loss: Literal["chunked", "full"]
    dtype: torch.dtype
    """Of the arithmetic; 16 bits run under autocast, with float32 trainable parameters."""
    attention: str
    """transformers' name of the model's own attention, used unless `packing` is `documents`."""
    fusion: Fusion | None = None
    """What runs by the fused arithmetic; None is the modules' own code."""
    flash4: bool = False
    """Attention by document on a card: by FlashAttention 4's kernels, not by PyTorch's own."""

    def micro_batches(self, lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
        """Indices into `lengths`, grouped into micro-batches."""
        if self.packing == "single":
            return [[index] for index in range(len(lengths))]
        return pack(lengths, micro_batch_tokens)

    def prepare(self, model: PreTrainedModel) -> None:
        """Give a model the attention and the arithmetic that this computation runs with; its adapter is attached."""
        attention.use_attention(model, attention.NAME if self.packing == "documents" else self.attention)
        fuse(model, self.fusion)

    def loss_sum(self, model: PreTrainedModel, batch: FlatBatch) -> Tensor:
        """The sum of the losses of a batch's supervised tokens, a float32 scalar."""
        run = loss.chunked_loss if self.loss == "chunked" else loss.full_loss
        with self.autocast(batch.input_ids.device):
            return run(model, batch, **self._kernels(), **self._boundaries(batch))

    def group_losses(self, model: PreTrainedModel, batch: FlatBatch, groups_S: Tensor, count: int) -> Tensor:
        """[count] float32: `loss_sum` of each group of supervised tokens, with gradients of their own."""
        run = loss.group_losses if self.loss == "chunked" else loss.full_group_losses
        with self.autocast(batch.input_ids.device):
            return run(model, batch, groups_S, count, **self._kernels(), **self._boundaries(batch))

    def token_losses(self, model: PreTrainedModel, batch: FlatBatch) -> Tensor:
        """[S] losses of a batch's supervised tokens in float32, without gradients."""
        run = loss.token_losses if self.loss == "chunked" else loss.full_token_losses
        with self.autocast(batch.input_ids.device):
            return run(model, batch, **self._boundaries(batch))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast for 16-bit arithmetic; nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def _kernels(self) -> dict[str, Any]:
        return {"native": True} if self.fusion == "native" and self.loss == "chunked" else {}

    def _boundaries(self, batch: FlatBatch) -> dict[str, Any]:
        return attention.boundaries(batch, flash4=self.flash4) if self.packing == "documents" else {}
