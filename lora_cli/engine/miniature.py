"""A small random copy of a model that holds each kind of its layers once.

What a self-test proves of the copy holds for the model, because the code that runs is the same: isolation of packed
documents, positions, what stands between the backbone and the logits. The copy is float32, and its weights are drawn
larger than transformers would draw them, so that a leak shows in the first digits and not in the fifth.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_cli.model.architecture import build_on_meta

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 64
WINDOW = 5
"""Sliding windows and attention chunks of the copy: shorter than the documents that it is tried on."""

_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
_CHUNKS = ("chunk_size", "mamba_chunk_size")
"""Rows that a recurrent layer takes at once, padded up to: they change nothing but time."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Ids that the copy's vocabulary has, below those that its documents are made of."""

# Settings that shrink together, whatever an architecture calls them: then sums and products of them still agree,
# such as a Mamba layer's heads times their size with its width. Sizes of one head, ranks and states stay.
_HEADS = re.compile(r"(^|_)(n|num)(_\w+)?_heads?$|(^|_)n(um)?_?groups$")
_SIZES = re.compile(r"(hidden_size|intermediate_size|n_embd|n_inner|d_model|d_inner|d_ssm|d_ff|ffn_dim|width)$")

_LARGEST = 160_000_000
"""Parameters; what is larger isn't cheap to try."""


class NoMiniature(Exception):
    """No small copy of the model could be built; the message says why."""


def miniature(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 copy on the CPU, in eval mode, with few and narrow layers.

    Raises:
        NoMiniature: not even a copy that is shorter, but as wide as the model, can be built and run.
    """
    depth = _depth_with_every_kind(config)
    failure = ""
    for narrow in (_narrow_heads, _few_heads, _fewer_of_everything, _as_wide):
        try:
            small = _shorter(config, depth)
            narrow(small.get_text_config())
            if _parameters(small) > _LARGEST:
                failure = failure or f"none has fewer than {_LARGEST:,} parameters"
                continue
            model = _build(small, seed)
            with torch.no_grad():
                model(input_ids=torch.arange(3)[None] + 3, use_cache=False)
        except Exception as error:  # whatever the architecture's own code raises for numbers it can't have
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        return model
    raise NoMiniature(failure)


def _shorter(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The config with its first `depth` layers, few tokens and short windows; other towers have one layer."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    full_depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full_depth:
            setattr(text, name, value[:depth])
        elif name.startswith("vocab_size"):
            setattr(text, name, VOCABULARY)
        elif name in _TOKENS and value is not None:
            setattr(text, name, _TOKENS[name])
        elif name in _WINDOWS and isinstance(value, int):
            setattr(text, name, WINDOW)
        elif name in _CHUNKS and isinstance(value, int):
            setattr(text, name, 8)
    text.num_hidden_layers = depth
    for tower in small.sub_configs:
        other = getattr(small, tower)
        if other is not None and other is not text and isinstance(vars(other).get("num_hidden_layers"), int):
            other.num_hidden_layers = 1
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    return small


def _narrow_heads(text: PretrainedConfig) -> None:
    """The smallest copy: few heads of 16 values."""
    _narrow(text, 16)


def _few_heads(text: PretrainedConfig) -> None:
    """Few heads, each as wide as the model's: rotary tables may be written out for that width."""
    _narrow(text, None)


def _fewer_of_everything(text: PretrainedConfig) -> None:
    """Heads of every kind and all widths divided by one number, for layers that aren't attention alone."""
    sizes = {name: value for name, value in vars(text).items() if isinstance(value, int)}
    heads = {name: value for name, value in sizes.items() if _HEADS.search(name) and value > 0}
    most = vars(text).get("num_attention_heads") or max(heads.values(), default=text.hidden_size // 64)
    factor = next(most // few for few in (4, 2, 1) if most % few == 0)
    for name, value in heads.items():
        setattr(text, name, max(1, value // factor))
    for name, value in sizes.items():
        if _SIZES.search(name):
            setattr(text, name, value // factor)
    _few_experts(text)


def _as_wide(text: PretrainedConfig) -> None:
    """No narrower than the model."""


def _narrow(text: PretrainedConfig, head_size: int | None) -> None:
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    own_head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    size = head_size or own_head_size
    few_key_heads = min(key_heads, 2)
    few_heads = few_key_heads * min(heads // key_heads, 2)
    text.hidden_size = few_heads * size
    text.num_attention_heads = few_heads
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = few_key_heads
    if vars(text).get("head_dim"):  # a property where it follows from the rest
        text.head_dim = size
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 2 * text.hidden_size)
    _few_experts(text)


def _few_experts(text: PretrainedConfig) -> None:
    for name in _EXPERTS:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > 0:
            setattr(text, name, min(getattr(text, name), 8))
    if isinstance(getattr(text, "n_group", None), int):  # DeepSeek picks groups of experts first
        text.n_group, text.topk_group = 2, 1
    if isinstance(getattr(text, "num_experts_per_tok", None), int):
        text.num_experts_per_tok = min(text.num_experts_per_tok, 2)


def _depth_with_every_kind(config: PretrainedConfig) -> int:
    """Layers from the first on until each kind of layer has come once: Gemma 3 needs 6, Llama 1."""
    model = build_on_meta(config)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    depth = config.get_text_config().num_hidden_layers
    for stack in stacks:
        if len(stack) == depth:
            kinds = _kinds(list(stack))
            return max(kinds.index(kind) for kind in set(kinds)) + 1
    return int(depth)


def _kinds(layers: list[nn.Module]) -> list[tuple[Any, ...]]:
    """What tells one kind of layer from another: classes, shapes and plain settings, but no layer's number.

    A number that is another in every layer is its number, or follows from it, as the initial lambda of a
    DiffLlama layer does.
    """
    values: dict[tuple[str, str], list[int | float]] = defaultdict(list)
    for layer in layers:
        for path, module in layer.named_modules():
            for setting, value in vars(module).items():
                if isinstance(value, int | float):
                    values[path, setting].append(value)
    numbers = {place for place, found in values.items() if len(found) > 4 and len(set(found)) == len(found)}
    return [_kind(layer, numbers) for layer in layers]


def _kind(layer: nn.Module, numbers: set[tuple[str, str]]) -> tuple[Any, ...]:
    found: list[Any] = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
    for path, module in layer.named_modules():
        settings = {
            name: str(value)
            for name, value in vars(module).items()
            if isinstance(value, int | float | str) and name != "layer_idx" and (path, name) not in numbers
        }
        found.append((type(module).__name__, tuple(sorted(settings.items()))))
    return tuple(found)


def _parameters(small: PretrainedConfig) -> int:
    return sum(p.numel() for p in build_on_meta(small).parameters())


def _build(small: PretrainedConfig, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.eval()
    return model
