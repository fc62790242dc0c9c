"""Several adapters of one base as one, by PEFT's `add_weighted_adapter`.

`cat` is the exact weighted sum of what the adapters do, at the sum of their ranks; `svd` the best approximation of it
at one rank; the others are published ways to keep adapters out of each other's way. Only the adapters are in memory:
the base stands in with weights that take no room.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from peft import PeftModel
from torch import nn

from lora_cli.engine.trained import Target, find_target, split_weight
from lora_cli.errors import ModelError, UserError
from lora_cli.merge.placing import WEIGHTS, lay_over, read_adapter
from lora_cli.merge.result import CombinedAdapter, Method
from lora_cli.merge.staging import check_free, commit, copy_tokenizer, staged
from lora_cli.model.architecture import build_on_meta, read_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NEEDS_DENSITY = ("ties", "dare", "magnitude_prune")
"""How the names of those methods begin."""


@dataclass(frozen=True)
class Weighted:
    """An adapter and how strongly it counts."""

    target: Target
    weight: float


def find_weighted(texts: Sequence[str]) -> list[Weighted]:
    """The adapters that `texts` name, each as TARGET or TARGET:WEIGHT.

    Raises:
        UserError: one that isn't there, or one that belongs to another base than the first.
    """
    found = []
    for text in texts:
        path, weight = split_weight(text)
        found.append(Weighted(find_adapter(path), weight))
    first = found[0].target
    for other in found[1:]:
        if other.target.model.name_or_path != first.model.name_or_path:
            raise ModelError(
                f"{other.target.result} belongs to {other.target.model.name_or_path}, "
                f"{first.result} to {first.model.name_or_path}: adapters of two bases can't be combined"
            )
        if other.target.model.quantization != first.model.quantization:
            raise ModelError(f"{other.target.result} saw its base quantized otherwise than {first.result} did")
    return found


def find_adapter(text: str) -> Target:
    """The adapter that `text` names; what its run noted goes before a config that may have changed since.

    Raises:
        UserError: there is no such thing, or nothing in it to merge.
    """
    found = find_target(text)
    if found.run is not None and Path(text).expanduser().is_file():
        found = find_target(found.run.path)
    if found.config.adapter is None:
        raise UserError(
            f"{text} is a run of full fine-tuning (adapter: null)",
            remedy=f"There is nothing to merge: {found.result.absolute()} is the whole model.\n"
            f"To make an adapter of it: lora extract {text} --rank 16 --output DIR",
        )
    return found


def combine(parts: Sequence[Weighted], method: str, density: float | None, folder: Path) -> Target:
    """The target whose adapter is the combination of `parts`; it is written to `folder`.

    Raises:
        UserError: adapters, or a method, that have no combination.
    """
    if method not in get_args(Method):
        raise UserError(f"--method {method} is not one of {', '.join(get_args(Method))}")
    if method.startswith(NEEDS_DENSITY) and (density is None or not 0 < density <= 1):
        raise UserError(f"--method {method} needs --density, the share of values to keep, such as 0.5")
    first = parts[0].target
    architecture = read_architecture(first.model)
    copied: set[str] = set()
    for part in parts:
        _check_plain(part.target)
        on_meta = build_on_meta(architecture, trust_remote_code=first.model.trust_remote_code)
        copied |= lay_over(on_meta, part.target.result).copies.keys()
    _write(parts, architecture, copied, method, density, folder)
    copy_tokenizer(first.result, folder)
    return replace(first, result=folder)


def combine_adapters(
    targets: Sequence[str], output: Path, *, method: str = "cat", density: float | None = None
) -> CombinedAdapter:
    """Several adapters, each as TARGET or TARGET:WEIGHT, as one adapter in `output`.

    Raises:
        UserError: adapters that have no combination, or an output that can't be written.
    """
    check_free(output)
    parts = find_weighted(targets)
    size = sum((part.target.result / WEIGHTS).stat().st_size for part in parts)
    with staged(output, size) as folder:
        combine(parts, method, density, folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, which names local paths
        config, _ = read_adapter(folder)
        commit(folder, output)
    return CombinedAdapter(str(output), describe(parts, method), config.r)


def describe(parts: Sequence[Weighted], method: str) -> str:
    """`cat of docs x 0.7, chat x 0.3`"""
    return f"{method} of " + ", ".join(f"{part.target.title} x {part.weight:g}" for part in parts)


def _write(
    parts: Sequence[Weighted],
    architecture: PretrainedConfig,
    copied: Set[str],
    method: str,
    density: float | None,
    folder: Path,
) -> None:
    model: Any = None
    names = [f"part{number}" for number in range(len(parts))]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        for name, part in zip(names, parts, strict=True):
            path = str(part.target.result)
            if model is None:
                base = build_on_meta(architecture, trust_remote_code=part.target.model.trust_remote_code)
                model = PeftModel.from_pretrained(_weightless(base, copied), path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
            # The combination takes its settings from the first part, and PEFT has put its scaling into the weights.
            model.peft_config[name].use_rslora = False
        try:
            torch.manual_seed(0)  # dare draws what it drops
            model.add_weighted_adapter(
                names,
                [part.weight for part in parts],
                "combination",
                combination_type=method,
                density=density,
                svd_full_matrices=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"--method {method}: {str(error).splitlines()[0]}") from error
        model.peft_config["combination"].base_model_name_or_path = parts[0].target.model.name_or_path
        model.save_pretrained(str(folder), selected_adapters=["combination"], save_embedding_layers=False)
    for file in (folder / "combination").iterdir():
        file.rename(folder / file.name)
    (folder / "combination").rmdir()


def _weightless(base: Any, copied: Set[str]) -> Any:
    """Parameters of the right shapes on the CPU, one number of memory each: PEFT asks only for device and shape.

    `copied` ones have room for the copies that were saved beside an adapter, which PEFT loads.
    """
    for path, module in base.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stand_in = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                if f"{path}.{name}" in copied:
                    stand_in = stand_in.contiguous()
                module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
    return base


def _check_plain(target: Target) -> None:
    """Refuse what a sum of low-rank products can't hold."""
    config, _ = read_adapter(target.result)
    held = {
        "use_dora": config.use_dora,
        f"bias {config.bias!r}": config.bias != "none",
        "lora_bias": config.lora_bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
    }
    found = [name for name, there in held.items() if there]
    if found:
        raise ModelError(
            f"{target.result.absolute()} was trained with {', '.join(found)}, which can't be combined",
            remedy="Merge it by itself.",
        )
