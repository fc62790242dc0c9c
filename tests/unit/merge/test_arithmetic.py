"""Merged tensors against the oracle, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from lora_cli.config import ModelConfig, QuantizationConfig
from lora_cli.errors import UserError
from lora_cli.merge import merge, slices
from lora_cli.merge.base import open_base
from lora_cli.merge.placing import lay_over
from lora_cli.merge.streaming import Written, write_merged
from lora_cli.merge.work import plan_work
from lora_cli.model.architecture import read_architecture
from lora_cli.model.weights import load_base
from lora_cli.report.events import ignore
from tests.unit.merge.tiny import CONFIGS, oracle, save_adapter, save_base


def merged_to(folder: Path, base_folder: Path, adapter: Path, max_shard_bytes: int = 10**9) -> Written:
    folder.mkdir()
    model = ModelConfig(name_or_path=str(base_folder))
    config = read_architecture(model)
    base = open_base(model, base_folder, config, None)
    adapted = lay_over(base.model, adapter)
    work = plan_work(base, adapted, as_quantized=False, dtype=None)
    written = write_merged(work, base, adapted, folder, max_shard_bytes=max_shard_bytes, emit=ignore)
    if work.unties:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    assert not adapted.unused(written.used)
    assert written.used <= adapted.values.keys()
    return written


def check_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    ("gpt2", {"target_modules": ["wte", "c_fc"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.*q_proj": 32}}),
    ("llama", {"target_modules": "all-linear", "use_dora": True}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    ("llama-tied", {"target_modules": ["v_proj", "down_proj"]}),
    ("llama-tied", {"target_modules": ["embed_tokens"]}),
    ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    ("llama-tied", {"target_modules": ["embed_tokens"], "use_dora": True}),
    ("qwen2", {"target_modules": "all-linear", "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["ln_f", "lm_head"]}),
    ("qwen2", {"target_modules": ["k_proj"], "use_dora": True, "trainable_token_indices": [3, 5]}),
    ("gemma", {"target_modules": "all-linear", "use_rslora": True}),
    ("gemma", {"target_modules": ["embed_tokens", "v_proj"]}),
    ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("gemma2", {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [1]}),
    ("mixtral", {"target_modules": ["o_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    (
        "mixtral",
        {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
]


def oracle_for(base: Path, adapter: Path, settings: dict[str, Any], dtype: torch.dtype, exact: torch.dtype) -> Any:
    both = "trainable_token_indices" in settings and base.name in ("llama-tied", "qwen2")
    return oracle(base, adapter, dtype, tied=both, exact=exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_variant_is_base_plus_delta_rounded_once(
    tmp_path: Path, name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / name, name, dtype)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merged_to(tmp_path / "merged", base, adapter)
    check_equal(tmp_path / "merged", oracle_for(base, adapter, settings, dtype, torch.float32))


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_variant_is_near_an_oracle_in_float64(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / name, name, torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merged_to(tmp_path / "merged", base, adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for parameter, exact in oracle_for(base, adapter, settings, torch.float64, torch.float64).items():
        assert float((found[parameter].double() - exact).abs().max()) <= 1e-6 * float(exact.abs().max()), parameter


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 191, 192, 5000])
@pytest.mark.parametrize("columns", [1, 76, 10**6])
def test_slices_hold_every_row_once(rows: int, columns: int) -> None:
    assert [row for some in slices.row_slices(rows, columns) for row in range(rows)[some]] == list(range(rows))


@pytest.mark.parametrize(("name", "target"), [("gpt2", "c_fc"), ("llama", "down_proj")])
@pytest.mark.parametrize("numbers", [1, 10_000])
def test_slices_are_what_the_whole_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: str, numbers: int
) -> None:
    """Sizes that no vector unit divides, a rank above its width, several slices and one longer than the rest."""
    odd = {"gpt2": {"n_embd": 76, "n_inner": 251}, "llama": {"hidden_size": 76, "intermediate_size": 251}}
    for key, value in odd[name].items():
        monkeypatch.setattr(CONFIGS[name], key, value)
    monkeypatch.setattr(slices, "_SLICE", numbers)
    base = save_base(tmp_path / "base", name, torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=[target], r=19, use_rslora=True)
    merged_to(tmp_path / "merged", base, adapter)
    check_equal(tmp_path / "merged", oracle(base, adapter, torch.bfloat16))


def test_adapter_in_16_bits_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    merged_to(tmp_path / "merged", base, adapter)
    found, before = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    saved = load_file(file)
    module = "model.layers.0.self_attn.q_proj"
    a, b = (saved[f"base_model.model.{module}.lora_{one}.weight"].float() for one in "AB")
    assert torch.equal(found[f"{module}.weight"], before[f"{module}.weight"] + b @ a * 2.0)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "llama-tied"])
def test_the_layout_on_disk_stays(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base", name, torch.bfloat16, max_shard_size="30KB")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    written = merged_to(tmp_path / "merged", base, adapter, max_shard_bytes=20_000)
    before, after = (
        {n: (t.dtype, t.shape) for file in (tmp_path / one).glob("*.safetensors") for n, t in load_file(file).items()}
        for one in ("base", "merged")
    )
    assert before == after
    assert written.shards == len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()


def test_tensors_that_are_no_part_of_the_model_are_kept(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", torch.bfloat16)
    file = base / "model.safetensors"
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool).tril() for i in range(2)}
    save_file({**load_file(file), **masks}, file, {"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["c_attn"])
    merged_to(tmp_path / "merged", base, adapter)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize(
    "quantization",
    [{"type": "nf4", "double_quant": True}, {"type": "nf4", "double_quant": False}, {"type": "fp4"}, {"type": "int8"}],
    ids=str,
)
def test_quantized_weights_are_those_that_transformers_makes(
    tmp_path: Path, name: str, quantization: dict[str, Any]
) -> None:
    """A dequantized weight is what the layer makes of the unit matrix."""
    folder = save_base(tmp_path / "base", name, torch.bfloat16)
    model = ModelConfig(name_or_path=str(folder), quantization=QuantizationConfig(**quantization))
    config = read_architecture(model)
    live = load_base(model, config, device=torch.device("cpu"), dtype=torch.float32, attention="eager")
    base = open_base(model, folder, config, torch.float32)
    assert base.quantized is not None
    packed = {f"{n}.weight" for n, m in live.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert set(base.quantized.transposed) == packed
    of = base.layout.group_of()
    for parameter in sorted(packed):
        layer: Any = live.get_submodule(parameter.removesuffix(".weight"))
        found = base.read(of[parameter], as_quantized=True)[parameter]
        expected = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        assert torch.equal(found.T if base.quantized.transposed[parameter] else found, expected.float()), parameter


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mixtral"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_base_that_lies_quantized_on_disk_is_unpacked(tmp_path: Path, name: str, quantization: str) -> None:
    """As transformers unpacks it, plus the delta, rounded once; the folder is a plain model again."""
    settings: Any = {"load_in_8bit": True}
    if quantization != "int8":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": quantization, "bnb_4bit_use_double_quant": True}
    plain = save_base(tmp_path / "plain", name, torch.bfloat16)
    live = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings)
    )
    live.save_pretrained(tmp_path / "packed")
    adapter = save_adapter(tmp_path / "adapter", plain, target_modules="all-linear")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "packed")}))
    report = merge([str(adapter)], tmp_path / "merged")
    assert report.verified, report.problem
    assert report.base.base == "quantized"

    unpacked = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for path, layer in live.named_modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
            held: Any = unpacked.get_submodule(path)
            held.weight.data = (weight.T if type(held).__name__ == "Conv1D" else weight).float()
    expected = PeftModel.from_pretrained(unpacked, str(adapter)).merge_and_unload().state_dict()
    check_equal(tmp_path / "merged", {key: value.bfloat16() for key, value in expected.items()})
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(UserError, match="itself lies on disk"):
        merge([str(adapter)], tmp_path / "again", base="original")
