"""An adapter as a GGUF file, unmerged: what llama.cpp's --lora and Ollama's ADAPTER take.

llama.cpp scales each product by alpha / rank, rank being the tensor's own, and by 1 where alpha is 0
(`llama_adapter_lora_weight::get_scale`). A scale that alpha / rank can't say for all layers (rank and alpha patterns)
goes into B. Knows nothing about the base's weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.export.architectures import Architecture, find_architecture
from lora_cli.export.gguf import Written, begin, import_gguf, writing
from lora_cli.merge.adapter import AdaptedModel, Unit
from lora_cli.merge.base import Base
from lora_cli.merge.placing import lay_over


def write_adapter(base: Base, adapter: Path, path: Path, *, name: str) -> Written:
    """The adapter in the folder `adapter`, which belongs to `base`, at `path`, in float32.

    Raises:
        ModelError: an adapter that is more than low-rank products of linear layers.
    """
    gguf = import_gguf()
    architecture = find_architecture(base.config)
    adapted = lay_over(base.model, adapter)
    _check_plain(adapted)
    scales = {unit.name: _scale(unit) for unit in adapted.units}
    ranks = {unit.name: _factor(adapted, unit, "A").shape[0] for unit in adapted.units}
    alphas = {scales[name] * ranks[name] for name in scales}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    tensors: dict[str, Tensor] = {}
    for unit in adapted.units:
        parameter = unit.writes[0]
        target = architecture.tensor_name(parameter)
        tensors[f"{target}.lora_a"] = _factor(adapted, unit, "A")
        b = architecture.rows(parameter, _factor(adapted, unit, "B"))
        tensors[f"{target}.lora_b"] = (b if alpha else b * scales[unit.name]).contiguous()
    _write(gguf, path, architecture, name, alpha, tensors)
    return Written(architecture.name, "f32", len(tensors))


def _write(
    gguf: Any, path: Path, architecture: Architecture, name: str, alpha: float, tensors: dict[str, Tensor]
) -> None:
    with writing(gguf, path, architecture.name) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key, value in tensors.items():
            writer.add_tensor_info(key, value.shape, value.numpy().dtype, value.numel() * 4)
        begin(writer)
        for value in tensors.values():
            writer.write_tensor_data(value.numpy())


def _check_plain(adapted: AdaptedModel) -> None:
    config = adapted.config
    held = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        f"bias {config.bias!r}": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "adapted embeddings": any(type(unit.module) is not Linear for unit in adapted.units),
    }
    found = [name for name, there in held.items() if there]
    if found:
        raise ModelError(
            f"it was trained with {', '.join(found)}, which an adapter in GGUF can't hold",
            remedy="Merge it, and export the merged model: lora merge TARGET --output DIR.",
        )


def _factor(adapted: AdaptedModel, unit: Unit, which: str) -> Tensor:
    """[r, in] or [out, r] in float32, also for GPT-2's Conv1D, whose weight lies turned."""
    return adapted.values[f"{unit.name}.lora_{which}.default.weight"].to(torch.float32).contiguous()


def _scale(unit: Unit) -> float:
    layer: Any = unit.module
    return float(layer.scaling["default"])
