"""From a saved adapter to one that lies over a model on `meta`, tensor for tensor.

PEFT says which tensor belongs where; what fits nothing, is missing or holds no numbers is refused by name. Knows
nothing about the base's weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.errors import ModelError
from lora_cli.merge.adapter import AdaptedModel, Unit, merging_layers, short_name
from lora_cli.merge.shards import read_header
from lora_cli.model.adapter import check_adapter_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take something out of the base's weights, so that the adapter fits only what is left of it."""


def lay_over(base: PreTrainedModel, folder: Path) -> AdaptedModel:
    """The adapter in `folder` over `base`, a model on `meta`.

    Raises:
        ModelError: the adapter can't be read, holds NaN or infinity, or doesn't fit the model tensor for tensor.
    """
    config, saved = read_adapter(folder)
    paths = {id(module): name for name, module in base.named_modules()}
    model = _wrapped(base, config)
    values = _placed(model, saved, folder)
    adapted = AdaptedModel(model, config, values, paths)
    _share_tied(adapted)
    _check_fit(adapted, folder)
    adapted.units = tuple(_units(adapted))
    used = {name for unit in adapted.units for name in unit.tensors}
    for name in values.keys() - used:
        base_name = adapted.base_name(name)
        assert base_name is not None, f"{name} belongs to no wrapped module"
        kind = adapted.replaced if _is_trained_bias(config, name) else adapted.copies
        kind[base_name] = name
    return adapted


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The settings and tensors of a saved adapter.

    Raises:
        ModelError: it can't be read, belongs to a changed base, or holds NaN or infinity.
    """
    check_adapter_folder(folder)
    file = folder / WEIGHTS
    read_header(file)  # says it better when the file is cut short
    with _quiet():
        config = LoraConfig.from_pretrained(str(folder))
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        raise ModelError(
            f"{folder.absolute()}: init_lora_weights {config.init_lora_weights!r} takes a part out of the base",
            remedy="Save it as a plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    saved = load_file(file)
    for name, tensor in saved.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{file.absolute()}: {name} holds NaN or infinity",
                remedy="The training diverged. Take an earlier checkpoint, or train with a lower learning rate.",
            )
    config.init_lora_weights = False
    config.inference_mode = True
    return config, saved


def _wrapped(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        with _quiet(), torch.device("meta"):
            return PeftModel(base, config)
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise ModelError(
            f"the adapter doesn't fit {type(base).__name__}: {str(error).splitlines()[0]}",
            remedy="It was trained on another base, or on another version of it.",
        ) from error


def _placed(model: PeftModel, saved: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Each saved tensor under its name in the model: PEFT's own loading, caught before it copies anything."""
    from torch.nn.modules.module import _IncompatibleKeys

    placed: dict[str, Tensor] = {}

    def catch(state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        placed.update(state)
        return _IncompatibleKeys([], [])

    model.load_state_dict = catch  # type: ignore[method-assign, assignment]
    try:
        with _quiet():
            set_peft_model_state_dict(model, dict(saved))
    except KeyError as error:
        raise ModelError(f"{folder.absolute()}: {WEIGHTS} lacks {error.args[0]}") from error
    finally:
        del model.load_state_dict
    return placed


def _share_tied(adapted: AdaptedModel) -> None:
    """Give a parameter that is another one's twin that one's value; PEFT saves it once."""
    by_identity: dict[int, Tensor] = {}
    parameters = dict(adapted.model.named_parameters(remove_duplicate=False))
    for name, value in adapted.values.items():
        if name in parameters and adapted.base_name(name) is None:
            by_identity[id(parameters[name])] = value
    for name, parameter in parameters.items():
        if name not in adapted.values and id(parameter) in by_identity:
            adapted.values[name] = by_identity[id(parameter)]
            adapted.twins.add(name)


def _check_fit(adapted: AdaptedModel, folder: Path) -> None:
    """Refuse an adapter that doesn't fit tensor for tensor."""
    parameters = dict(adapted.model.named_parameters(remove_duplicate=False))
    where = (folder / WEIGHTS).absolute()
    strangers = [name for name in adapted.values if name not in parameters]
    if strangers:
        raise ModelError(
            f"{where}: {len(strangers)} of {len(adapted.values)} tensors fit no module of the base, "
            f"the first {short_name(strangers[0])}",
            remedy="The adapter was trained on another base, or its names were changed.",
        )
    for name, value in adapted.values.items():
        expected = parameters[name].shape
        resized = adapted.base_name(name) is not None and value.shape[1:] == expected[1:]
        if value.shape != expected and not resized:
            raise ModelError(
                f"{where}: {short_name(name)} is {list(value.shape)}, the base asks for {list(expected)}",
                remedy="The adapter was trained on a base of another size.",
            )
    for name in parameters:
        if name not in adapted.values and adapted.base_name(name) is None:
            raise ModelError(
                f"{where} lacks {short_name(name)}", remedy="The file is incomplete, or its names were changed."
            )


def _units(adapted: AdaptedModel) -> Iterator[Unit]:
    inside = ""
    for name, module in adapted.model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or (inside and name.startswith(inside)):
            continue
        inside = f"{name}."
        assert isinstance(module, nn.Module)
        tensors = tuple(one for one in adapted.values if one.startswith(inside) and adapted.base_name(one) is None)
        if isinstance(module, ModulesToSaveWrapper):
            path = adapted.base_paths[id(module.original_module)]
            prefix = f"{inside}modules_to_save.default."
            writes = tuple(f"{path}.{one.removeprefix(prefix)}" for one in tensors)
            yield Unit(name, module, (), writes, tensors)
        else:
            names = tuple(dict.fromkeys(_merged_parameters(adapted, module)))
            yield Unit(name, module, names, names, tensors)


def _merged_parameters(adapted: AdaptedModel, module: nn.Module) -> Iterator[str]:
    """Parameters of the base that the layers of a unit add something to."""
    for layer in merging_layers(module):
        path = adapted.base_paths.get(id(layer.get_base_layer()))
        if path is None:
            raise ModelError(
                "the adapter wraps one module twice (trainable_token_indices of a tied weight beside modules_to_save)",
                remedy="Such a pair has no merged form. Serve the adapter unmerged.",
            )
        if isinstance(layer, ParamWrapper):
            yield f"{path}.{layer.parameter_name}"
            continue
        yield f"{path}.weight"
        if any(getattr(layer, "lora_bias", {}).values()):
            yield f"{path}.bias"


def _is_trained_bias(config: LoraConfig, name: str) -> bool:
    return config.bias != "none" and name.endswith(".bias")


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of what is checked here, and of what it does by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
