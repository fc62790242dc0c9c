"""What a layer is made of is known again as long as nothing of it has changed, and read anew when anything has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.engine.fused import parts
from lora_cli.engine.fused.layer import DecoderLayer
from tests.unit.engine.test_fused import live


def _second_adapter(layer: Any) -> None:
    lora = layer.mlp.up_proj
    for held in (lora.lora_A, lora.lora_B):
        held["other"] = copy.deepcopy(held["default"])


def _replace_lora_a(layer: Any) -> None:
    layer.self_attn.q_proj.lora_A["default"] = nn.Linear(32, 4, bias=False)


CHANGES: dict[str, Callable[[Any], object]] = {
    "adapter off": lambda layer: layer.self_attn.q_proj.enable_adapters(False),
    "adapter merged": lambda layer: layer.mlp.down_proj.merge(),
    "a second adapter": _second_adapter,
    "no adapter active": lambda layer: setattr(layer.self_attn.k_proj, "_active_adapter", []),
    "another A": _replace_lora_a,
    "another weight of A": lambda layer: setattr(
        layer.mlp.up_proj.lora_A["default"], "weight", nn.Parameter(torch.randn(4, 32))
    ),
    "another weight of B": lambda layer: setattr(
        layer.self_attn.o_proj.lora_B["default"], "weight", nn.Parameter(torch.randn(32, 4))
    ),
    "a bias of B": lambda layer: setattr(layer.mlp.up_proj.lora_B["default"], "bias", nn.Parameter(torch.randn(48))),
    "another scale": lambda layer: layer.mlp.gate_proj.set_scale("default", 3.0),
    "dropout": lambda layer: layer.self_attn.v_proj.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "DoRA": lambda layer: layer.self_attn.v_proj.lora_variant.update({"default": object()}),
    "another base": lambda layer: setattr(
        layer.mlp.up_proj, "base_layer", nn.Linear(32, 48, bias=False).requires_grad_(False)
    ),
    "another weight": lambda layer: setattr(
        layer.mlp.up_proj.base_layer, "weight", nn.Parameter(torch.randn(48, 32), requires_grad=False)
    ),
    "a trained weight": lambda layer: layer.self_attn.o_proj.base_layer.requires_grad_(True),
    "a packed weight": lambda layer: setattr(layer.mlp.up_proj.base_layer.weight, "quant_state", object()),
    "no adapter": lambda layer: setattr(layer.mlp, "up_proj", layer.mlp.up_proj.base_layer),
    "a trained norm": lambda layer: layer.input_layernorm.requires_grad_(True),
    "another norm": lambda layer: setattr(layer, "input_layernorm", copy.deepcopy(layer.input_layernorm)),
    "another weight of a norm": lambda layer: setattr(
        layer.input_layernorm, "weight", nn.Parameter(torch.ones(32), requires_grad=False)
    ),
    "another epsilon": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 1e-2),
    "another activation": lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()),
    "another scale of scores": lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    "attention dropout": lambda layer: setattr(layer.self_attn, "attention_dropout", 0.1),
    "a norm of queries": lambda layer: setattr(layer.self_attn, "q_norm", nn.Identity()),
    "one more child": lambda layer: setattr(layer, "more", nn.Identity()),
    "another attention": lambda layer: setattr(layer, "self_attn", copy.deepcopy(layer.self_attn)),
}


def values(found: Any) -> object:
    """What a layer is made of, as something to compare: tensors by identity."""
    if isinstance(found, torch.Tensor):
        return id(found)
    if isinstance(found, DecoderLayer | parts.Norm | parts.Adapted | parts.GatedBlock):
        return tuple(values(getattr(found, field.name)) for field in fields(found))
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen(change: str) -> None:
    layer = live("llama").model.layers[0]  # type: ignore[union-attr,index]
    before = parts.layer_of(layer)
    assert parts.layer_of(layer) is before
    CHANGES[change](layer)
    after = parts.layer_of(layer)
    assert values(after) != values(before)
    assert values(after) == values(parts._layer(layer))


def test_what_was_known_of_a_layer_goes_with_it() -> None:
    model = live("llama")
    parts.layer_of(model.model.layers[0])  # type: ignore[union-attr,index,arg-type]
    known = len(parts._read)
    del model
    assert len(parts._read) < known
