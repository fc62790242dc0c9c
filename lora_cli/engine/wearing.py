"""Adapters put on a live base, one or several at a time, and taken off again.

The base is loaded once; what an adapter overwrites of it (biases, copies of embeddings) is put back. Knows nothing
about where a base comes from or what it is asked.

What is damaged, not finite or another model's is refused, not half used: PEFT leaves out what has no place in the base,
and leaves at random what the file lacks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.engine.assembly import causal_lm, leave_casting_to_autocast
from lora_cli.errors import ModelError
from lora_cli.model.adapter import check_adapter_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_NO_SUM = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)
"""Settings of adapters that are more than a sum of low-rank products, so that weights and stacks mean nothing."""


@dataclass(frozen=True)
class Piece:
    """An adapter and how strongly it counts."""

    folder: Path
    weight: float = 1.0


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


@contextmanager
def worn(base: PreTrainedModel, pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The base with all of `pieces` on it, their weighted effects added up. Afterwards the base is as it was.

    Raises:
        ModelError: an adapter that belongs to another base, or that can't be weighted or stacked.
    """
    for piece in pieces:
        read_names(piece.folder)
        if len(pieces) > 1 or piece.weight != 1.0:
            _check_plain(piece.folder)
    before = _about_to_be_overwritten(base, [piece.folder for piece in pieces])
    model: PeftModel | None = None
    try:
        for number, piece in enumerate(pieces):
            model = _put_on(base, model, piece.folder, f"piece{number}")
        assert model is not None, "nothing to put on"
        _activate(model, pieces)
        if dtype != torch.float32:
            leave_casting_to_autocast(model)
        yield causal_lm(model)
    finally:
        _take_off(base)
        parameters = dict(base.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def _put_on(base: PreTrainedModel, model: PeftModel | None, folder: Path, name: str) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        raise _misfit(folder, _reason(error)) from error
    saved = _names(folder)
    # PEFT would leave what doesn't match at random, or out.
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    strange = sorted(expected ^ saved, key=lambda key: ("lora_" not in key, key))
    if strange and "lora_" in strange[0]:
        where = "the file lacks" if strange[0] in expected else "the base has no place for"
        raise _misfit(folder, f"{where} {strange[0]}")
    return model


def _reason(error: Exception) -> str:
    """The first line that says something: torch heads its list of mismatches with the name of a class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])


def _misfit(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder.absolute()} doesn't fit its base: {why}",
        remedy="The adapter was trained on another model; adapter_config.json names its base.",
    )


def _activate(model: PeftModel, pieces: Sequence[Piece]) -> None:
    from peft.tuners.lora.layer import LoraLayer

    tuner: Any = model.base_model
    names = [f"piece{number}" for number in range(len(pieces))]
    if len(names) > 1:  # one alone is active, and what it may have saved of whole modules with it
        tuner.set_adapter(names)
    for name, piece in zip(names, pieces, strict=True):
        for module in model.modules():
            if isinstance(module, LoraLayer) and piece.weight != 1.0:
                module.set_scale(name, piece.weight)


def _take_off(base: PreTrainedModel) -> None:
    """PEFT's layers away, also where putting them on has failed half way."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = ""
    for name, module in list(base.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or (inside and name.startswith(inside)):
            continue
        inside = f"{name}."
        plain: Any = module
        while isinstance(plain, BaseTunerLayer | AuxiliaryTrainingWrapper):
            plain = plain.get_base_layer() if isinstance(plain, BaseTunerLayer) else plain.original_module
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, plain)
    if hasattr(base, "peft_config"):
        del base.peft_config


def _about_to_be_overwritten(base: PreTrainedModel, folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Parameters of the base that lie in the adapters' files under their own names, which PEFT loads into the base."""
    parameters = dict(base.named_parameters(remove_duplicate=False))
    found = {}
    for folder in folders:
        whole = tuple(_settings(folder).get("modules_to_save") or ())
        names = [key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in sorted(_names(folder))]
        for name in names:
            owner = name.rpartition(".")[0]
            if name in parameters and not any(owner == one or owner.endswith(f".{one}") for one in whole):
                found[name] = parameters[name].detach().clone()
    return found


def _names(folder: Path) -> frozenset[str]:
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return frozenset(file.keys())


def _check_plain(folder: Path) -> None:
    settings = _settings(folder)
    held = [name for name in _NO_SUM if settings.get(name)]
    if settings.get("bias", "none") != "none":
        held.append(f"bias {settings['bias']!r}")
    if held:
        raise ModelError(
            f"{folder.absolute()} was trained with {', '.join(held)}: it can't be weighted or stacked",
            remedy="Give it by itself, without a weight.",
        )


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found
