"""Several members in one row: each member's tokens go through its own adapter.

Members sit in a row one after another. The base's layers see the whole row at once; beside each adapted layer a
member's own low-rank part is added to its own stretch. Attention by document keeps the stretches apart, as it keeps
documents apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_cli.sweep.lowrank import Run, add_low_rank
from lora_cli.sweep.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Seats = tuple[tuple[int, int], ...]
"""(member, tokens) in the order of a row."""


class Row:
    """The base with all adapters in it, and who sits where in the row that goes through it right now."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.seats: Seats = ()
        """Set before each row. Checkpointed layers read it again in the backward pass, before the next row comes."""
        self._layers = {
            name: SharedLinear(bare, [adapter.layers.get(name) for adapter in stack.adapters], self)
            for name, bare in stack.bare.items()
        }

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Within it, the base runs rows of several members, as `seats` says."""
        with self.stack.holding(self._layers) as base:
            yield base


class SharedLinear(nn.Module):
    """A frozen linear layer with the LoRA of every member that targets it."""

    def __init__(self, base_layer: nn.Module, layers: Sequence[Any | None], row: Row) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layers = nn.ModuleList(layer for layer in layers if layer is not None)
        self._layers = layers
        self._row = row

    @property
    def weight(self) -> Tensor:
        """Some models look at a layer's weight for its dtype."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[1, T, I] to [1, T, O].

        Raises:
            NotOneRow: the layer is given something other than the row, as an expert is.
        """
        base: Tensor = self.base_layer(x, *args, **kwargs)
        seats = self._row.seats
        if x.shape[:-1].numel() != sum(tokens for _, tokens in seats):
            raise NotOneRow
        runs, factors = _runs(seats, self._layers)
        if not runs:
            return base
        x_TI, base_TO = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
        x_TI = _with_dropout(x_TI, seats, self._layers) if self.training else x_TI
        return add_low_rank(base_TO, x_TI, runs, factors).view(base.shape)


class NotOneRow(Exception):
    """An adapted layer sees a part of the row only, or sees it otherwise than token by token."""


def _runs(seats: Seats, layers: Sequence[Any | None]) -> tuple[tuple[Run, ...], list[tuple[Tensor, Tensor]]]:
    """Who is adapted here, with neighbours of one shape together."""
    found: list[list[tuple[int, int, Any]]] = []
    start = 0
    for member, tokens in seats:
        layer = layers[member]
        if layer is not None and tokens:
            last = found[-1][-1] if found else None
            alike = last is not None and (last[0] + last[1], last[1], last[2].r) == (start, tokens, layer.r)
            if alike:
                found[-1].append((start, tokens, layer))
            else:
                found.append([(start, tokens, layer)])
        start += tokens
    runs: list[Run] = []
    factors: list[tuple[Tensor, Tensor]] = []
    for group in found:
        scalings = tuple(layer.scaling["default"] for _, _, layer in group)
        runs.append(Run(group[0][0], group[0][1], range(len(factors), len(factors) + len(group)), scalings))
        factors += [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for _, _, layer in group]
    return tuple(runs), factors


def _with_dropout(x_TI: Tensor, seats: Seats, layers: Sequence[Any | None]) -> Tensor:
    """What the adapters see: each member's own dropout on its own stretch."""
    seated = [layers[member] for member, _ in seats]
    drops = [None if layer is None else layer.lora_dropout["default"] for layer in seated]
    if all(drop is None or isinstance(drop, nn.Identity) for drop in drops):
        return x_TI
    parts = x_TI.split([tokens for _, tokens in seats])
    return torch.cat([part if drop is None else drop(part) for part, drop in zip(parts, drops, strict=True)])
