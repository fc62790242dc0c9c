"""Linear layers with LoRA that share one input, such as q, k and v: y_i = x W_i' + b_i + s_i (x A_i') B_i'.

For one pass over an input on a CPU, weights and adapters are joined, so that a layer is one product there and one back:
in float32 as W + s B A, in 16 bits, where that sum would lose small adapters, as [x, x A'] [W, s B]'. The joined
weights of one layer at a time exist. On a CUDA card, whose narrow products cost no more than a copy of W would, the
adapters of all layers make one low product and are added to each output. Nothing is computed for frozen weights; 4-bit
ones are made dense for one product at a time. Knows nothing of PEFT's modules (`fitting` does).

Dimension names: T tokens, I inputs, O outputs, R ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_cli.engine.fused import card

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True, eq=False)
class Adapted:
    """One linear layer: what is frozen in it, and what is trained."""

    weight: Tensor
    """[O, I], frozen; packed where it has a `state`."""
    bias: Tensor | None
    """[O], frozen."""
    a: Tensor | None
    """[r, I], float32, trained; None without an adapter."""
    b: Tensor | None
    """[O, r]."""
    scale: float = 1.0
    state: QuantState | None = None
    """bitsandbytes' account of a 4-bit weight."""

    @property
    def outputs(self) -> int:
        """O."""
        return int((self.weight if self.state is None else self.state).shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, or of what it is made dense in."""
        return self.weight.dtype if self.state is None else self.state.dtype

    def dense(self) -> Tensor:
        """The weight, [O, I]."""
        if self.state is None:
            return self.weight
        if self.weight.is_cuda:
            return card.dense(self.weight, self.state)
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.weight, self.state)
        return weight

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return () if self.a is None or self.b is None else (self.a, self.b)


class Joined:
    """Layers that share an input, made ready for one pass over it, there or back."""

    def __init__(self, layers: Sequence[Adapted], dtype: torch.dtype, *, keep_low: bool = False) -> None:
        self.layers = layers
        on_card = layers[0].weight.is_cuda
        self.exact = dtype == torch.float32 and not on_card
        """Whether W + s B A is what is multiplied."""
        self.joined = not self.exact and not on_card
        """Whether [x, x A'] and [W, s B] are."""
        found = [layer.a for layer in layers if layer.a is not None]
        self.a_RI = None if not found else (found[0] if len(found) == 1 else torch.cat(found)).to(dtype)
        """The A of all layers, one below the other."""
        self.scaled_b = [None if layer.b is None else _scaled(layer.b, layer.scale, dtype) for layer in layers]
        self.kept_low: list[Tensor] = []
        """What `low` came to in each `project`, where it is kept; `Gradients` takes them in the same order."""
        self._keep_low = keep_low
        self.columns = slices([layer.rank for layer in layers])
        """Where each layer's ranks stand among those of all."""
        self._sums = [
            torch.addmm(layer.dense(), b_Or, layer.a)
            if self.exact and b_Or is not None and layer.a is not None
            else None
            for layer, b_Or in zip(layers, self.scaled_b, strict=True)
        ]

    def weight(self, number: int) -> Tensor:
        """[O, I] by which one layer's input is multiplied."""
        joint = self._sums[number]
        return self.layers[number].dense() if joint is None else joint

    def low(self, x_TI: Tensor) -> Tensor | None:
        """x A' of all layers, [T, R]."""
        return None if self.a_RI is None else torch.mm(x_TI, self.a_RI.t())

    def project(self, x_TI: Tensor, outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The layers' [T, O] outputs, into `outputs` when they are given."""
        joint = x_TI
        low_TR = None if self.exact else self.low(x_TI)
        if self._keep_low and low_TR is not None:
            self.kept_low.append(low_TR)
        if self.joined and low_TR is not None:
            joint = torch.cat([x_TI, low_TR], dim=1)
        if outputs is None:
            outputs = [x_TI.new_empty(x_TI.shape[0], layer.outputs) for layer in self.layers]
        for number, (layer, out) in enumerate(zip(self.layers, outputs, strict=True)):
            weight = self._joint_weight(number) if joint is not x_TI else self.weight(number)
            if layer.bias is None:
                torch.mm(joint, weight.t(), out=out)
            else:
                torch.addmm(layer.bias, joint, weight.t(), out=out)
            b_Or = self.scaled_b[number]
            if low_TR is not None and joint is x_TI and b_Or is not None:
                out.addmm_(low_TR[:, self.columns[number]], b_Or.t())
        return list(outputs)

    def _joint_weight(self, number: int) -> Tensor:
        """[O, I + R] with the layer's s B in the columns of its ranks, and zeros in those of the others."""
        assert self.a_RI is not None
        weight, b_Or, columns = self.weight(number), self.scaled_b[number], self.columns[number]
        rows, width = weight.shape
        whole = weight.new_zeros(rows, width + len(self.a_RI))
        whole[:, :width] = weight
        if b_Or is not None:
            whole[:, width + columns.start : width + columns.stop] = b_Or
        return whole


def slices(sizes: Sequence[int]) -> list[slice]:
    """Where each of consecutive parts stands."""
    parts, end = [], 0
    for size in sizes:
        parts.append(slice(end, end + size))
        end += size
    return parts


class Products:
    """The joined layers of one pass, made as they are needed.

    Args:
        keep: for the way back as well, with x A' of each input. On a card, where that is little; joined weights aren't.
    """

    def __init__(self, dtype: torch.dtype, *, keep: bool) -> None:
        self._dtype, self._keep = dtype, keep
        self._known: dict[Adapted, Joined] = {}

    def of(self, *layers: Adapted) -> Joined:
        """Layers that share an input."""
        if not self._keep:
            return Joined(layers, self._dtype)
        if layers[0] not in self._known:
            self._known[layers[0]] = Joined(layers, self._dtype, keep_low=True)
        return self._known[layers[0]]


class Gradients:
    """Gradients of the adapters of layers that share an input, summed over blocks of tokens."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._a_RI: Tensor | None = None
        self._b: list[Tensor | None] = [None] * len(joined.layers)
        self._back_TR: Tensor | None = None

    def add(self, x_TI: Tensor, grads: Sequence[Tensor], into: Tensor | None) -> None:
        """Take in the gradients of outputs, and give that of the input into `into`, when it is wanted."""
        self.back(grads, into)
        self.collect(x_TI, grads)

    def back(self, grads: Sequence[Tensor], into: Tensor | None) -> None:
        """The first half of `add`, which needs no input: its gradient."""
        joined = self._joined
        if into is not None:
            torch.mm(grads[0], joined.weight(0), out=into)
            for number, grad in enumerate(grads[1:], 1):
                into.addmm_(grad, joined.weight(number))
        if joined.a_RI is None:
            return
        self._back_TR = grads[0].new_empty(len(grads[0]), len(joined.a_RI))
        for grad, b_Or, columns in zip(grads, joined.scaled_b, joined.columns, strict=True):
            if b_Or is not None:
                torch.mm(grad, b_Or, out=self._back_TR[:, columns])
        if into is not None and not joined.exact:
            into.addmm_(self._back_TR, joined.a_RI)

    def collect(self, x_TI: Tensor, grads: Sequence[Tensor]) -> None:
        """The second half: gradients of the adapters, from the same ones of outputs."""
        joined = self._joined
        low_TR = joined.kept_low.pop(0) if joined.kept_low else joined.low(x_TI)
        if low_TR is None or self._back_TR is None:
            return
        for number, (grad, columns) in enumerate(zip(grads, joined.columns, strict=True)):
            if joined.scaled_b[number] is not None:
                self._b[number] = _sum(self._b[number], low_TR[:, columns].t(), grad, joined.layers[number].scale)
        self._a_RI = _sum(self._a_RI, self._back_TR.t(), x_TI, 1.0)
        self._back_TR = None

    def results(self) -> list[Tensor]:
        """The gradients of A and B of each layer that has them, in float32."""
        found: list[Tensor] = []
        for layer, b_rO, columns in zip(self._joined.layers, self._b, self._joined.columns, strict=True):
            if layer.a is None:
                continue
            assert self._a_RI is not None and b_rO is not None
            found += [self._a_RI[columns], b_rO.t()]
        return found


def _scaled(b_Or: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s B in another dtype, rounded once where that is one operation."""
    if b_Or.dtype == dtype or not b_Or.is_cuda:
        return b_Or.to(dtype) * scale
    return torch.mul(b_Or, scale, out=torch.empty_like(b_Or, dtype=dtype))


def _sum(total: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """total + scale * left @ right in float32, in place where there is a total."""
    if right.dtype == torch.float32:
        if total is not None:
            return total.addmm_(left, right, alpha=scale)
        product = torch.mm(left, right)
        return product if scale == 1.0 else product.mul_(scale)
    product = torch.mm(left, right).float()
    return product.mul_(scale) if total is None else total.add_(product, alpha=scale)


class LoraLinear(torch.autograd.Function):
    """One adapted linear layer on [..., I]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Adapted, *trained: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        (out,) = Joined([layer], x.dtype).project(flat)
        ctx.layer = layer
        ctx.save_for_backward(flat, *trained)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, *_ = ctx.saved_tensors
        gradients = Gradients(Joined([ctx.layer], flat.dtype))
        into = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        gradients.add(flat, [grad.reshape(-1, grad.shape[-1])], into)
        return (None if into is None else into.view(*grad.shape[:-1], -1), None, *gradients.results())
