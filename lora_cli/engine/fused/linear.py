"""Linear layers with LoRA that share one input, such as q, k and v: y_i = x W_i' + b_i + s_i (x A_i') B_i'.

All A are one product with x. Nothing is computed for frozen weights, scales ride on products that are there anyway,
and sums go in place. Knows nothing of PEFT's modules (`fitting` does).

Dimension names: T tokens, I inputs, O outputs, R ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Adapted:
    """One linear layer: what is frozen in it, and what is trained."""

    weight: Tensor
    """[O, I], frozen."""
    bias: Tensor | None
    """[O], frozen."""
    a: Tensor | None
    """[r, I], float32, trained; None without an adapter."""
    b: Tensor | None
    """[O, r]."""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return () if self.a is None or self.b is None else (self.a, self.b)


def shared_a(layers: Sequence[Adapted], dtype: torch.dtype) -> Tensor | None:
    """[R, I]: the A of all layers, one below the other; None when none has one."""
    found = [layer.a for layer in layers if layer.a is not None]
    if not found:
        return None
    return (found[0] if len(found) == 1 else torch.cat(found)).to(dtype)


def project(
    layers: Sequence[Adapted], x_TI: Tensor, a_RI: Tensor | None, outputs: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """The layers' [T, O] outputs, into `outputs` when they are given, and x A' [T, R] for the way back."""
    low_TR = None if a_RI is None else torch.mm(x_TI, a_RI.t())
    results, start = [], 0
    for number, layer in enumerate(layers):
        out = x_TI.new_empty(x_TI.shape[0], layer.weight.shape[0]) if outputs is None else outputs[number]
        if layer.bias is None:
            torch.mm(x_TI, layer.weight.t(), out=out)
        else:
            torch.addmm(layer.bias, x_TI, layer.weight.t(), out=out)
        if layer.b is not None and low_TR is not None:
            end = start + layer.rank
            out.addmm_(low_TR[:, start:end], layer.b.to(x_TI.dtype).t(), alpha=layer.scale)
            start = end
        results.append(out)
    return results, low_TR


class Gradients:
    """Gradients of the adapters of layers that share an input, summed over blocks of tokens."""

    def __init__(self, layers: Sequence[Adapted]) -> None:
        self._layers = layers
        self._a_RI: Tensor | None = None
        self._b: list[Tensor | None] = [None] * len(layers)

    def add(
        self,
        x_TI: Tensor,
        low_TR: Tensor | None,
        a_RI: Tensor | None,
        grads: Sequence[Tensor],
        into: Tensor | None,
        *,
        fresh: bool = True,
    ) -> None:
        """Take in the gradients of outputs, and give that of the input into `into`, when it is wanted.

        Args:
            fresh: overwrite `into` rather than add to it.
        """
        if into is not None:
            for layer, grad in zip(self._layers, grads, strict=True):
                if fresh:
                    torch.mm(grad, layer.weight, out=into)
                else:
                    into.addmm_(grad, layer.weight)
                fresh = False
        if a_RI is None or low_TR is None:
            return
        back_TR = torch.empty_like(low_TR)
        start = 0
        for number, (layer, grad) in enumerate(zip(self._layers, grads, strict=True)):
            if layer.b is None:
                continue
            end = start + layer.rank
            part, low = back_TR[:, start:end], low_TR[:, start:end]
            torch.mm(grad, layer.b.to(grad.dtype) * layer.scale, out=part)
            self._b[number] = _sum(self._b[number], low.t(), grad, layer.scale)
            start = end
        if into is not None:
            into.addmm_(back_TR, a_RI)
        self._a_RI = _sum(self._a_RI, back_TR.t(), x_TI, 1.0)

    def results(self) -> list[Tensor]:
        """The gradients of A and B of each layer that has them, in float32."""
        found: list[Tensor] = []
        start = 0
        for layer, b_rO in zip(self._layers, self._b, strict=True):
            if layer.a is None:
                continue
            assert self._a_RI is not None and b_rO is not None
            end = start + layer.rank
            found += [self._a_RI[start:end].float(), b_rO.t().float()]
            start = end
        return found


def _sum(total: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """total + scale * left @ right, in place where there is a total. 16-bit products are summed in float32."""
    if total is None:
        fresh = left.new_empty(left.shape[0], right.shape[1])
        product = torch.addmm(fresh, left, right, beta=0, alpha=scale)
        return product if product.dtype == torch.float32 else product.float()
    if right.dtype == total.dtype:
        return total.addmm_(left, right, alpha=scale)
    return total.add_(torch.mm(left, right), alpha=scale)


class LoraLinear(torch.autograd.Function):
    """One adapted linear layer on [..., I]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Adapted, *trained: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a_RI = shared_a([layer], x.dtype)
        (out,), low = project([layer], flat, a_RI)
        ctx.layer = layer
        ctx.save_for_backward(flat, low, *trained)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, *_ = ctx.saved_tensors
        layer = ctx.layer
        gradients = Gradients([layer])
        into = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        grad_TO = grad.reshape(-1, grad.shape[-1])
        gradients.add(flat, low, shared_a([layer], flat.dtype), [grad_TO], into)
        return (None if into is None else into.view(*grad.shape[:-1], -1), None, *gradients.results())
