"""An adapter over a model on `meta`, and PEFT's own arithmetic for one module at a time.

PEFT's layers do the merging, so that every variant that PEFT can merge comes out right. Each module is filled with
real numbers in float32 just for the moment in which it is merged. Knows nothing about files; `placing` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lora_cli.errors import ModelError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Unit:
    """A module that PEFT has wrapped, outermost wrapper first."""

    name: str
    """In the PEFT model."""
    module: nn.Module
    reads: tuple[str, ...]
    """Parameters of the base that its merge needs."""
    writes: tuple[str, ...]
    """Parameters of the base that come out changed."""
    tensors: tuple[str, ...]
    """Its tensors of the adapter, by their names in the PEFT model."""


@dataclass
class AdaptedModel:
    """A PEFT model on `meta` and the values of its adapter."""

    model: PeftModel
    config: LoraConfig
    values: dict[str, Tensor]
    """Each tensor of the adapter under its name in the PEFT model, as it was saved."""
    base_paths: dict[int, str]
    """The path in the base of each of the base's modules, by identity."""
    twins: set[str] = field(default_factory=set)
    """Values that stand for a tied module's, and are its own."""
    units: tuple[Unit, ...] = ()
    replaced: dict[str, str] = field(default_factory=dict)
    """Parameters of the base that were trained themselves (biases), and which value takes their place."""
    copies: dict[str, str] = field(default_factory=dict)
    """Parameters of the base that PEFT saved beside the adapter, unchanged, and their copy."""

    def unused(self, used: Set[str]) -> list[str]:
        """Values that should have gone into the merge, and are not among `used`."""
        return sorted(self.values.keys() - self.twins - set(self.copies.values()) - used)

    def idle(self) -> list[str]:
        """Warnings about parts of the adapter that do nothing."""
        last = [name for name in self.values if ".lora_B." in name or ".lora_embedding_B." in name]
        zero = [name for name in last if not bool(self.values[name].any())]
        if not zero:
            return []
        if len(zero) == len(last):
            return [f"lora_B is zero in all {len(last)} modules: nothing was learned there"]
        return [f"lora_B is zero in {len(zero)} of {len(last)} modules, the first {short_name(zero[0])}"]

    @property
    def keeps_ties(self) -> bool:
        """Whether what the adapter does to one tied weight it does to the other."""
        return bool(self.config.ensure_weight_tying) or any(_has_tied_tokens(unit.module) for unit in self.units)

    def base_name(self, name: str) -> str | None:
        """The base's name for a parameter of the PEFT model; None where it is the adapter's own."""
        owner, _, leaf = name.rpartition(".")
        path = self.base_paths.get(id(self.model.get_submodule(owner)))
        return None if path is None else f"{path}.{leaf}" if path else leaf

    def merge(self, unit: Unit, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed parameters of `unit`, in float32; `base` holds those that it reads, likewise, to be spent."""
        if isinstance(unit.module, ModulesToSaveWrapper):
            return self._trained_module(unit)
        filled = dict(base)
        try:
            with self.filled(unit, filled), torch.no_grad():
                for layer in merging_layers(unit.module):
                    layer.merge(safe_merge=False, adapter_names=["default"])
                    layer.merged_adapters.clear()
                return {name: self._base_parameter(unit, name).data for name in unit.writes}
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise ModelError(f"{unit.name}: PEFT can't merge it: {str(error).splitlines()[0]}") from error

    def merge_slice(self, unit: Unit, rows: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Some rows of a plain linear layer's weight, merged; `own` holds what of lora_A and lora_B belongs to them.

        `rows` is spent. Units may be merged at the same time by several threads, slices of one unit may not.
        """
        layer: Any = unit.module
        put = [(layer.get_base_layer(), rows), *((getattr(layer, name)["default"], own[name]) for name in own)]
        held = [owner._parameters["weight"] for owner, _ in put]
        try:
            for owner, value in put:
                owner._parameters["weight"] = nn.Parameter(value, requires_grad=False)
            with torch.no_grad():
                layer.merge(safe_merge=False, adapter_names=["default"])
            layer.merged_adapters.clear()
            return layer.get_base_layer().weight.data  # type: ignore[no-any-return]
        finally:
            for (owner, _), parameter in zip(put, held, strict=True):
                owner._parameters["weight"] = parameter

    @contextmanager
    def filled(self, unit: Unit, base: Mapping[str, Tensor], device: str | torch.device = "cpu") -> Iterator[None]:
        """Within it, `unit` has real parameters: those of `base` and its own, in float32."""
        held: list[tuple[nn.Module, str, nn.Parameter]] = []

        def put(owner: nn.Module, leaf: str, value: Tensor) -> None:
            held.append((owner, leaf, owner._parameters[leaf]))  # type: ignore[arg-type]
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

        try:
            for name in unit.tensors:
                path, _, leaf = name.rpartition(".")
                put(self.model.get_submodule(path), leaf, self.values[name].to(device, torch.float32))
            for owner in unit.module.modules():
                base_path = self.base_paths.get(id(owner))
                for leaf in list(owner._parameters) if base_path is not None else ():
                    name = f"{base_path}.{leaf}"
                    if name in base:
                        put(owner, leaf, base[name])
            yield
        finally:
            for owner, leaf, parameter in reversed(held):
                owner._parameters[leaf] = parameter

    def base_parameters(self, unit: Unit) -> list[str]:
        """All parameters of the base inside `unit`."""
        found = []
        for module in unit.module.modules():
            path = self.base_paths.get(id(module))
            leaves = [leaf for leaf, parameter in module._parameters.items() if parameter is not None]
            found += [f"{path}.{leaf}" for leaf in leaves if path is not None]
        return found

    def _base_parameter(self, unit: Unit, name: str) -> nn.Parameter:
        path, _, leaf = name.rpartition(".")
        owner = next(module for module in unit.module.modules() if self.base_paths.get(id(module)) == path)
        return owner.get_parameter(leaf)

    def _trained_module(self, unit: Unit) -> dict[str, Tensor]:
        prefix = f"{unit.name}.modules_to_save.default."
        path = self.base_paths[id(unit.module.original_module)]
        return {f"{path}.{name.removeprefix(prefix)}": self.values[name].float() for name in unit.tensors}


def merging_layers(module: nn.Module) -> list[Any]:
    """The layers of a unit that merge, outermost first: parameter wrappers are nested, a token wrapper holds one."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _has_tied_tokens(module: nn.Module) -> bool:
    return isinstance(module, TrainableTokensWrapper) and bool(module.token_adapter.tied_adapter)


def short_name(name: str) -> str:
    """A name in the PEFT model as a person would say it."""
    return name.removeprefix("base_model.model.").replace(".default", "")
