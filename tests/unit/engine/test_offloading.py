"""Layers' inputs in host memory: the same bits, and nobody looks at what has left the card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_cli.config import Config
from lora_cli.engine import offloading
from lora_cli.engine.fused.fitting import Fusion
from lora_cli.engine.memory.need import Rehearsals
from lora_cli.engine.memory.rehearsal import MicroBatches, rehearse
from lora_cli.engine.memory.replay import replay
from lora_cli.engine.memory.trace import Trace
from lora_cli.engine.offloading import Offloading, most_on_host, offload
from lora_cli.engine.selftest import prove_run
from lora_cli.engine.target import Target
from lora_cli.engine.world import World
from lora_cli.model.architecture import read_architecture
from tests.unit.engine.learning import LENGTHS, PACKED
from tests.unit.engine.test_fused import Gradients, gradients, live

LAYERS, WIDTH = 4, 32
KINDS = [("llama", "layers"), ("llama", "linears"), ("qwen3", None), ("gpt2", None)]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies on a CPU, too; what has left is no number any more, on either side. Notes what happens."""
    notes: list[str] = []
    really = offloading._Away.left

    def left(away: offloading._Away) -> None:
        assert away._on_card is not None
        away._on_card.data.fill_(torch.nan)
        really(away)
        notes.append("left")

    def copy(away: offloading._Away, to: Tensor, of: Tensor) -> None:
        to.copy_(of)
        if to is away._on_card:
            of.fill_(torch.nan)
            notes.append("came back")

    def page_locked(count: int, dtype: torch.dtype) -> Tensor:
        notes.append("locked")
        return torch.full((count,), torch.nan, dtype=dtype)

    monkeypatch.setattr(offloading, "_leaves", lambda hidden: True)
    monkeypatch.setattr(offloading, "_page_locked", page_locked)
    monkeypatch.setattr(offloading._Away, "left", left)
    monkeypatch.setattr(offloading._Away, "_copy", copy)
    return notes


def checkpointed(model_type: str) -> nn.Module:
    model = live(model_type, **({"n_layer": LAYERS} if model_type == "gpt2" else {"num_hidden_layers": LAYERS}))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.disable_input_require_grads()  # type: ignore[operator]
    return model


def equal(found: Gradients, expected: Gradients) -> bool:
    return all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize(("model_type", "fusion"), KINDS)
def test_gradients_have_the_same_bits(model_type: str, fusion: Fusion | None, world: World, moved: list[str]) -> None:
    computation = replace(PACKED, fusion=fusion)
    plain = gradients(checkpointed(model_type), computation, LENGTHS, world, 64)
    model = checkpointed(model_type)
    assert offload(model) is not None
    assert equal(gradients(model, computation, LENGTHS, world, 64), plain)
    micro_batches = len(computation.micro_batches(LENGTHS, 64))
    assert micro_batches > 1
    copies = [note for note in moved if note != "locked"]
    # The last layer's input is needed before it has left, that of the first layer in the end.
    assert copies == (["left"] * (LAYERS - 1) + ["came back"] * (LAYERS - 1)) * micro_batches


@pytest.mark.parametrize(("model_type", "fusion"), KINDS[:3])
def test_a_pass_that_was_given_up_leaves_nothing(
    model_type: str, fusion: Fusion | None, world: World, moved: list[str]
) -> None:
    computation = replace(PACKED, fusion=fusion)
    plain = gradients(checkpointed(model_type), computation, LENGTHS, world, 4096)
    model = checkpointed(model_type)
    found = offload(model)
    assert found is not None

    def fails(grad: Tensor) -> None:
        raise RuntimeError("out of memory")

    hook = next(p for name, p in model.named_parameters() if "layers.2" in name and p.requires_grad).register_hook(
        fails
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(model, computation, LENGTHS, world, 4096)
    hook.remove()
    model.zero_grad()
    assert equal(gradients(model, computation, LENGTHS, world, 4096), plain)
    assert moved.count("locked") == LAYERS


def test_memory_of_a_full_micro_batch_is_locked_once(world: World, moved: list[str]) -> None:
    model = checkpointed("llama")
    found = offload(model, tokens=sum(LENGTHS) + 1)
    for tokens in (16, 64, 4096):  # ever larger micro-batches
        gradients(model, PACKED, LENGTHS, world, tokens)
    assert moved.count("locked") == LAYERS
    assert found is not None
    assert found.host_bytes == most_on_host(model) == 128 * WIDTH * 4 * LAYERS


def test_a_graph_that_is_kept_takes_no_place_of_the_next_pass(moved: list[str]) -> None:
    offloading = Offloading(lambda run, *args: run(*args))
    weight = torch.ones(3, requires_grad=True)

    def run() -> Tensor:
        hidden = torch.ones(4, 3)
        for _ in range(LAYERS):
            hidden = offloading(lambda x: x * weight, hidden)
        return hidden.sum()

    first = run()
    first.backward(retain_graph=True)
    run().backward()
    assert moved.count("locked") == LAYERS
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3,), 2.0 * 4 * LAYERS))


def test_on_a_cpu_inputs_lie_in_host_memory_as_they_are(world: World) -> None:
    model = checkpointed("llama")
    found = offload(model)
    plain = gradients(checkpointed("llama"), PACKED, LENGTHS, world, 64)
    assert equal(gradients(model, PACKED, LENGTHS, world, 64), plain)
    assert found is not None
    assert found.host_bytes == most_on_host(model) == 0


def test_a_model_without_checkpointing_has_nothing_to_offload() -> None:
    model = live("llama")
    assert offload(model) is None
    assert most_on_host(model) == 0


def test_a_layer_whose_input_has_a_name_is_checkpointed_as_before() -> None:
    seen = []
    Offloading(lambda run, *args: seen.append((run, args)))("run")
    assert seen == [("run", ())]


def rehearsed(folder: Path, layers: int, *, offloading: bool) -> Trace:
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 128}
    sizes = {"num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": layers, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**model, **sizes, "num_key_value_heads": 2}))
    train = {"gradient_checkpointing": True, "micro_batch_tokens": 8192, "activation_offloading": offloading}
    data = {"train": "rows.jsonl", "max_length": 8192}
    config = Config.model_validate(
        {"model": {"name_or_path": str(folder)}, "data": data, "train": train, "output_dir": "run"}
    )
    architecture, target = read_architecture(config.model), Target("cuda", (8, 0))
    computation = Rehearsals(architecture, prove_run(config, architecture)).computation(config, target)
    return rehearse(config, architecture, computation, target, MicroBatches((8192,), 1))


def test_on_a_card_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """What kept the inputs alive once: the hook that autograd keeps beside what it packed."""
    one_input = 8192 * 64 * 2

    def growth(offloading: bool) -> float:
        peaks = [
            replay(rehearsed(tmp_path, layers, offloading=offloading)).components["saved activations"]
            for layers in (4, 12)
        ]
        return (peaks[1] - peaks[0]) / (8 * one_input)

    assert growth(False) == pytest.approx(1, abs=0.1)
    assert growth(True) < 0.01
    assert rehearsed(tmp_path, 4, offloading=True).host_bytes == 4 * one_input
