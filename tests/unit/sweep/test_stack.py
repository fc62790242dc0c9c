"""Seating members on the base: exactly their modules, and what is known of them is known at the next seat."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_cli.engine.fused import parts
from lora_cli.engine.fused.parts import layer_of
from lora_cli.sweep.stack import Adapter, Stack
from tests.unit.engine.tiny import tiny_model


@pytest.fixture
def stack() -> Stack:
    base = tiny_model("llama")
    adapters = []
    for targets in ("all-linear", "all-linear", ["q_proj"]):
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
        adapters.append(Adapter.taken_from(base, model))
    return Stack(base, adapters)


def layers(stack: Stack) -> list[nn.Module]:
    return list(stack.base.model.layers)


def test_a_member_finds_its_own_modules_and_the_base_its_own_again(stack: Stack) -> None:
    bare = dict(stack.base.named_modules())
    assert not any("lora" in name for name in bare)
    for number in (0, 2, 1, 0):
        with stack.seated(number):
            held = dict(stack.base.named_modules())
            assert all(held[name] is layer for name, layer in stack.adapters[number].layers.items())
            assert "lora_A" in str(held.keys())
            assert ("model.layers.0.mlp.up_proj.lora_A" in held) == (number != 2)
        now = dict(stack.base.named_modules())
        assert now.keys() == bare.keys()
        assert all(now[name] is module for name, module in bare.items())


def test_layers_are_read_once_for_each_member(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[nn.Module] = []
    really = parts._layer

    def count(module: nn.Module) -> object:
        read.append(module)
        return really(module)

    monkeypatch.setattr(parts, "_layer", count)
    for _ in range(3):
        for number, adapter in enumerate(stack.adapters):
            with stack.seated(number):
                for place, layer in enumerate(layers(stack)):
                    found = layer_of(layer)
                    assert found is not None
                    own = adapter.layers[f"model.layers.{place}.self_attn.q_proj"]
                    assert found.query.a is own.lora_A["default"].weight
    assert len(read) == len(stack.adapters) * len(layers(stack))


def test_what_has_changed_since_the_last_seat_is_seen(stack: Stack) -> None:
    with stack.seated(0):
        assert layer_of(layers(stack)[0]) is not None
    lora = stack.adapters[0].layers["model.layers.0.self_attn.q_proj"]
    lora.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 32))
    with stack.seated(0):
        found = layer_of(layers(stack)[0])
        assert found is not None
        assert found.query.a is lora.lora_A["default"].weight
    lora.enable_adapters(False)
    with stack.seated(0):
        assert layer_of(layers(stack)[0]) is None
