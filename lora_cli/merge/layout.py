"""Which tensors on disk make up which parameters of the model, and back.

transformers' conversion mapping decides: most tensors are parameters under the same or another name; the experts of
a mixture are many tensors on disk and one parameter in the model. Knows no values and nothing about adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.merge.shards import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming


@dataclass(frozen=True)
class Group:
    """Tensors on disk and the parameters that they hold; one of each unless a conversion stands between them."""

    stored: tuple[StoredTensor, ...]
    parameters: tuple[str, ...]
    conversion: Conversion | None = None

    def to_parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors, by name, as parameters."""
        if self.conversion is None:
            return {self.parameters[0]: tensors[self.stored[0].name]}
        return self.conversion.to_parameters(self, tensors)

    def to_stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters as the tensors that lie on disk."""
        if self.conversion is None:
            return {self.stored[0].name: parameters[self.parameters[0]]}
        return self.conversion.to_stored(self, parameters)


@dataclass(frozen=True)
class Conversion:
    """A conversion of transformers, bound to its model."""

    model: PreTrainedModel
    converter: WeightConverter
    target: str
    """The first parameter that it makes."""
    patterns: Mapping[str, str]
    """The pattern that each stored tensor matched."""
    renamings: Sequence[WeightRenaming]

    def to_parameters(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter: Any = deepcopy(self.converter)
        for stored in group.stored:
            converter.add_tensor(self.target, stored.name, self.patterns[stored.name], tensors[stored.name])
        return _single(converter.convert(self.target, model=self.model, config=self.model.config))

    def to_stored(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import apply_renamings

        back: Any = self.converter.reverse_transform()
        first = ""
        for name, tensor in parameters.items():
            renamed, pattern = back.rename_source_key(name)
            assert pattern is not None, f"{name} has no way back to disk"
            first = first or renamed
            back.add_tensor(first, name, pattern, tensor)
        found = _single(back.convert(first, model=self.model, config=self.model.config))
        renamings: list[Any] = [renaming.reverse_transform() for renaming in reversed(self.renamings)]
        named = {apply_renamings(name, renamings): tensor for name, tensor in found.items()}
        expected = {stored.name: stored.shape for stored in group.stored}
        if {name: tuple(tensor.shape) for name, tensor in named.items()} != expected:
            raise ModelError(
                f"{group.parameters[0]} can't be written back as {len(expected)} tensors like {group.stored[0].name}",
                remedy="Its conversion in transformers has no exact way back. Serve the adapter unmerged.",
            )
        return named


@dataclass(frozen=True)
class Layout:
    """Every tensor of a base, in the order in which it lies on disk."""

    groups: tuple[Group, ...]
    """Groups of parameters, by their first tensor."""
    strangers: tuple[StoredTensor, ...]
    """Tensors on disk that are no part of the model: old buffers, other heads. They are copied as they are."""
    tied: Mapping[str, str]
    """Parameters that lie on disk under another one's name, and that name."""

    @property
    def stored(self) -> list[StoredTensor]:
        return [tensor for group in self.groups for tensor in group.stored] + list(self.strangers)

    def group_of(self) -> dict[str, Group]:
        """The group of each parameter, tied ones included."""
        own = {name: group for group in self.groups for name in group.parameters}
        return {**own, **{name: own[source] for name, source in self.tied.items()}}


def find_layout(model: PreTrainedModel, stored: Sequence[StoredTensor]) -> Layout:
    """How `stored` fills `model`, a model on `meta`.

    Raises:
        ModelError: a tensor that is there twice, has another shape than the model's, or isn't there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    _refuse_twice(stored)
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: one for one in converters for pattern in one.source_patterns}
    plain: dict[str, StoredTensor] = {}
    gathered: dict[str, list[tuple[StoredTensor, str]]] = {}
    strangers = []
    # Conversions collect experts in the order of their numbers.
    for tensor in sorted(stored, key=lambda one: dot_natural_key(one.name)):
        name, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and tensor.name in wanted:
            name, pattern = tensor.name, None
        if name not in wanted:
            strangers.append(tensor)
        elif pattern is None:
            plain[name] = tensor
        else:
            gathered.setdefault(name, []).append((tensor, pattern))
    groups = [Group((tensor,), (name,)) for name, tensor in plain.items()]
    for name, parts in gathered.items():
        conversion = Conversion(model, converter_of[parts[0][1]], name, {t.name: p for t, p in parts}, renamings)
        groups.append(_converted(conversion, tuple(tensor for tensor, _ in parts), wanted))
    layout = Layout(_in_file_order(groups), tuple(strangers), _tied(model, groups))
    _check_complete(model, layout, wanted)
    return layout


def _converted(conversion: Conversion, stored: tuple[StoredTensor, ...], wanted: Mapping[str, Tensor]) -> Group:
    """The group of a conversion; which parameters it makes is found by running it without values."""
    import torch

    shapes = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in stored}
    found = conversion.to_parameters(Group(stored, ()), shapes)
    parameters = tuple(name for name in found if name in wanted)
    for name in parameters:
        _check_shape(name, tuple(found[name].shape), wanted)
    return Group(stored, parameters, conversion)


def _tied(model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, str]:
    """Tied parameters without a tensor of their own. Which of a tied pair lies on disk differs from file to file."""
    there = {name for group in groups for name in group.parameters}
    families: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        families.setdefault(source, {source}).add(target)
    found = {}
    for family in families.values():
        if owners := sorted(family & there):
            found.update(dict.fromkeys(family - there, owners[0]))
    return found


def _check_complete(model: PreTrainedModel, layout: Layout, wanted: Mapping[str, Tensor]) -> None:
    there = layout.group_of()
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ModelError(
            f"{len(missing)} tensors of {type(model).__name__} are in no weight file, the first {missing[0]}",
            remedy="The base is incomplete, or its weights belong to another config.json.",
        )
    for group in layout.groups:
        if group.conversion is None:
            _check_shape(group.parameters[0], group.stored[0].shape, wanted)


def _check_shape(name: str, shape: tuple[int, ...], wanted: Mapping[str, Tensor]) -> None:
    expected = tuple(wanted[name].shape)
    if shape != expected:
        raise ModelError(f"{name} is {_spelled(shape)} in the weight files and {_spelled(expected)} by config.json")


def _refuse_twice(stored: Sequence[StoredTensor]) -> None:
    seen: dict[str, StoredTensor] = {}
    for tensor in stored:
        if tensor.name in seen:
            raise ModelError(f"{tensor.name} is in {seen[tensor.name].file.name} and in {tensor.file.name}")
        seen[tensor.name] = tensor


def _in_file_order(groups: Sequence[Group]) -> tuple[Group, ...]:
    return tuple(sorted(groups, key=lambda group: min((one.file.name, one.offset) for one in group.stored)))


def _single(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}


def _spelled(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
