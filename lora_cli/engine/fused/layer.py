"""A whole decoder layer of Llama's kind as one autograd node: norm, attention by document, norm, gated block.

Frozen weights get no gradient, the first trained layer gives none to its input, residuals are summed in place, and
normed inputs are made anew on the way back instead of being kept. Under gradient checkpointing the layer keeps its
input alone, and makes the rest anew but for the last product, which the way back has no use for: a quarter of a
layer's products. Gate and up, its widest values, then exist for a block of tokens at a time.

Dimension names: T tokens, M model width, H query heads, K key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.fused import documents, gated
from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.gated import GatedBlock
from lora_cli.engine.fused.linear import Adapted, Gradients, Products
from lora_cli.engine.fused.pointwise import normalize, rms_norm, rms_norm_back, rotate


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
    """`DecoderLayer` on hidden states [T, M] of documents; cos, sin: [T, E]. With `recompute` it keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        layer: DecoderLayer,
        cos_TE: Tensor,
        sin_TE: Tensor,
        where: Documents,
        recompute: bool,
        *trained: Tensor,
    ) -> Tensor:
        x_TM, products = x_TM.contiguous(), Products(x_TM.dtype, keep=x_TM.is_cuda and not recompute)
        normed, inner = _attention(x_TM, layer, cos_TE, sin_TE, where, products)
        out_TM, wide = gated.gated(layer.block, normed, inner[2], products, keep=not recompute)
        ctx.layer, ctx.where, ctx.products = layer, where, None if recompute else products
        kept = () if recompute else (*wide, *inner)
        ctx.num_kept = len(kept)
        ctx.save_for_backward(x_TM, cos_TE, sin_TE, *kept, *trained)  # whose versions are checked on the way back
        return out_TM

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        x_TM, cos_TE, sin_TE, *kept = ctx.saved_tensors
        products = ctx.products or Products(x_TM.dtype, keep=x_TM.is_cuda)
        if ctx.products is None:
            normed, inner = _attention(x_TM, layer, cos_TE, sin_TE, ctx.where, products)
            wide, kept = [], list(inner)
            del inner
        else:
            wide, kept = kept[:2], kept[2 : ctx.num_kept]
            normed = rms_norm(kept[2], kept[3], layer.block_norm.weight)
        scale_1, attended, hidden_TM, scale_2, *of_attention = kept
        del kept
        grad_TM = grad_TM.contiguous()
        hidden_grad, block_grads = gated.gated_back(layer.block, grad_TM, normed, wide, products)
        del normed, wide
        hidden_grad = rms_norm_back(hidden_grad, hidden_TM, scale_2, layer.block_norm.weight, grad_TM)
        del hidden_TM, grad_TM
        last, first = Gradients(products.of(layer.output)), Gradients(products.of(*layer.inputs))
        flat = attended.view(len(attended), -1)
        attended_grad = torch.empty_like(flat)
        last.add(flat, [hidden_grad], attended_grad)
        attended_grad = attended_grad.view(attended.shape)
        grads = documents.attend_back(attended_grad, attended, of_attention, ctx.where, layer.scale)
        del flat, attended, attended_grad, of_attention
        for turned in grads[:2]:
            rotate(turned, cos_TE, sin_TE, back=True)
        normed = rms_norm(x_TM, scale_1, layer.attention_norm.weight)
        into = torch.empty_like(x_TM) if ctx.needs_input_grad[0] else None
        first.add(normed, [t.view(len(t), -1) for t in grads], into)
        input_grad = None
        if into is not None:
            input_grad = rms_norm_back(into, x_TM, scale_1, layer.attention_norm.weight, hidden_grad)
        return (input_grad, *_NONE, *first.results(), *last.results(), *block_grads)


_NONE = (None,) * 5
"""Gradients of what is neither the input nor trained."""


def _attention(
    x_TM: Tensor, layer: DecoderLayer, cos_TE: Tensor, sin_TE: Tensor, where: Documents, products: Products
) -> tuple[Tensor, Sequence[Tensor]]:
    """The first half of a layer: the block's normed input; and the first norm's scale, what was attended, the hidden
    states between the halves, their scale, and what attention keeps."""
    normed, scale_1 = normalize(x_TM, layer.attention_norm.weight, layer.attention_norm.eps)
    flat = products.of(*layer.inputs).project(normed)
    del normed
    query, key, value = (t.view(len(t), -1, layer.head_size) for t in flat)
    rotate(query, cos_TE, sin_TE)
    rotate(key, cos_TE, sin_TE)
    attended, kept = documents.attend(query, key, value, where, layer.scale)
    (hidden_TM,) = products.of(layer.output).project(attended.view(len(attended), -1))
    normed, scale_2 = normalize(hidden_TM, layer.block_norm.weight, layer.block_norm.eps, residual_TM=x_TM)
    return normed, (scale_1, attended, hidden_TM, scale_2, *kept)
