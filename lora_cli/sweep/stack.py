"""One frozen base and the adapters of all members: in one row, each member's tokens go through its own adapter.

Members sit in a row one after another. The base's layers see the whole row at once; beside each adapted layer a
member's own low-rank part is added to its own stretch. Attention by document keeps the stretches apart, as it keeps
documents apart.

A member's adapter is PEFT's own, made as `lora train` makes it. While it isn't seated, the base doesn't hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_cli.engine.fused.fitting import is_fused_layer, plain_call
from lora_cli.engine.fused.layer import DecoderLayer
from lora_cli.engine.fused.parts import layer_of
from lora_cli.errors import ModelError
from lora_cli.sweep.layer import run_layer
from lora_cli.sweep.lowrank import Run, add_low_rank

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FEWEST_TOKENS = 128
"""Of a member in a row, on average, from which on whole layers run fused."""
Seats = tuple[tuple[int, int], ...]
"""(member, tokens) in the order of a row."""


@dataclass
class Adapter:
    """One member's adapter: the PEFT model around the base, and the layers that it puts in place of the base's."""

    model: PeftModel
    layers: Mapping[str, Any]
    """PEFT's LoRA layers by the base's module names."""
    peft_config: Any

    @classmethod
    def taken_from(cls, base: PreTrainedModel, model: PeftModel) -> Adapter:
        """The adapter that has just been attached to `base`; the base is left without it.

        Raises:
            ModelError: it adapts something that can't be shared.
        """
        from peft.tuners.lora import LoraLayer

        layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
        head = base.get_output_embeddings()
        for name, layer in layers.items():
            is_head = layer is head or layer.get_base_layer() is head
            if not layer.lora_A or is_head:
                what = "the head" if is_head else "an embedding"
                raise ModelError(
                    f"a sweep can't share {name}: {what} isn't run over whole rows",
                    remedy="Leave it out of adapter.target_modules, or train its members one by one with lora train.",
                )
        adapter = cls(model, layers, base.__dict__.pop("peft_config", None))
        _put(base, {name: layer.get_base_layer() for name, layer in layers.items()})
        return adapter


@dataclass
class Stack:
    """The base, and who sits where in the row that goes through it right now."""

    base: PreTrainedModel
    adapters: Sequence[Adapter]
    seats: Seats = ()
    """Set before each row. Checkpointed layers read it again in the backward pass, before the next row comes."""
    fewest_tokens: int = FEWEST_TOKENS
    _shared: dict[str, nn.Module] = field(default_factory=dict, init=False)
    _bare: dict[str, nn.Module] = field(default_factory=dict, init=False)
    _layers: dict[str, list[DecoderLayer]] = field(default_factory=dict, init=False)
    """Whole decoder layers that the fused arithmetic fits with every member's adapter in them, by member."""

    def __post_init__(self) -> None:
        for name in dict.fromkeys(name for adapter in self.adapters for name in adapter.layers):
            layers = [adapter.layers.get(name) for adapter in self.adapters]
            self._bare[name] = next(layer for layer in layers if layer is not None).get_base_layer()
            self._shared[name] = SharedLinear(self._bare[name], layers, self)
        self._find_layers()

    def _find_layers(self) -> None:
        """Of the layers that run fused for one member, those that do so for all."""
        fused = [name for name, module in self.base.named_modules() if is_fused_layer(module)]
        found: dict[str, list[DecoderLayer | None]] = {name: [] for name in fused}
        for number in range(len(self.adapters)):
            with self.seated(number):
                for name, layers in found.items():
                    layers.append(layer_of(self.base.get_submodule(name)))
        for name, layers in found.items():
            fitting = [layer for layer in layers if layer is not None]
            if len(fitting) == len(layers):
                self._layers[name] = fitting

    @contextmanager
    def shared(self) -> Iterator[PreTrainedModel]:
        """Within it, the base runs rows of several members, as `seats` says."""
        _put(self.base, self._shared)
        modules = {name: self.base.get_submodule(name) for name in self._layers}
        own = {name: module.forward for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = partial(self._run_layer, module, self._layers[name], cast("partial[Any]", own[name]))
        try:
            yield self.base
        finally:
            for name, module in modules.items():
                module.forward = own[name]
            _put(self.base, self._bare)

    def _run_layer(
        self,
        module: nn.Module,
        layers: Sequence[DecoderLayer],
        own: partial[Any],
        hidden_1TM: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = plain_call(module, layers[0], hidden_1TM, args, kwargs)
        # Weights are joined with each member's adapter anew: for a few tokens that costs more than it saves.
        if call is None or hidden_1TM.shape[1] < len(self.seats) * self.fewest_tokens:
            return own(hidden_1TM, *args, **kwargs)
        stretches, start = [], 0
        for member, tokens in self.seats:
            stretches.append((slice(start, start + tokens), layers[member]))
            start += tokens
        given = (hidden_1TM.squeeze(0), stretches, *call)
        with torch.autocast(hidden_1TM.device.type, enabled=False):
            if own.keywords["recompute"]:
                return checkpoint(run_layer, *given, use_reentrant=False).unsqueeze(0)
            return run_layer(*given).unsqueeze(0)

    @contextmanager
    def seated(self, member: int) -> Iterator[PeftModel]:
        """Within it, the base holds one member's adapter, exactly as `lora train` would have it."""
        adapter = self.adapters[member]
        _put(self.base, adapter.layers)
        self.base.peft_config = adapter.peft_config
        try:
            yield adapter.model
        finally:
            _put(self.base, self._bare)
            del self.base.peft_config


class SharedLinear(nn.Module):
    """A frozen linear layer with the LoRA of every member that targets it."""

    def __init__(self, base_layer: nn.Module, layers: Sequence[Any | None], stack: Stack) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layers = nn.ModuleList(layer for layer in layers if layer is not None)
        self._layers = layers
        self._stack = stack

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
        seats = self._stack.seats
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


def _put(base: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into their places in the base."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, module)
