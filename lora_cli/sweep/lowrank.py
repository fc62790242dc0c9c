"""The low-rank parts of several adapters, each on its own stretch of one row: batched products, forward and backward.

Members next to each other with as many tokens and the same rank go through one product. Knows nothing of where the
weights come from.

Dimension names: T tokens of the row, I inputs, O outputs; of a run: K members, L tokens of each, R the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Members next to each other whose products have one shape."""

    start: int
    """The first token."""
    length: int
    """L, tokens of each member."""
    factors: range
    """Which of the factors are theirs, one A and one B each."""
    scalings: tuple[float, ...]
    """K factors of B A x."""

    @property
    def stop(self) -> int:
        return self.start + self.length * len(self.factors)


def add_low_rank(base_TO: Tensor, x_TI: Tensor, runs: tuple[Run, ...], factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`base` plus scaling B A x for each member on its own tokens; tokens of no run stay as they are.

    Args:
        factors: (A [R, I], B [O, R]), float32, in the order of the runs.

    Returns:
        [T, O] in the dtype of `base`.
    """
    result: Tensor = _AddLowRank.apply(base_TO, x_TI, runs, *(each for pair in factors for each in pair))  # type: ignore[no-untyped-call]
    return result


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, x_TI: Tensor, runs: tuple[Run, ...], *factors: Tensor) -> Tensor:
        x_TI = x_TI.to(base_TO.dtype)
        result_TO = base_TO.clone()
        saved: list[Tensor] = []
        for run in runs:
            A_KRI = torch.stack([factors[2 * i] for i in run.factors]).to(x_TI.dtype)
            B_KOR = torch.stack([factors[2 * i + 1] for i in run.factors]).to(x_TI.dtype) * _column(run, x_TI)
            h_KLR = torch.bmm(_part(x_TI, run), A_KRI.mT)
            _part(result_TO, run).baddbmm_(h_KLR, B_KOR.mT)
            saved += [A_KRI, B_KOR, h_KLR]
        ctx.runs = runs
        ctx.save_for_backward(x_TI, *saved)
        return result_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *saved = ctx.saved_tensors
        grad_TO = grad_TO.contiguous()
        wanted = ctx.needs_input_grad[1]
        covered = sum(run.stop - run.start for run in ctx.runs)
        make = torch.empty_like if covered == len(x_TI) else torch.zeros_like
        x_grad_TI = make(x_TI) if wanted else None
        grads: list[Tensor] = []
        for number, run in enumerate(ctx.runs):
            A_KRI, B_KOR, h_KLR = saved[3 * number : 3 * number + 3]
            grad_KLO, x_KLI = _part(grad_TO, run), _part(x_TI, run)
            h_grad_KLR = torch.bmm(grad_KLO, B_KOR)
            A_grad_KRI = torch.bmm(h_grad_KLR.mT, x_KLI).float()
            B_grad_KOR = torch.bmm(grad_KLO.mT, h_KLR).float() * _column(run, grad_TO).float()
            grads += [each for pair in zip(A_grad_KRI, B_grad_KOR, strict=True) for each in pair]
            if x_grad_TI is not None:
                torch.bmm(h_grad_KLR, A_KRI, out=_part(x_grad_TI, run))
        return (grad_TO, x_grad_TI, None, *grads)


def _part(all_TX: Tensor, run: Run) -> Tensor:
    """A run's tokens as a view [K, L, X]."""
    part: Tensor = all_TX[run.start : run.stop].unflatten(0, (len(run.factors), run.length))
    return part


def _column(run: Run, like: Tensor) -> Tensor:
    """The scalings, [K, 1, 1]."""
    return torch.tensor(run.scalings, dtype=like.dtype, device=like.device).view(-1, 1, 1)
