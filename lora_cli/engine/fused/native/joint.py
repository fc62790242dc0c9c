"""Adapted linear layers that share an input as one product there and one back, their outputs side by side.

In float32 the weight is W + s B A; in bfloat16, where that sum would lose small adapters, [x, x A'] is multiplied by
[W, s B]', so that a token's output is rounded once. Joint weights exist for one group of layers at a time.

Dimension names: T tokens, I inputs, O outputs of all layers, R ranks of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_cli.engine.fused.linear import Adapted, slices


class Joint:
    """Layers side by side, made ready for one pass over their input, there or back."""

    def __init__(self, layers: Sequence[Adapted], dtype: torch.dtype) -> None:
        self.layers = layers
        self.exact = dtype == torch.float32
        """Whether W + s B A is what is multiplied."""
        self.outputs, self.ranks = slices([len(each.weight) for each in layers]), slices([e.rank for e in layers])
        """Each layer's part of O and of R."""
        found = [layer.a for layer in layers if layer.a is not None]
        self.a_RI = None if not found else (found[0] if len(found) == 1 else torch.cat(found)).to(dtype)
        self.b = [None if layer.b is None else layer.b.to(dtype) for layer in layers]
        """[o, r] of each, without its scale."""
        self._back_TR: Tensor | None = None

    def room(self, like_T: Tensor) -> Tensor:
        """[T, I], or in 16 bits [T, I + R]: where the input goes before it is projected, in its first columns."""
        width = self.layers[0].weight.shape[1]
        room = like_T.new_empty(len(like_T), width if self.exact else width + self.ranks[-1].stop)
        room[:, width:].zero_()  # oneDNN reads on to a whole tile: what it multiplies by 0 must be a number
        return room

    def project(self, room: Tensor) -> Tensor:
        """[T, O], all layers' outputs, from an input in its room; in 16 bits x A' is added to it there."""
        weight = self._weight() if self.exact else self._with_low()
        if not self.exact and self.a_RI is not None:
            width = self.a_RI.shape[1]
            torch.mm(room[:, :width], self.a_RI.t(), out=room[:, width:])
        bias = self._bias(room)
        return torch.mm(room, weight.t()) if bias is None else torch.addmm(bias, room, weight.t())

    def back(self, grad_TO: Tensor) -> Tensor:
        """The gradient of the input, from those of the outputs, in its room."""
        width = self.layers[0].weight.shape[1]
        into = self.room(grad_TO)[:, :width]
        torch.mm(grad_TO, self._weight(), out=into)
        if self.a_RI is not None and not self.exact:
            into.addmm_(self._scaled(self._low_back(grad_TO)), self.a_RI)
        return into

    def gradients(self, x_TI: Tensor, grad_TO: Tensor) -> list[Tensor]:
        """Those of A and B of each layer that has them, in float32."""
        if self.a_RI is None:
            return []
        low_TR, a_RI = torch.mm(x_TI, self.a_RI.t()), torch.mm(self._low_back(grad_TO).t(), x_TI).float()
        found = []
        for layer, outputs, ranks in zip(self.layers, self.outputs, self.ranks, strict=True):
            if layer.rank:
                b_rO = torch.mm(low_TR[:, ranks].t(), grad_TO[:, outputs]).float()
                found += [a_RI[ranks].mul_(layer.scale), b_rO.mul_(layer.scale).t()]
        return found

    def _low_back(self, grad_TO: Tensor) -> Tensor:
        """[T, R]: each layer's gradient times its B, without its scale."""
        if self._back_TR is None:
            self._back_TR = grad_TO.new_empty(len(grad_TO), self.ranks[-1].stop)
            for b, outputs, ranks in zip(self.b, self.outputs, self.ranks, strict=True):
                if b is not None:
                    torch.mm(grad_TO[:, outputs], b, out=self._back_TR[:, ranks])
        return self._back_TR

    def _scaled(self, back_TR: Tensor) -> Tensor:
        scales = {layer.scale for layer in self.layers if layer.rank}
        if len(scales) == 1:
            return back_TR * scales.pop()
        return torch.cat([back_TR[:, r] * layer.scale for layer, r in zip(self.layers, self.ranks, strict=True)], 1)

    def _weight(self) -> Tensor:
        """[O, I]: W of all layers, in float32 with s B A added."""
        first = self.layers[0]
        if len(self.layers) == 1 and (not self.exact or not first.rank):
            return first.weight
        whole = first.weight.new_empty(self.outputs[-1].stop, first.weight.shape[1])
        for layer, b, outputs in zip(self.layers, self.b, self.outputs, strict=True):
            if self.exact and b is not None and layer.a is not None:
                torch.addmm(layer.weight, b, layer.a, alpha=layer.scale, out=whole[outputs])
            else:
                whole[outputs] = layer.weight
        return whole

    def _with_low(self) -> Tensor:
        """[O, I + R]: each W, with s B in the columns of its own ranks and zeros in those of the others."""
        width = self.layers[0].weight.shape[1]
        whole = self.layers[0].weight.new_zeros(self.outputs[-1].stop, width + self.ranks[-1].stop)
        for layer, b, outputs, ranks in zip(self.layers, self.b, self.outputs, self.ranks, strict=True):
            whole[outputs, :width] = layer.weight
            if b is not None:
                torch.mul(b, layer.scale, out=whole[outputs, width + ranks.start : width + ranks.stop])
        return whole

    def _bias(self, like: Tensor) -> Tensor | None:
        if all(layer.bias is None for layer in self.layers):
            return None
        pieces = [like.new_zeros(len(e.weight)) if e.bias is None else e.bias for e in self.layers]
        return torch.cat(pieces)
