"""The adapter: a PEFT LoRA attached to the base as the config says, in float32.

Knows which modules a model offers and refuses targets that match nothing. The same code attaches to real weights
and to the `meta` device.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.bounds import OutOfBounds, bounded
from lora_cli.config import AdapterConfig
from lora_cli.errors import ModelError
from lora_cli.model.parameters import kind_names
from lora_cli.model.trust import refuse_adapter_settings, refuse_disguised, refuse_special_files

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


_CONFIG = "adapter_config.json"


def attach_adapter(base: PreTrainedModel, adapter: AdapterConfig, *, seed: int) -> PeftModel:
    """`base` with a fresh LoRA, or with the one in `adapter.path`, ready to train.

    Every trainable parameter is float32; all others are frozen. The first weights are a function of `seed`.

    Raises:
        ModelError: targets that match nothing, or an adapter folder that can't be used.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    with _without_conv1d_warning():
        if adapter.path is not None:
            model = _existing_adapter(base, Path(adapter.path))
        else:
            refuse_endless_patterns(base, adapter.model_dump())
            check_targets(base, adapter)
            try:
                model = get_peft_model(base, lora_config(base, adapter))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ModelError(f"adapter: {error}", remedy=_offer(base)) from error
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model


def _existing_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    check_adapter_folder(folder)
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    refuse_endless_patterns(base, settings)
    try:
        model: PeftModel = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder.absolute()}: the adapter can't be put on {type(base).__name__}: {first}",
            remedy="It was made for another base, or its adapter_config.json was changed.",
        ) from error
    return model


def refuse_endless_patterns(base: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Refuse regular expressions that take forever on the names of this model; PEFT matches them against each.

    Raises:
        ModelError: with the expression.
    """
    found = [settings.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    found += [key for name in ("rank_pattern", "alpha_pattern") for key in settings.get(name) or ()]
    for pattern in found:
        if not isinstance(pattern, str):
            continue
        try:
            with bounded():
                for name, _ in base.named_modules():
                    re.fullmatch(pattern, name)
        except re.error as error:
            raise ModelError(f"{pattern!r} is no regular expression: {error}") from error
        except OutOfBounds as error:
            raise ModelError(f"the adapter's expression {pattern!r} {error} to match against the model") from error


def lora_config(base: PreTrainedModel, adapter: AdapterConfig) -> LoraConfig:
    """PEFT's config for ours. `all-linear` is kept to the language model."""
    from peft import LoraConfig

    targets = adapter.target_modules
    exclude: str | list[str] | None = _as_peft(adapter.exclude_modules)
    outside = [*linear_modules_outside_language_model(base), *_routers(base)] if targets == "all-linear" else []
    if outside:
        # PEFT takes a list of names or one expression, not both.
        names = [*outside, *([exclude] if isinstance(exclude, str) else exclude or [])]
        exclude = names
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=_as_peft(targets),
        exclude_modules=exclude,
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        modules_to_save=_as_peft(adapter.modules_to_save),
        init_lora_weights=adapter.init_lora_weights,
        layers_to_transform=_as_peft(adapter.layers_to_transform),
        rank_pattern=dict(adapter.rank_pattern or {}),
        alpha_pattern=dict(adapter.alpha_pattern or {}),
        target_parameters=_as_peft(adapter.target_parameters),
    )


def check_targets(base: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Refuse a target that matches no module; PEFT itself is content when any one of them does.

    Raises:
        ModelError: with the modules that the model offers.
    """
    names = [name for name, _ in base.named_modules()]
    targets = adapter.target_modules
    if targets == "all-linear":
        lost = []
    elif isinstance(targets, str):
        try:
            found = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise ModelError(f"adapter.target_modules: {targets!r} is no regular expression: {error}") from error
        lost = [] if found else [targets]
    else:
        lost = [t for t in targets or () if not any(n == t or n.endswith(f".{t}") for n in names)]
    if lost:
        raise ModelError(
            f"adapter.target_modules: {', '.join(map(repr, lost))} match{'es' if len(lost) == 1 else ''} no module of "
            f"{type(base).__name__}",
            remedy=_offer(base),
        )
    for field in ("modules_to_save", "target_parameters"):
        offered = names if field == "modules_to_save" else [name for name, _ in base.named_parameters()]
        for wanted in getattr(adapter, field) or ():
            if not any(n == wanted or n.endswith(f".{wanted}") for n in offered):
                near = dict.fromkeys(".".join(name.split(".")[-2:]) for name in offered)
                near |= dict.fromkeys(name.split(".")[-1] for name in offered)
                matches = get_close_matches(wanted, near, n=3)
                raise ModelError(
                    f"adapter.{field}: {wanted!r} matches nothing in {type(base).__name__}",
                    remedy=f"Did you mean {' or '.join(matches)}?" if matches else None,
                )


def check_adapter_folder(folder: Path) -> None:
    """Refuse an adapter folder that is missing, incomplete or pickled.

    Raises:
        ModelError: with the file that is missing or must not be opened.
    """
    if not folder.is_dir():
        raise ModelError(f"no adapter folder {folder.absolute()}")
    refuse_special_files(folder)
    config = folder / _CONFIG
    if not config.is_file():
        raise ModelError(f"{folder.absolute()} has no adapter_config.json")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{config.absolute()} is not JSON: {error}") from error
    refuse_adapter_settings(settings, config)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder.absolute()} has no adapter_model.safetensors"
            + ("; adapter_model.bin is a pickle, which can run code when it is read" if pickled else "")
        )
    refuse_disguised(weights)


def linear_modules_outside_language_model(base: PreTrainedModel) -> list[str]:
    """Names of linear layers that belong to a vision or audio tower, or to a projector between them."""
    decoder = base.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    head = base.get_output_embeddings()
    return [
        name
        for name, module in base.named_modules()
        if is_linear(module) and id(module) not in inside and module is not head
    ]


def unreached_by_all_linear(base: PreTrainedModel) -> tuple[str, ...]:
    """Kinds of weight in the layers that `all-linear` leaves alone: fused experts, convolutions, other towers."""
    from torch import nn

    inside = {id(p) for module in base.modules() if is_linear(module) for p in module.parameters(recurse=False)}
    outside = set(linear_modules_outside_language_model(base))
    head = base.get_output_embeddings()
    tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(p) for part in (*tables, head) if part is not None for p in part.parameters()}
    kinds = kind_names(base)
    found: dict[str, None] = {}
    for name, parameter in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in outside:
            found[f"{owner.split('.')[0]}.*" if "." not in owner else ".".join(owner.split(".")[:2]) + ".*"] = None
        elif id(parameter) not in inside and id(parameter) not in embeddings and parameter.dim() >= 2:
            found[f"{kinds[owner]}.{leaf}" if leaf != "weight" else kinds[owner]] = None
    return tuple(found)


def _routers(base: PreTrainedModel) -> list[str]:
    """Names of routers made as linear layers, in Llama 4 and PhiMoE: they give tuples, which LoRA can't wrap."""
    return [name for name, module in base.named_modules() if type(module).__name__.endswith("Router")]


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be put around it as around a linear layer."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and not type(module).__name__.endswith("Router")


def _offer(base: PreTrainedModel) -> str:
    """What the model has to offer, as a remedy."""
    kinds = kind_names(base)
    linear = dict.fromkeys(kinds[name].split(".")[-1] for name, m in base.named_modules() if is_linear(m))
    return f"Its linear layers are {', '.join(linear)}; `all-linear` takes all but the head."


def _as_peft(value: Any) -> Any:
    """PEFT tells lists from other sequences."""
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _without_conv1d_warning() -> Iterator[None]:
    """PEFT sets fan_in_fan_out by itself for GPT-2's Conv1D, rightly, and warns each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        yield
