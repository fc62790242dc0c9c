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
from lora_cli.engine.fused.linear import Adapted, Gradients, project, shared_a
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
    def trained(self) -> tuple[Tensor, ...]:
        attention = [t for layer in (*self.inputs, self.output) for t in layer.trained]
        return (*attention, *self.block.trained)


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
        size = layer.head_size
        scale_1 = rms_scale(x_TM, layer.attention_norm.eps)
        normed = rms_norm(x_TM, scale_1, layer.attention_norm.weight)
        outputs, low = project(layer.inputs, normed, shared_a(layer.inputs, x_TM.dtype))
        del normed
        query, key, value = (t.view(t.shape[0], -1, size) for t in outputs)
        rotate(query, cos_TE[:, None], sin_TE[:, None])
        rotate(key, cos_TE[:, None], sin_TE[:, None])
        attended, kept_documents = documents.attend(query, key, value, lengths, layer.scale)
        flat = attended.view(attended.shape[0], -1)
        (hidden_TM,), low_output = project([layer.output], flat, shared_a([layer.output], x_TM.dtype))
        hidden_TM.add_(x_TM)
        scale_2 = rms_scale(hidden_TM, layer.block_norm.eps)
        normed = rms_norm(hidden_TM, scale_2, layer.block_norm.weight)
        out_TM, kept_block = gated.gated(layer.block, normed, hidden_TM)
        ctx.layer, ctx.lengths = layer, lengths
        ctx.shape = [(len(one.weights), one.log_sums is not None) for one in kept_documents]
        flat_documents = [t for one in kept_documents for t in (*one.weights, one.log_sums) if t is not None]
        ctx.num_documents, ctx.num_blocks = len(flat_documents), len(kept_block.low)
        ctx.save_for_backward(
            *(x_TM, scale_1, low, query, key, value, attended, low_output, hidden_TM, scale_2, cos_TE, sin_TE),
            *(kept_block.gate_TI, kept_block.up_TI),
            *(t for pair in kept_block.low for t in pair),
            *flat_documents,
            *trained,  # their versions are checked on the way back
        )
        return out_TM

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        x_TM, scale_1, low, query, key, value, attended, low_output, hidden_TM, scale_2, cos_TE, sin_TE, *rest = (
            ctx.saved_tensors
        )
        kept_block, kept_documents = _unflatten(ctx, rest)
        normed = rms_norm(hidden_TM, scale_2, layer.block_norm.weight)
        back_TM, block_grads = gated.gated_back(layer.block, grad_TM, normed, kept_block)
        del normed
        hidden_grad = rms_norm_back(back_TM, hidden_TM, scale_2, layer.block_norm.weight).add_(grad_TM)
        flat = attended.view(attended.shape[0], -1)
        last, first = Gradients([layer.output]), Gradients(layer.inputs)
        attended_grad = torch.empty_like(flat)
        last.add(flat, low_output, shared_a([layer.output], flat.dtype), [hidden_grad], attended_grad)
        grads = documents.attend_back(
            attended_grad.view(attended.shape), query, key, value, attended, kept_documents, ctx.lengths, layer.scale
        )
        for turned in grads[:2]:
            rotate(turned, cos_TE[:, None], -sin_TE[:, None])
        flats = [t.view(t.shape[0], -1) for t in grads]
        normed = rms_norm(x_TM, scale_1, layer.attention_norm.weight)
        into = torch.empty_like(x_TM) if ctx.needs_input_grad[0] else None
        first.add(normed, low, shared_a(layer.inputs, x_TM.dtype), flats, into)
        input_grad = None
        if into is not None:
            input_grad = rms_norm_back(into, x_TM, scale_1, layer.attention_norm.weight).add_(hidden_grad)
        return (input_grad, None, None, None, None, *first.results(), *last.results(), *block_grads)


def _unflatten(ctx: Any, rest: list[Any]) -> tuple[gated.Kept, list[documents.Kept]]:
    gate_TI, up_TI, *rest = rest
    low = [(rest[2 * i], rest[2 * i + 1]) for i in range(ctx.num_blocks)]
    tensors = iter(rest[2 * ctx.num_blocks :])
    kept = []
    for count, has_sums in ctx.shape:
        weights = [next(tensors) for _ in range(count)]
        kept.append(documents.Kept(next(tensors) if has_sums else None, weights))
    return gated.Kept(gate_TI, up_TI, low), kept
