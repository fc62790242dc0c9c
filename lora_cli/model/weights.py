"""Base weights: from safetensors to a model on a device, quantized or not.

Refuses pickled weights before anything is opened, and names a shard that is missing. Knows nothing about adapters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.config import ModelConfig, QuantizationConfig
from lora_cli.errors import ModelError
from lora_cli.model.trust import refuse_disguised, refuse_shard_names, refuse_special_files

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def load_base(
    model: ModelConfig, config: PretrainedConfig, *, device: torch.device, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """The base model on `device`, all parameters frozen. `attention` None is transformers' own choice.

    Unquantized weights come in `dtype`; quantized ones compute in it unless `compute_dtype` says otherwise.

    Raises:
        ModelError: pickled or missing weight files, a checkpoint that doesn't fill the model or holds more layers,
            or a base that comes quantized by another method.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = Path(model.name_or_path).expanduser()
    if folder.is_dir():
        check_weight_files(folder)
    came_quantized = getattr(config, "quantization_config", None)
    if came_quantized is not None:
        check_prequantized(came_quantized, model)
    extra: dict[str, Any] = {}
    if model.quantization is not None and came_quantized is None:
        extra["quantization_config"] = bitsandbytes_config(model.quantization, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.name_or_path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **extra,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{model.name_or_path}: weights can't be loaded: {str(error).strip().splitlines()[0]}",
            remedy="A file that ends too early has to be downloaded or copied again.",
        ) from error
    base: PreTrainedModel = loaded[0]
    info = loaded[1]
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{model.name_or_path}: {len(info['mismatched_keys'])} tensors have another shape than config.json says, "
            f"the first {name}: {_shape(found)} in the file, {_shape(wanted)} by config.json",
            remedy="The weights belong to another config.json.",
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{model.name_or_path}: {len(missing)} tensors of the model are in no weight file, the first {missing[0]}",
            remedy="The checkpoint is incomplete, or belongs to another architecture than config.json says.",
        )
    _refuse_cut_model(model, config, info["unexpected_keys"])
    base.requires_grad_(False)
    if model.quantization is not None:
        keep_packed_weights_unchanged(base)
    return base


def _refuse_cut_model(model: ModelConfig, config: PretrainedConfig, unexpected: Iterable[str]) -> None:
    """Refuse weights of layers that config.json doesn't have: training would go on with a model cut short."""
    text = config.get_text_config()
    depth = text.num_hidden_layers + (getattr(text, "num_nextn_predict_layers", None) or 0)
    beyond = [key for key in sorted(unexpected) if (found := _LAYER.search(key)) and int(found[1]) >= depth]
    if beyond:
        raise ModelError(
            f"{model.name_or_path}: config.json says {text.num_hidden_layers} layers; the weight files hold more, "
            f"such as {beyond[0]}",
            remedy="The weights belong to another config.json.",
        )


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def bitsandbytes_config(quantization: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """transformers' quantization config for ours; `compute_dtype: auto` is the run's dtype."""
    import torch
    from transformers import BitsAndBytesConfig

    if quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = quantization.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype if compute == "auto" else getattr(torch, compute),
        bnb_4bit_quant_storage=torch.uint8,
    )


def keep_packed_weights_unchanged(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the first evaluation.

    On a CPU with AVX512_BF16, `Linear4bit.forward` in eval mode rewrites the packed weight for its inference
    kernel, and every later backward pass reads it as if it had not: gradients are wrong without a word.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_weight_files(folder: Path) -> None:
    """Refuse a folder whose weights are pickled, in disguise or not, incomplete, elsewhere or absent.

    Raises:
        ModelError: with the name of the file that is missing or must not be opened.
    """
    refuse_special_files(folder)
    index = folder / _INDEX
    if index.is_file():
        try:
            named = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index.absolute()} is not an index of shards") from error
        refuse_shard_names(named, index)
        shards = sorted(set(named))
        for shard in shards:
            if not (folder / shard).is_file():
                raise ModelError(
                    f"{folder.absolute()}: shard {shard} is missing ({len(shards)} are named in {_INDEX})",
                    remedy="Copy or download it again; nothing was loaded.",
                )
            refuse_disguised(folder / shard)
        return
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        refuse_disguised(file)
    if files:
        return
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise ModelError(
            f"{folder.absolute()}: only pickled weights ({pickled[0].name}); a pickle can run code when it is read",
            remedy="Take the safetensors version of the model, or convert a copy that you trust, once:\n"
            '  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
        )
    raise ModelError(f"{folder.absolute()}: no *.safetensors weight files")


@dataclass(frozen=True)
class Reach:
    """What bitsandbytes leaves in full precision."""

    unquantized: int
    """Parameters that stay unquantized, embeddings and head included."""
    share: float
    """Of the layers' parameters, embeddings and head left out."""


def quantization_reach(model: PreTrainedModel) -> Reach:
    """What quantization would reach of a model, live or on `meta`: linear layers but the head.

    Fused experts are plain parameters, which bitsandbytes leaves alone without a word.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(p) for part in (*tables, head) if part is not None for p in part.parameters()}
    packed = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and id(module.weight) not in outside
    }
    total = sum(p.numel() for p in model.parameters())
    layers = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    left = layers - sum(packed.values())
    return Reach(total - sum(packed.values()), left / layers if layers else 0.0)


def refuse_partial(reach: Reach, quantization: QuantizationConfig) -> None:
    """Refuse a quantized run that would mostly not be one.

    Raises:
        ModelError: above a tenth of the layers' parameters stay unquantized and the config doesn't allow it.
    """
    if reach.share > 0.1 and not quantization.allow_partial:
        raise ModelError(
            f"quantization {quantization.type} reaches too little: {reach.share:.0%} of the layers' parameters stay "
            "unquantized",
            remedy="Fused experts are plain parameters that bitsandbytes leaves alone. To run all the same, set\n"
            "model.quantization.allow_partial: true.",
        )


def check_prequantized(found: Any, model: ModelConfig) -> None:
    """A base that comes quantized is used when bitsandbytes made it and the config agrees, else refused by name."""
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    asked = model.quantization.type if model.quantization is not None else None
    if method != "bitsandbytes":
        raise ModelError(
            f"{model.name_or_path} comes quantized by {method}, which can't be trained on here",
            remedy="Take the 16-bit version of the model and set model.quantization: {type: nf4}.",
        )
    comes = "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4"))
    if asked != comes:
        raise ModelError(
            f"{model.name_or_path} comes quantized as {comes}; model.quantization says {asked or 'null'}",
            remedy=f"Set model.quantization: {{type: {comes}}}, or take the 16-bit version of the model.",
        )


def describe_quantization(quantization: QuantizationConfig | None) -> str | None:
    """`nf4, double quant`, for the plan."""
    if quantization is None:
        return None
    double = quantization.type != "int8" and quantization.double_quant
    return f"{quantization.type}, double quant" if double else quantization.type
