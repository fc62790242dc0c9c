"""A base that lies on disk quantized by bitsandbytes: its packed tensors, each as the weight that it stands for.

The packed weight, its scales and their tables are many tensors on disk and one tensor here. What comes out is what a
run on such a base computes with. Knows nothing about adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.merge.shards import StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_STATE = ".quant_state.bitsandbytes__"
_SCALES_INT8 = ".SCB"
_FORMAT_INT8 = ".weight_format"


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A packed weight. File, offset and size are those of its packed numbers, dtype and shape what they stand for."""

    parts: tuple[tuple[str, StoredTensor], ...] = ()
    """Its tensors on disk, by what they are: `weight`, `absmax`, `SCB`, ..."""
    turned: bool = False
    """Whether the model holds it the other way round (GPT-2's Conv1D)."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def read_dtype(self) -> torch.dtype:
        return torch.float32 if "SCB" in dict(self.parts) else self.dtype

    def read(self) -> Tensor:
        tensors = {name: part.read() for name, part in self.parts}
        value = _int8(tensors) if "SCB" in tensors else _four_bits(tensors)
        return value.T.contiguous() if self.turned else value


def quantization_on_disk(config: PretrainedConfig, name: str) -> str | None:
    """`nf4`, `fp4`, `int8`, where bitsandbytes has packed the weights; None where nothing did.

    Raises:
        ModelError: another method did.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method", "an unknown method")
    if method != "bitsandbytes":
        raise ModelError(
            f"{name} lies on disk quantized by {method}: only bitsandbytes' weights can be unpacked exactly as they "
            "were trained on",
            remedy="Merge into the 16-bit version of the model, or serve the adapter unmerged (lora export --to vllm).",
        )
    return "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4"))


def gather_packed(stored: Sequence[StoredTensor], model: PreTrainedModel) -> list[StoredTensor]:
    """`stored` with each packed weight as one tensor; `model` is on `meta`.

    Raises:
        ModelError: a packed weight lacks its scales.
    """
    named = {tensor.name: tensor for tensor in stored}
    gathered: list[StoredTensor] = []
    used: set[str] = set()
    for tensor in stored:
        if _STATE in tensor.name:
            parts = _parts_of_four_bits(tensor, named)
        elif tensor.name.endswith(_SCALES_INT8):
            owner = tensor.name.removesuffix(_SCALES_INT8)
            parts = {"weight": _there(f"{owner}.weight", named), "SCB": tensor}
            used.add(f"{owner}{_FORMAT_INT8}")
        else:
            continue
        used.update(part.name for part in parts.values())
        gathered.append(_gathered(parts, model))
    return [*gathered, *(tensor for tensor in stored if tensor.name not in used)]


def _parts_of_four_bits(state: StoredTensor, named: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    weight = state.name[: state.name.index(_STATE)]
    parts = {"weight": _there(weight, named), f"quant_state.bitsandbytes__{state.name.rpartition('__')[2]}": state}
    for leaf in ("absmax", "quant_map"):
        parts[leaf] = _there(f"{weight}.{leaf}", named)
    for leaf in ("nested_absmax", "nested_quant_map"):
        if f"{weight}.{leaf}" in named:
            parts[leaf] = named[f"{weight}.{leaf}"]
    return parts


def _gathered(parts: dict[str, StoredTensor], model: PreTrainedModel) -> PackedTensor:
    weight = parts["weight"]
    if "SCB" in parts:
        named = model.config.dtype
        shape, dtype = weight.shape, named if isinstance(named, torch.dtype) else torch.float16
    else:
        state = next(part for name, part in parts.items() if name.startswith("quant_state"))
        settings = json.loads(bytes(state.read().tolist()))
        shape, dtype = tuple(settings["shape"]), getattr(torch, settings["dtype"])
    turned = _is_conv1d(weight.name, model)
    return PackedTensor(
        name=weight.name,
        dtype=dtype,
        shape=shape[::-1] if turned else shape,
        file=weight.file,
        offset=weight.offset,
        num_bytes=weight.num_bytes,
        parts=tuple(parts.items()),
        turned=turned,
    )


def _is_conv1d(name: str, model: PreTrainedModel) -> bool:
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    owner = name.removesuffix(".weight")
    return isinstance(modules.get(owner, modules.get(f"{model.base_model_prefix}.{owner}")), Conv1D)


def _there(name: str, named: dict[str, StoredTensor]) -> StoredTensor:
    if name not in named:
        raise ModelError(f"{name} is in no weight file, and a packed weight can't be read without it")
    return named[name]


def _four_bits(tensors: dict[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed = tensors.pop("weight")
    state: Any = QuantState.from_dict(tensors, device=torch.device("cpu"))
    value: Tensor = dequantize_4bit(packed, state)
    return value


def _int8(tensors: dict[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    value: Tensor = int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    return value
