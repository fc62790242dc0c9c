"""The base's weights as parameters of the model, read one group at a time: as they are on disk, or as they were when
a quantized run trained on them.

For the latter, unless they lie on disk packed, each weight is quantized and dequantized again by bitsandbytes, the way
that transformers loads it. Knows nothing about adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_cli.config import ModelConfig, QuantizationConfig
from lora_cli.merge.layout import Group, Layout, find_layout
from lora_cli.merge.packed import gather_packed, quantization_on_disk
from lora_cli.merge.shards import read_header
from lora_cli.model.architecture import build_on_meta
from lora_cli.model.weights import bitsandbytes_config, check_weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Quantized:
    """How a run saw its base."""

    settings: QuantizationConfig
    dtype: torch.dtype
    """In which the weights came to be quantized, and in which the others were used."""
    transposed: Mapping[str, bool]
    """Each quantized parameter, and whether transformers turned it first (GPT-2's Conv1D)."""

    def seen(self, name: str, weight: Tensor) -> Tensor:
        """A parameter as the run saw it."""
        value = weight.to(self.dtype)
        if name not in self.transposed:
            return value
        if self.transposed[name]:
            return self._round_trip(value.T.contiguous()).T.contiguous()
        return self._round_trip(value)

    def _round_trip(self, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
        from bitsandbytes.nn.modules import Params4bit

        if self.settings.type == "int8":
            packed, scales, _ = int8_vectorwise_quant(weight.half())
            seen: Tensor = int8_vectorwise_dequant(packed, scales).to(self.dtype)
            return seen
        packed_weight: Any = Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=self.settings.double_quant,
            quant_type=self.settings.type,
            quant_storage=torch.uint8,
        )
        packed_weight = packed_weight.to(weight.device)  # packs it
        return dequantize_4bit(packed_weight.data, packed_weight.quant_state)


@dataclass(frozen=True)
class Base:
    """The weights of a base."""

    folder: Path
    config: PretrainedConfig
    model: PreTrainedModel
    """On `meta`."""
    layout: Layout
    quantized: Quantized | None
    """How the run saw it; None where it saw what lies on disk."""
    packed: str | None = None
    """How it lies on disk quantized: `nf4`, `int8`; None where it doesn't."""

    def read(self, group: Group, *, as_quantized: bool) -> dict[str, Tensor]:
        """The parameters of a group."""
        parameters = group.to_parameters({one.name: one.read() for one in group.stored})
        if not as_quantized or self.quantized is None:
            return parameters
        return {
            name: self.quantized.seen(name, value) if value.is_floating_point() else value
            for name, value in parameters.items()
        }


def open_base(model: ModelConfig, folder: Path, config: PretrainedConfig, train_dtype: torch.dtype | None) -> Base:
    """The base in `folder`; nothing but headers is read. `train_dtype` is the run's, where it is known.

    Raises:
        ModelError: weights that are missing, cut short, pickled, quantized on disk by other than bitsandbytes, or of
            another model.
    """
    packed = quantization_on_disk(config, model.name_or_path)
    check_weight_files(folder)
    stored = [tensor for file in weight_files(folder) for tensor in read_header(file)]
    on_meta = build_on_meta(config, trust_remote_code=model.trust_remote_code)
    if packed is not None:
        stored = gather_packed(stored, on_meta)
    layout = find_layout(on_meta, stored)
    quantized = None
    if model.quantization is not None and packed is None:
        dtype = train_dtype or torch.bfloat16
        quantized = Quantized(model.quantization, dtype, _quantized_parameters(model, config, dtype))
    return Base(folder, config, on_meta, layout, quantized, packed)


def weight_files(folder: Path) -> list[Path]:
    """The shards of a model, in order: those of its index, or else the one file."""
    import json

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _quantized_parameters(model: ModelConfig, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, bool]:
    """The parameters that bitsandbytes would pack, by transformers' own choice."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import AutoHfQuantizer

    assert model.quantization is not None
    quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(model.quantization, dtype), pre_quantized=False)
    replaced: Any = build_on_meta(config, trust_remote_code=model.trust_remote_code)
    quantizer.preprocess_model(model=replaced, device_map=None)
    packed: dict[str, Any] = {
        name: module for name, module in replaced.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)
    }
    return {f"{name}.weight": issubclass(module.source_cls, Conv1D) for name, module in packed.items()}
