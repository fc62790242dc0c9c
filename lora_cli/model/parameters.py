"""Parameter counts per module kind, of a live model or of one on the `meta` device.

Counts are logical: a packed 4-bit weight counts its values, not its bytes; tied weights count once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_cli.plan import ModuleKind, ParameterReport

if TYPE_CHECKING:
    from torch import nn

# What PEFT puts between a module and its path in the base model.
_WRAPPERS = re.compile(
    r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.[^.]+"
    r"|lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.[^.]+)?)(?=\.|$)"
)
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save)(\.|$)")


@dataclass
class _Tally:
    modules: set[str] = field(default_factory=set)
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    base: int = 0
    trainable: int = 0


def count_parameters(model: nn.Module) -> ParameterReport:
    """Trainable and total parameters of `model`, and those of each kind of module, in model order."""
    kinds = kind_names(model)
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    total = 0
    for name, parameter in model.named_parameters():  # a tied weight comes once
        owner, _, leaf = name.rpartition(".")
        tally = tallies[kinds[owner]]
        tally.modules.add(base_path(owner))
        count = logical_count(model, owner, leaf)
        total += count
        if parameter.requires_grad:
            tally.trainable += count
        if not _ADDED.search(name):
            tally.base += count
            if leaf == "weight":
                tally.shapes.add(logical_shape(model, owner, leaf))
    report = tuple(
        ModuleKind(
            name=name,
            modules=len(tally.modules),
            shape=" x ".join(map(str, next(iter(tally.shapes)))) if len(tally.shapes) == 1 else "",
            base_parameters=tally.base,
            trainable_parameters=tally.trainable,
        )
        for name, tally in tallies.items()
    )
    return ParameterReport(sum(kind.trainable_parameters for kind in report), total, report)


def base_path(name: str) -> str:
    """The path in the base model of a module that PEFT may have wrapped."""
    return _WRAPPERS.sub("", name)


def kind_names(model: nn.Module) -> dict[str, str]:
    """Each module's kind: its last name, with the parent's before it where one name stands for two things.

    GPT-2 has a `c_proj` in its attention and another in its MLP; layer numbers never count.
    """
    leaves: dict[str, tuple[str, ...]] = {
        name: tuple(part for part in base_path(name).split(".") if not part.isdigit())
        for name, _ in model.named_modules()
    }
    parents: dict[str, set[str]] = defaultdict(set)
    for parts in leaves.values():
        if parts:
            parents[parts[-1]].add(".".join(parts[-2:-1]))
    return {
        name: ".".join(parts[-2:]) if parts and len(parents[parts[-1]]) > 1 else (parts[-1] if parts else "model")
        for name, parts in leaves.items()
    }


def logical_shape(model: nn.Module, owner: str, leaf: str) -> tuple[int, ...]:
    """The shape of a parameter's values; a packed 4-bit weight has the shape of the layer that it stands for."""
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    state = getattr(parameter, "quant_state", None)  # only bitsandbytes' Params4bit has one
    return tuple(state.shape) if state is not None else tuple(parameter.shape)


def logical_count(model: nn.Module, owner: str, leaf: str) -> int:
    """How many values a parameter holds."""
    count = 1
    for size in logical_shape(model, owner, leaf):
        count *= size
    return count
