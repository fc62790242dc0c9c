"""`fused.layer`'s decoder layer on compiled kernels: each pass between products once over memory, attention by document
without padding, and one product for layers that share an input.

Kept for the way back are the layer's input, queries, keys and values with their positions, attention's output, the
hidden state between the two halves, and gate and up, in whose place their gradients come.

Dimension names: T tokens, M model width, H query heads, K key heads, E head size, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.layer import DecoderLayer
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.fused.native.joint import Joint

LONGEST = 4096
"""Tokens of a document up to which attention is faster than PyTorch's."""


def takes(layer: DecoderLayer, hidden_1TM: Tensor, lengths: Sequence[int]) -> bool:
    """Whether the kernels fit this call."""
    plain = hidden_1TM.device.type == "cpu" and not any(linear.state for linear in layer.linears)
    return plain and max(lengths) <= LONGEST and layer.block.activation in kernels.KINDS


class NativeLayer(torch.autograd.Function):
    """`DecoderLayer` on hidden states [T, M]; cos and sin are [T, E], `where` tells of the documents."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        layer: DecoderLayer,
        cos_TE: Tensor,
        sin_TE: Tensor,
        where: Documents,
        *trained: Tensor,
    ) -> Tensor:
        x_TM, dtype = x_TM.contiguous(), x_TM.dtype
        heads = heads_of(layer, where.lengths)
        first, second = layer.attention_norm, layer.block_norm
        inputs, output = Joint(layer.inputs, dtype), Joint([layer.output], dtype)
        room, width = inputs.room(x_TM), x_TM.shape[1]
        kernels.rms_norm(x_TM, first.weight, first.eps, out_TM=room[:, :width])
        qkv = inputs.project(room)
        kernels.rotate(qkv, heads.query + heads.key, cos_TE, sin_TE)
        attended, log_sums = kernels.attend(qkv, heads, output.room(x_TM))
        hidden_TM = output.project(attended)
        pair, down = Joint((layer.block.gate, layer.block.up), dtype), Joint([layer.block.down], dtype)
        room = pair.room(x_TM)
        kernels.rms_norm(hidden_TM, second.weight, second.eps, more_TM=x_TM, out_TM=room[:, :width])
        gate_up = pair.project(room)
        out_TM = down.project(kernels.gated(gate_up, layer.block.activation, down.room(x_TM)))
        ctx.layer, ctx.heads, ctx.spent = layer, heads, False
        ctx.save_for_backward(
            *(x_TM, cos_TE, sin_TE, qkv, attended, log_sums, hidden_TM, gate_up),
            *trained,  # their versions are checked on the way back
        )
        return out_TM.add_(hidden_TM)

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("a fused layer's backward pass runs once: gradients took the place of what it had kept")
        layer, heads, ctx.spent = ctx.layer, ctx.heads, True
        x_TM, cos_TE, sin_TE, qkv, attended, log_sums, hidden_TM, gate_up, *_ = ctx.saved_tensors
        grad_TM, dtype, block = grad_TM.contiguous(), x_TM.dtype, layer.block
        first, second = layer.attention_norm, layer.block_norm
        down, pair = Joint([block.down], dtype), Joint((block.gate, block.up), dtype)
        wide_TI, width = down.back(grad_TM), x_TM.shape[1]
        kernels.gated_back(gate_up, wide_TI, block.activation)
        normed = kernels.rms_norm(hidden_TM, second.weight, second.eps, out_TM=pair.room(x_TM)[:, :width])
        block_grads = [*pair.gradients(normed, gate_up), *down.gradients(wide_TI, grad_TM)]
        del wide_TI
        hidden_grad = kernels.rms_norm_back(pair.back(gate_up), hidden_TM, second.weight, grad_TM, second.eps)
        output, inputs = Joint([layer.output], dtype), Joint(layer.inputs, dtype)
        qkv_grad = kernels.attend_back(output.back(hidden_grad), attended, log_sums, qkv, heads)
        kernels.rotate(qkv_grad, heads.query + heads.key, cos_TE, sin_TE, -1.0)
        normed = kernels.rms_norm(x_TM, first.weight, first.eps, out_TM=inputs.room(x_TM)[:, :width])
        grads = inputs.gradients(normed, qkv_grad)
        grads += [*output.gradients(attended[:, : heads.width], hidden_grad), *block_grads]
        into = None
        if ctx.needs_input_grad[0]:
            into = kernels.rms_norm_back(inputs.back(qkv_grad), x_TM, first.weight, hidden_grad, first.eps)
        return (into, None, None, None, None, *grads)


def heads_of(layer: DecoderLayer, lengths: Sequence[int]) -> kernels.Heads:
    size = layer.head_size
    counts = (len(layer.query.weight) // size, len(layer.key.weight) // size)
    return kernels.Heads(*counts, size, layer.scale, lengths)
