"""An evaluation between two steps changes no bit of the second one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_cli.config import AdapterConfig, ModelConfig, QuantizationConfig
from lora_cli.data.examples import Examples
from lora_cli.engine.assembly import causal_lm, leave_casting_to_autocast
from lora_cli.engine.computation import Computation
from lora_cli.engine.scoring import example_losses
from lora_cli.engine.step import accumulate
from lora_cli.engine.world import World
from lora_cli.model.adapter import attach_adapter
from lora_cli.model.architecture import read_architecture
from lora_cli.model.weights import load_base
from tests.unit.engine.learning import LENGTHS, batches, examples, make_learner, with_adapter
from tests.unit.engine.tiny import VOCABULARY, tiny_model

WAYS = {
    "float32": (None, torch.float32),
    "bfloat16": (None, torch.bfloat16),
    "nf4 in float32": (QuantizationConfig(type="nf4"), torch.float32),
    "nf4 in bfloat16": (QuantizationConfig(type="nf4", double_quant=True), torch.bfloat16),
    "fp4 in bfloat16": (QuantizationConfig(type="fp4"), torch.bfloat16),
    "int8 in bfloat16": (QuantizationConfig(type="int8"), torch.bfloat16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that bitsandbytes takes its packed kernels."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, quantization: QuantizationConfig | None, dtype: torch.dtype) -> PreTrainedModel:
    settings = ModelConfig(name_or_path=str(folder), quantization=quantization)
    config = read_architecture(settings)
    model = load_base(settings, config, device=torch.device("cpu"), dtype=dtype, attention="sdpa")
    attached = attach_adapter(model, AdapterConfig(r=4, init_lora_weights=False), seed=1)
    attached.train()
    if dtype != torch.float32:
        leave_casting_to_autocast(attached)
    return causal_lm(attached)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_before_and_after_an_evaluation_are_bit_equal(way: str, base: Path, world: World) -> None:
    """On a CPU with AVX512_BF16, bitsandbytes would repack its weights in eval mode, and read them wrongly after."""
    quantization, dtype = WAYS[way]
    model = load(base, quantization, dtype)
    rows = examples(LENGTHS)
    computation = Computation("documents", "chunked", dtype, "sdpa")
    before = gradients(model, computation, rows, world)
    losses = example_losses(model, computation, rows, micro_batch_tokens=64, world=world)
    after = gradients(model, computation, rows, world)
    assert ((losses > 0) == (rows.supervised > 0)).all()
    assert before and all(gradient.any() for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def gradients(
    model: PreTrainedModel, computation: Computation, rows: Examples, world: World
) -> dict[str, torch.Tensor]:
    learner = make_learner(model, computation)
    for batch in batches(rows, computation, 64, world):
        accumulate(learner, batch, int(rows.supervised.sum()))
    found = {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None}
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def test_trainable_parameters_are_float32_over_any_base(base: Path) -> None:
    for quantization, dtype in WAYS.values():
        trained = [p for p in load(base, quantization, dtype).parameters() if p.requires_grad]
        assert trained and {p.dtype for p in trained} == {torch.float32}


def test_four_bits_go_through_bitsandbytes_kernels(base: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load(base, QuantizationConfig(type="nf4"), torch.float32)
    packed = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(packed) == 14
    assert {m.weight.dtype for m in packed} == {torch.uint8}


def test_losses_per_example_do_not_depend_on_packing_and_leave_the_mode(world: World) -> None:
    rows = examples(LENGTHS)
    model = with_adapter(tiny_model("llama"))
    computation = Computation("documents", "chunked", torch.float32, "sdpa")
    computation.prepare(model)
    one, other = (example_losses(model, computation, rows, micro_batch_tokens=n, world=world) for n in (1, 4096))
    assert one == pytest.approx(other, rel=1e-6)
    assert model.training
