"""A gated feed-forward block with LoRA, down(act(gate(x)) * up(x)), there and back.

In blocks of tokens, which bound the memory of wide intermediate values: where nothing is kept, they exist for one
block at a time. On a CPU smaller blocks, which would stay in the processor's cache, were slower on two cores; on a CUDA
card a block is as large as makes its products no slower. There the way back goes in the places of gate and up before
the activation, and nothing else that is wide is kept.

Dimension names: T tokens, M model width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.engine.fused import card
from lora_cli.engine.fused.linear import Adapted, Gradients, Products
from lora_cli.engine.fused.pointwise import Activation

BLOCK, BLOCK_ON_CARD = 2048, 8192
"""Tokens of a block."""


@dataclass(frozen=True, eq=False)
class GatedBlock:
    """The three layers and the activation between them."""

    gate: Adapted
    up: Adapted
    down: Adapted
    activation: Activation


def gated(
    block: GatedBlock, x_TM: Tensor, residual_TM: Tensor, products: Products, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """The block's output added to `residual_TM`, a fresh tensor; with `keep` gate and up, [T, I], for the way back."""
    first, last = products.of(block.gate, block.up), products.of(block.down)
    out_TM = torch.empty_like(residual_TM)
    kept = [x_TM.new_empty(len(x_TM), block.gate.outputs) for _ in range(2)] if keep else []
    for part in _blocks(x_TM):
        gate, up = first.project(x_TM[part], [t[part] for t in kept] or None)
        inner = card.gated(gate, up, block.activation.name) if x_TM.is_cuda else block.activation.there(gate).mul_(up)
        del gate, up
        last.project(inner, [out_TM[part]])
        del inner
    return out_TM.add_(residual_TM), kept


def gated_back(
    block: GatedBlock, grad_TM: Tensor, x_TM: Tensor, kept: Sequence[Tensor], products: Products
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x, and of the adapters in the order of gate, up, down.

    Args:
        kept: gate and up, which are spent on a card; nothing where they are to be made anew.
    """
    joined = products.of(block.gate, block.up)
    first, last = Gradients(joined), Gradients(products.of(block.down))
    into_TM: Tensor | None = None
    for part in _blocks(x_TM):
        x, grad = x_TM[part], grad_TM[part]
        gate, up = [t[part] for t in kept] if kept else joined.project(x)
        back = torch.empty_like(gate)
        if x_TM.is_cuda:
            last.back([grad], back)
            card.gated_back(back, gate, up, block.activation.name)
            last.collect(back, [grad])
            del back
            into_TM = torch.empty_like(x_TM) if into_TM is None else into_TM  # now that there is room
            first.add(x, (gate, up), into_TM[part])
        else:
            activated = block.activation.there(gate)
            last.add(activated * up, [grad], back)
            grad_up = activated.mul_(back)
            grad_gate = block.activation.back(back.mul_(up), gate)
            into_TM = torch.empty_like(x_TM) if into_TM is None else into_TM
            first.add(x, (grad_gate, grad_up), into_TM[part])
        del gate, up
    assert into_TM is not None, "no tokens"
    return into_TM, [*first.results(), *last.results()]


def _blocks(x_TM: Tensor) -> Iterator[slice]:
    """Which tokens belong together."""
    size = BLOCK_ON_CARD if x_TM.is_cuda else BLOCK
    return (slice(start, start + size) for start in range(0, len(x_TM), size))
