"""A whole decoder layer of Llama's kind as one autograd node: norm, attention by document, norm, gated block.

Frozen weights get no gradient, the first trained layer gives none to its input, residuals are summed in place, and
normed inputs are made anew on the way back instead of being kept.

Dimension names: T tokens, M model width, H query heads, K key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.fused import documents, gated
from lora_cli.engine.fused.gated import GatedBlock
from lora_cli.engine.fused.linear import Adapted, Gradients, Joined
from lora_cli.engine.fused.pointwise import rms_norm, rms_norm_back, rms_scale, rotate


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """What a layer is made of."""

    attention_norm: Norm
    query: Adapted
    key: Adapted
    value: Adapted
    output: Adapted
    block_norm: Norm
    block: GatedBlock
    head_size: int
    scale: float
    """Of attention scores."""

    @property
    def inputs(self) -> tuple[Adapted, ...]:
        return (self.query, self.key, self.value)

    @property
    def linears(self) -> tuple[Adapted, ...]:
        return (*self.inputs, self.output, self.block.gate, self.block.up, self.block.down)

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return tuple(t for linear in self.linears for t in linear.trained)


class FusedLayer(torch.autograd.Function):
    """`DecoderLayer` on hidden states [T, M]; cos and sin are [T, E], `lengths` those of the documents."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        layer: DecoderLayer,
        cos_TE: Tensor,
        sin_TE: Tensor,
        lengths: Sequence[int],
        *trained: Tensor,
    ) -> Tensor:
        size, dtype = layer.head_size, x_TM.dtype
        scale_1 = rms_scale(x_TM, layer.attention_norm.eps)
        normed = rms_norm(x_TM, scale_1, layer.attention_norm.weight)
        query, key, value = (t.view(len(t), -1, size) for t in Joined(layer.inputs, dtype).project(normed))
        del normed
        rotate(query, cos_TE[:, None], sin_TE[:, None])
        rotate(key, cos_TE[:, None], sin_TE[:, None])
        attended, kept = documents.attend(query, key, value, lengths, layer.scale)
        (hidden_TM,) = Joined([layer.output], dtype).project(attended.view(len(attended), -1))
        hidden_TM.add_(x_TM)
        scale_2 = rms_scale(hidden_TM, layer.block_norm.eps)
        normed = rms_norm(hidden_TM, scale_2, layer.block_norm.weight)
        out_TM, gate_TI, up_TI = gated.gated(layer.block, normed, hidden_TM)
        ctx.layer, ctx.lengths, ctx.num_kept = layer, lengths, len(kept)
        ctx.save_for_backward(
            *(x_TM, scale_1, attended, hidden_TM, scale_2, cos_TE, sin_TE, gate_TI, up_TI),
            *kept,
            *trained,  # their versions are checked on the way back
        )
        return out_TM

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        x_TM, scale_1, attended, hidden_TM, scale_2, cos_TE, sin_TE, gate_TI, up_TI, *rest = ctx.saved_tensors
        kept = rest[: ctx.num_kept]
        dtype = x_TM.dtype
        normed = rms_norm(hidden_TM, scale_2, layer.block_norm.weight)
        back_TM, block_grads = gated.gated_back(layer.block, grad_TM, normed, gate_TI, up_TI)
        del normed
        hidden_grad = rms_norm_back(back_TM, hidden_TM, scale_2, layer.block_norm.weight).add_(grad_TM)
        last, first = Gradients(Joined([layer.output], dtype)), Gradients(Joined(layer.inputs, dtype))
        flat = attended.view(len(attended), -1)
        attended_grad = torch.empty_like(flat)
        last.add(flat, [hidden_grad], attended_grad)
        grads = documents.attend_back(attended_grad.view(attended.shape), attended, kept, ctx.lengths, layer.scale)
        for turned in grads[:2]:
            rotate(turned, cos_TE[:, None], -sin_TE[:, None])
        normed = rms_norm(x_TM, scale_1, layer.attention_norm.weight)
        into = torch.empty_like(x_TM) if ctx.needs_input_grad[0] else None
        first.add(normed, [t.view(len(t), -1) for t in grads], into)
        input_grad = None
        if into is not None:
            input_grad = rms_norm_back(into, x_TM, scale_1, layer.attention_norm.weight).add_(hidden_grad)
        return (input_grad, None, None, None, None, *first.results(), *last.results(), *block_grads)
