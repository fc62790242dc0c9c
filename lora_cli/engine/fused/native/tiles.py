"""`joint`'s products in bfloat16 on the processor's matrix tiles, by compiled kernels of our own.

oneDNN prepares a kernel for each new number of rows, which takes longer than the product, and no micro-batch is as long
as another. Used where the right side of each product stays in a core's second-level cache; larger ones are oneDNN's.

Dimension names: T tokens, I inputs, O outputs of all layers, R ranks of all layers, rounded up to whole tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_cli.engine.fused.linear import Adapted, slices
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.fused.native.joint import Joint

LARGEST = 2**20
"""Values of a joint weight: as bfloat16, all that a second-level cache may hold."""


def joint(layers: Sequence[Adapted], dtype: torch.dtype) -> Joint:
    """These layers, ready for one pass over their input, in the way that is fastest here."""
    inputs, outputs = layers[0].weight.shape[1], [len(layer.weight) for layer in layers]
    narrow = dtype == torch.bfloat16 and any(layer.rank for layer in layers)
    whole = inputs % 16 == 0 and sum(outputs) % 32 == 0 and all(count % 2 == 0 for count in outputs)
    small = inputs * sum(outputs) <= LARGEST
    return TileJoint(layers, dtype) if narrow and whole and small and kernels.has_tiles() else Joint(layers, dtype)


class _Own(NamedTuple):
    """An adapter."""

    a: Tensor
    b: Tensor
    scale: float


class TileJoint(Joint):
    """`Joint` in bfloat16. An input's room is [T, I + R], rounded up; what is beyond is 0."""

    def __init__(self, layers: Sequence[Adapted], dtype: torch.dtype) -> None:
        self.layers = layers
        self.inputs, count = layers[0].weight.shape[1], sum(layer.rank for layer in layers)
        self.outputs, self.ranks = slices([len(e.weight) for e in layers]), slices([e.rank for e in layers])
        self.rank = -(-count // 32) * 32
        self.depth = -(-(self.inputs + self.rank) // 32) * 32
        self._low_depth = -(-self.inputs // 32) * 32
        self._back_TR: Tensor | None = None

    def room(self, like_T: Tensor) -> Tensor:
        room = torch.empty(len(like_T), self.depth, dtype=torch.bfloat16)
        room[:, self.inputs :].zero_()
        return room

    def project(self, room: Tensor) -> Tensor:
        self._fill(room)
        whole = torch.zeros(self.outputs[-1].stop, self.depth, dtype=torch.bfloat16)
        whole[:, : self.inputs] = self._frozen()
        for own, outputs, ranks in self._adapted():
            whole[outputs, self.inputs + ranks.start : self.inputs + ranks.stop] = own.b * own.scale
        out = torch.empty(len(room), len(whole), dtype=torch.bfloat16)
        kernels.tile_product(room, kernels.pair_along(whole), out, bias=self._bias(room))
        return out

    def back(self, grad_TO: Tensor) -> Tensor:
        into = self.room(grad_TO)[:, : self.inputs]
        low = torch.zeros(self.rank, self.inputs, dtype=torch.bfloat16)
        for own, _, ranks in self._adapted():
            low[ranks] = own.a * own.scale
        right = kernels.pair_rows([layer.weight for layer in self.layers])
        kernels.tile_product(grad_TO, right, into, more=(self._low_back(grad_TO), kernels.pair_rows([low])))
        return into

    def gradients(self, x_TI: Tensor, grad_TO: Tensor) -> list[Tensor]:
        room = x_TI.as_strided((len(x_TI), self.depth), x_TI.stride())  # the input lies in its room
        self._fill(room)
        a_RI = kernels.tile_sums(self._low_back(grad_TO), x_TI)
        b_RO = kernels.tile_sums(room[:, self.inputs : self.inputs + self.rank], grad_TO)
        found = []
        for own, outputs, ranks in self._adapted():
            found += [a_RI[ranks].mul_(own.scale), b_RO[ranks, outputs].mul(own.scale).t()]
        return found

    def _fill(self, room: Tensor) -> None:
        """x A' into the room, behind x."""
        low = torch.zeros(self.rank, self._low_depth, dtype=torch.bfloat16)
        for own, _, ranks in self._adapted():
            low[ranks, : self.inputs] = own.a
        out = room[:, self.inputs : self.inputs + self.rank]
        kernels.tile_product(room[:, : self._low_depth], kernels.pair_along(low), out)

    def _low_back(self, grad_TO: Tensor) -> Tensor:
        """[T, R]: each layer's gradient times its B, without its scale."""
        if self._back_TR is None:
            diagonal = torch.zeros(self.outputs[-1].stop, self.rank, dtype=torch.bfloat16)
            for own, outputs, ranks in self._adapted():
                diagonal[outputs, ranks] = own.b
            self._back_TR = torch.empty(len(grad_TO), self.rank, dtype=torch.bfloat16)
            kernels.tile_product(grad_TO, kernels.pair_rows([diagonal]), self._back_TR)
        return self._back_TR

    def _adapted(self) -> list[tuple[_Own, slice, slice]]:
        """Each adapter, and where its outputs and ranks stand."""
        parts = zip(self.layers, self.outputs, self.ranks, strict=True)
        return [
            (_Own(layer.a, layer.b, layer.scale), outputs, ranks)
            for layer, outputs, ranks in parts
            if layer.a is not None and layer.b is not None
        ]

    def _frozen(self) -> Tensor:
        weights = [layer.weight for layer in self.layers]
        return weights[0] if len(weights) == 1 else torch.cat(weights)
