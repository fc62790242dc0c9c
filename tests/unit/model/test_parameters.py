"""Parameter counts: the figures that are published, and the live model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lora_cli.config import AdapterConfig, ModelConfig, QuantizationConfig
from lora_cli.model.adapter import attach_adapter
from lora_cli.model.architecture import build_on_meta, read_architecture
from lora_cli.model.parameters import count_parameters, kind_names
from lora_cli.model.weights import load_base
from lora_cli.plan import ParameterReport
from tests.unit.engine.tiny import tiny_config, tiny_model

MODELS = Path(__file__).parents[2] / "models"


def on_meta(name_or_path: Path, adapter: AdapterConfig) -> ParameterReport:
    """From config.json alone."""
    base = build_on_meta(read_architecture(ModelConfig(name_or_path=str(name_or_path))))
    with torch.device("meta"):
        return count_parameters(attach_adapter(base.requires_grad_(False), adapter, seed=0))


def test_gpt2() -> None:
    report = on_meta(MODELS / "gpt2", AdapterConfig(r=8, target_modules=("c_attn",)))
    assert (report.trainable, report.total) == (294_912, 124_734_720)
    assert f"{report.trainable_percent:.4f}" == "0.2364"


def test_llama_8b() -> None:
    """A popular tutorial prints 8,043,847,680; the head and the embeddings of the live model decide."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    report = on_meta(MODELS / "llama-3.1-8b", AdapterConfig(r=16, target_modules=targets))
    assert (report.trainable, report.total) == (13_631_488, 8_043_892_736)
    assert f"{report.trainable_percent:.4f}" == "0.1695"
    kinds = {kind.name: kind for kind in report.by_module}
    assert (kinds["k_proj"].modules, kinds["k_proj"].shape) == (32, "1024 x 4096")
    assert kinds["k_proj"].trainable_parameters == 32 * 16 * (1024 + 4096)
    assert kinds["gate_proj"].trainable_parameters == 0


ADAPTERS = {
    "plain": AdapterConfig(r=4),
    "dora": AdapterConfig(r=4, use_dora=True),
    "biases": AdapterConfig(r=4, target_modules=("c_attn",), bias="all"),
    "head saved": AdapterConfig(r=4, target_modules=("q_proj",), modules_to_save=("lm_head",)),
    "embeddings": AdapterConfig(r=4, target_modules=("q_proj", "embed_tokens")),
}


@pytest.mark.parametrize(("name", "model_type"), [(n, "gpt2" if n == "biases" else "llama") for n in ADAPTERS])
def test_the_report_adds_up_to_what_pytorch_counts(name: str, model_type: str) -> None:
    model = attach_adapter(tiny_model(model_type), ADAPTERS[name], seed=0)
    report = count_parameters(model)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(kind.base_parameters for kind in report.by_module)
    assert base == sum(p.numel() for p in tiny_model(model_type).parameters())
    assert report.trainable == sum(kind.trainable_parameters for kind in report.by_module)


def test_tied_weights_count_once() -> None:
    tied, apart = (count_parameters(tiny_model("llama", tie_word_embeddings=tie)).total for tie in (True, False))
    assert apart - tied == 97 * 32


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantized_model_counts_what_its_config_says(kind: str, llama_folder: Path) -> None:
    """Packed weights hold two values to a byte; the plan, made on meta, knows nothing of that."""
    settings = ModelConfig(name_or_path=str(llama_folder), quantization=QuantizationConfig(type=kind))
    config = read_architecture(settings)
    base = load_base(settings, config, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")
    live = count_parameters(attach_adapter(base, AdapterConfig(r=4), seed=0))
    assert live == on_meta(llama_folder, AdapterConfig(r=4))


def test_a_kind_is_named_with_its_parent_where_one_name_stands_for_two(llama: PreTrainedModel) -> None:
    kinds = set(kind_names(tiny_model("gpt2")).values())
    assert {"attn.c_proj", "mlp.c_proj", "c_attn"} <= kinds
    assert "q_proj" in set(kind_names(llama).values())


def test_meta_counts_equal_live_ones_for_every_shape() -> None:
    for model_type in ("gpt2", "qwen3", "gemma2", "gpt_oss"):
        live = count_parameters(attach_adapter(tiny_model(model_type), AdapterConfig(r=4), seed=0))
        with torch.device("meta"):
            planned = attach_adapter(
                build_on_meta(tiny_config(model_type)).requires_grad_(False), AdapterConfig(r=4), seed=0
            )
        assert count_parameters(planned) == live
