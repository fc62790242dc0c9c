"""Putting an adapter on its base: what is damaged, not finite or another model's is refused, not half used.

PEFT leaves out what has no place in the base, and leaves at random what the file lacks. Knows adapters; knows nothing
about rows or figures.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import ModelError
from lora_cli.model.adapter import check_adapter_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_OTHER_BASE = "The adapter was trained on another model; adapter_config.json names its base."


def read_names(folder: Path) -> frozenset[str]:
    """The names of an adapter's tensors, after all of them have been looked at; needs no base.

    Raises:
        ModelError: the file is missing, damaged, or holds NaN or infinity.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    check_adapter_folder(folder)
    path = folder / _WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = frozenset(file.keys())
            spoilt = [name for name in sorted(names) if not bool(torch.isfinite(file.get_tensor(name).float()).all())]
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path.absolute()} can't be read: {error}", remedy="It is damaged or was cut short: copy it again."
        ) from error
    if spoilt:
        raise ModelError(
            f"{path.absolute()} is not finite: NaN or infinity in {spoilt[0]}"
            + (f" and {len(spoilt) - 1:,} more" if len(spoilt) > 1 else ""),
            remedy="Its training went astray; an earlier checkpoint may be sound.",
        )
    return names


def attach(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter in `folder` on `base`.

    Raises:
        ModelError: it can't be used, or belongs to another base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    saved = read_names(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        raise ModelError(f"{folder.absolute()} doesn't fit its base: {_reason(error)}", remedy=_OTHER_BASE) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    strange = sorted(expected ^ saved, key=lambda name: ("lora_" not in name, name))
    if strange and "lora_" in strange[0]:
        where = "the file lacks" if strange[0] in expected else "the base has no place for"
        model.unload()
        raise ModelError(f"{folder.absolute()} doesn't fit its base: {where} {strange[0]}", remedy=_OTHER_BASE)
    return model


def _reason(error: Exception) -> str:
    """The first line that says something: torch heads its list of mismatches with the name of a class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])
