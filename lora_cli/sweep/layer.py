"""A whole decoder layer of Llama's kind with the adapters of several members, as one autograd node.

What looks at one token at a time goes member by member through the engine's fused arithmetic, on the member's stretch
of the row and with its own W + s B A; norms, positions and attention take the row as a whole. For a CPU, as that is.

Dimension names: T tokens, M model width, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.fused import documents
from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.gated import gated, gated_back
from lora_cli.engine.fused.layer import DecoderLayer
from lora_cli.engine.fused.linear import Gradients, Products
from lora_cli.engine.fused.pointwise import normalize, rms_norm, rms_norm_back, rotate

Stretches = Sequence[tuple[slice, DecoderLayer]]
"""Whose tokens are where, in the order of the row, all of it; the base's part of each layer is the same."""


def run_layer(x_TM: Tensor, stretches: Stretches, cos_TE: Tensor, sin_TE: Tensor, where: Documents) -> Tensor:
    """[T, M], with gradients for each member's adapters."""
    trained = [tensor for _, layer in stretches for tensor in layer.trained]
    out: Tensor = _SharedLayer.apply(x_TM, stretches, cos_TE, sin_TE, where, *trained)  # type: ignore[no-untyped-call]
    return out


class _SharedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        stretches: Stretches,
        cos_TE: Tensor,
        sin_TE: Tensor,
        where: Documents,
        *trained: Tensor,
    ) -> Tensor:
        base, products = stretches[0][1], Products(x_TM.dtype, keep=False)
        normed, scale_1 = normalize(x_TM, base.attention_norm.weight, base.attention_norm.eps)
        flat = [x_TM.new_empty(len(x_TM), linear.outputs) for linear in base.inputs]
        for part, layer in stretches:
            products.of(*layer.inputs).project(normed[part], [each[part] for each in flat])
        query, key, value = (each.view(len(each), -1, base.head_size) for each in flat)
        for turned in (query, key):
            rotate(turned, cos_TE, sin_TE)
        attended, kept = documents.attend(query, key, value, where, base.scale)
        joint, hidden_TM = attended.view(len(attended), -1), torch.empty_like(x_TM)
        for part, layer in stretches:
            products.of(layer.output).project(joint[part], [hidden_TM[part]])
        normed, scale_2 = normalize(hidden_TM, base.block_norm.weight, base.block_norm.eps, residual_TM=x_TM)
        blocks = [gated(layer.block, normed[part], hidden_TM[part], products) for part, layer in stretches]
        ctx.stretches, ctx.where, ctx.num_kept = stretches, where, len(kept)
        wide = [tensor for _, gate, up in blocks for tensor in (gate, up)]
        ctx.save_for_backward(
            *(x_TM, scale_1, attended, hidden_TM, scale_2, cos_TE, sin_TE),
            *kept,
            *wide,
            *trained,  # their versions are checked on the way back
        )
        return torch.cat([out for out, _, _ in blocks])

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        stretches: Stretches = ctx.stretches
        base = stretches[0][1]
        x_TM, scale_1, attended, hidden_TM, scale_2, cos_TE, sin_TE, *rest = ctx.saved_tensors
        kept, wide = rest[: ctx.num_kept], rest[ctx.num_kept :]
        products, grad_TM = Products(x_TM.dtype, keep=False), grad_TM.contiguous()
        normed = rms_norm(hidden_TM, scale_2, base.block_norm.weight)
        of_blocks = [
            gated_back(layer.block, grad_TM[part], normed[part], wide[2 * number], wide[2 * number + 1], products)
            for number, (part, layer) in enumerate(stretches)
        ]
        back_TM = torch.cat([back for back, _ in of_blocks])
        hidden_grad = rms_norm_back(back_TM, hidden_TM, scale_2, base.block_norm.weight, grad_TM)
        joint = attended.view(len(attended), -1)
        attended_grad = torch.empty_like(joint)
        of_outputs = []
        for part, layer in stretches:
            of_outputs.append(Gradients(products.of(layer.output)))
            of_outputs[-1].add(joint[part], [hidden_grad[part]], attended_grad[part])
        grads = documents.attend_back(attended_grad.view(attended.shape), attended, kept, ctx.where, base.scale)
        for turned in grads[:2]:
            rotate(turned, cos_TE, sin_TE, back=True)
        normed = rms_norm(x_TM, scale_1, base.attention_norm.weight)
        into = torch.empty_like(x_TM) if ctx.needs_input_grad[0] else None
        found: list[Tensor] = []
        for number, (part, layer) in enumerate(stretches):
            of_inputs = Gradients(products.of(*layer.inputs))
            own = [each[part].flatten(1) for each in grads]
            of_inputs.add(normed[part], own, None if into is None else into[part])
            found += [*of_inputs.results(), *of_outputs[number].results(), *of_blocks[number][1]]
        input_grad = None
        if into is not None:
            input_grad = rms_norm_back(into, x_TM, scale_1, base.attention_norm.weight, hidden_grad)
        return (input_grad, None, None, None, None, *found)
