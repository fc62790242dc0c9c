"""One frozen base and the adapters of all members: which of them the base holds right now.

A member's adapter is PEFT's own, made as `lora train` makes it. While it isn't seated, the base doesn't hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_cli.engine.fused.parts import Readings, readings, remember
from lora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


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
        for name, layer in layers.items():
            children, own = _place(base, name)
            children[own] = layer.get_base_layer()
        return adapter


@dataclass
class Stack:
    """The base and its members' adapters, by the members' numbers."""

    base: PreTrainedModel
    adapters: Sequence[Adapter]
    bare: Mapping[str, nn.Module] = field(init=False)
    """The base's own layers where any member is adapted."""
    _places: Mapping[str, tuple[dict[str, nn.Module | None], str]] = field(init=False)
    """By their names, where these lie."""
    _readings: dict[int, Readings] = field(init=False, default_factory=dict)
    """By member, what its fused layers are made of: to read them anew at each seat would be a part of a small step."""

    def __post_init__(self) -> None:
        self.bare = {
            name: layer.get_base_layer() for adapter in self.adapters for name, layer in adapter.layers.items()
        }
        self._places = {name: _place(self.base, name) for name in self.bare}

    @contextmanager
    def seated(self, member: int) -> Iterator[PeftModel]:
        """Within it, the base holds one member's adapter, exactly as `lora train` would have it."""
        adapter = self.adapters[member]
        self.base.peft_config = adapter.peft_config
        try:
            with self.holding(adapter.layers):
                remember(self._readings.get(member, {}))
                yield adapter.model
                if not self._readings.get(member):
                    self._readings[member] = readings(self.base)
        finally:
            del self.base.peft_config

    @contextmanager
    def holding(self, layers: Mapping[str, nn.Module]) -> Iterator[PreTrainedModel]:
        """Within it, the base has these layers in place of its own."""
        self._put(layers)
        try:
            yield self.base
        finally:
            self._put(self.bare)

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            children, own = self._places[name]
            children[own] = module


def _place(base: nn.Module, name: str) -> tuple[dict[str, nn.Module | None], str]:
    """The children among which the module of this name is, and its name there."""
    parent, _, own = name.rpartition(".")
    return base.get_submodule(parent)._modules, own
