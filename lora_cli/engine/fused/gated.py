"""A gated feed-forward block with LoRA, down(act(gate(x)) * up(x)), there and back.

On a CPU in blocks of tokens, which bound the memory of wide intermediate values; smaller ones, which would stay in the
processor's cache, were slower on two cores. On a CUDA card at once, and on the way back in the places of what was kept:
gate and up before the activation, nothing else that is wide.

Dimension names: T tokens, M model width, I intermediate width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.engine.fused import card
from lora_cli.engine.fused.linear import Adapted, Gradients, Products
from lora_cli.engine.fused.pointwise import Activation

BLOCK = 2048
"""Tokens of a block."""


@dataclass(frozen=True, eq=False)
class GatedBlock:
    """The three layers and the activation between them."""

    gate: Adapted
    up: Adapted
    down: Adapted
    activation: Activation


def gated(block: GatedBlock, x_TM: Tensor, residual_TM: Tensor, products: Products) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output added to `residual_TM`, as a fresh tensor; and gate and up, [T, I], for the way back."""
    first, last = products.of(block.gate, block.up), products.of(block.down)
    if x_TM.is_cuda:
        gate_TI, up_TI = first.project(x_TM)
        (out_TM,) = last.project(card.gated(gate_TI, up_TI, block.activation.name))
        return out_TM.add_(residual_TM), gate_TI, up_TI
    width = block.gate.outputs
    out_TM = torch.empty_like(residual_TM)
    gate_TI, up_TI = x_TM.new_empty(x_TM.shape[0], width), x_TM.new_empty(x_TM.shape[0], width)
    pieces = zip(*(t.split(BLOCK) for t in (x_TM, gate_TI, up_TI, out_TM)), strict=True)
    for x, gate, up, out in pieces:
        first.project(x, (gate, up))
        last.project(block.activation.there(gate).mul_(up), [out])
    return out_TM.add_(residual_TM), gate_TI, up_TI


def gated_back(
    block: GatedBlock, grad_TM: Tensor, x_TM: Tensor, gate_TI: Tensor, up_TI: Tensor, products: Products
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x, and of the adapters in the order of gate, up, down. On a card gate and up are spent."""
    first, last = Gradients(products.of(block.gate, block.up)), Gradients(products.of(block.down))
    if x_TM.is_cuda:
        back_TI = torch.empty_like(gate_TI)
        last.back([grad_TM], back_TI)
        card.gated_back(back_TI, gate_TI, up_TI, block.activation.name)
        last.collect(back_TI, [grad_TM])
        del back_TI
        into_TM = torch.empty_like(x_TM)
        first.add(x_TM, (gate_TI, up_TI), into_TM)
        return into_TM, [*first.results(), *last.results()]
    into_TM = torch.empty_like(x_TM)
    pieces = zip(*(t.split(BLOCK) for t in (grad_TM, x_TM, gate_TI, up_TI, into_TM)), strict=True)
    for grad, x, gate, up, into in pieces:
        activated = block.activation.there(gate)
        back = torch.empty_like(gate)
        last.add(activated * up, [grad], back)
        grad_up = activated.mul_(back)
        grad_gate = block.activation.back(back.mul_(up), gate)
        first.add(x, (grad_gate, grad_up), into)
    return into_TM, [*first.results(), *last.results()]
