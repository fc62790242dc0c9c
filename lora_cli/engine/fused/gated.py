"""A gated feed-forward block with LoRA, down(act(gate(x)) * up(x)), there and back, in blocks of tokens.

A block's wide intermediate values stay in the processor's cache from one product to the next. Kept for the way back
are gate and up before the activation, nothing else that is wide.

Dimension names: T tokens, M model width, I intermediate width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.engine.fused.linear import Adapted, Gradients, project, shared_a
from lora_cli.engine.fused.pointwise import Activation

_CACHE_VALUES = 2**18
"""Values of one intermediate tensor of a block: a few of them fit into a core's second-level cache."""


@dataclass(frozen=True, eq=False)
class GatedBlock:
    """The three layers and the activation between them."""

    gate: Adapted
    up: Adapted
    down: Adapted
    activation: Activation

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return (*self.gate.trained, *self.up.trained, *self.down.trained)


@dataclass
class Kept:
    """What the way back needs."""

    gate_TI: Tensor
    up_TI: Tensor
    low: list[tuple[Tensor | None, Tensor | None]]
    """Of each block of tokens: x A' of gate and up, h A' of down."""


def block_rows(width: int) -> int:
    """Tokens of a block: as many as stay in the cache, but enough that weights aren't read too often."""
    return max(256, min(1024, _CACHE_VALUES // width // 64 * 64))


def gated(block: GatedBlock, x_TM: Tensor, residual_TM: Tensor) -> tuple[Tensor, Kept]:
    """The block's output added to `residual_TM`, as a fresh tensor."""
    width = block.gate.weight.shape[0]
    out_TM = torch.empty_like(residual_TM)
    gate_TI, up_TI = x_TM.new_empty(x_TM.shape[0], width), x_TM.new_empty(x_TM.shape[0], width)
    pair = (block.gate, block.up)
    a_pair, a_down = shared_a(pair, x_TM.dtype), shared_a([block.down], x_TM.dtype)
    kept = Kept(gate_TI, up_TI, [])
    rows = block_rows(width)
    for x, gate, up, out, residual in zip(
        *(t.split(rows) for t in (x_TM, gate_TI, up_TI, out_TM, residual_TM)), strict=True
    ):
        _, low = project(pair, x, a_pair, (gate, up))
        hidden = block.activation.there(gate).mul_(up)
        _, low_down = project([block.down], hidden, a_down, [out])
        out.add_(residual)
        kept.low.append((low, low_down))
    return out_TM, kept


def gated_back(block: GatedBlock, grad_TM: Tensor, x_TM: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x, and of the adapters in the order of `GatedBlock.trained`."""
    pair = (block.gate, block.up)
    a_pair, a_down = shared_a(pair, x_TM.dtype), shared_a([block.down], x_TM.dtype)
    first, last = Gradients(pair), Gradients([block.down])
    into_TM = torch.empty_like(x_TM)
    rows = block_rows(block.gate.weight.shape[0])
    pieces = zip(
        *(t.split(rows) for t in (grad_TM, x_TM, kept.gate_TI, kept.up_TI, into_TM)), kept.low, strict=True
    )
    for grad, x, gate, up, into, (low, low_down) in pieces:
        activated = block.activation.there(gate)
        back = torch.empty_like(gate)
        last.add(activated * up, low_down, a_down, [grad], back)
        grad_up = activated.mul_(back)
        grad_gate = block.activation.back(back.mul_(up), gate)
        first.add(x, low, a_pair, (grad_gate, grad_up), into)
    return into_TM, [*first.results(), *last.results()]
