"""Folders that hold no usable model, each refused by name; none of them opened as a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lora_cli.config import ModelConfig, QuantizationConfig
from lora_cli.errors import ModelError
from lora_cli.model.architecture import build_on_meta, read_architecture
from lora_cli.model.weights import check_weight_files, load_base, quantization_reach, refuse_partial
from tests.unit.engine.tiny import tiny_config


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    model = ModelConfig(name_or_path=str(folder), **settings)
    config = read_architecture(model)
    build_on_meta(config)
    return load_base(model, config, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")


def test_a_whole_folder_loads_frozen(llama_folder: Path, llama: PreTrainedModel) -> None:
    model = load(llama_folder)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)


def test_a_missing_shard_is_named(tmp_path: Path, llama: PreTrainedModel) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    check_weight_files(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"shard {shard.name} is missing"):
        load(tmp_path)


def test_a_broken_index_is_named(tmp_path: Path, llama: PreTrainedModel) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ModelError, match=r"index\.json is not an index"):
        load(tmp_path)


def test_a_cut_off_file_is_an_error_of_the_model(llama_folder: Path) -> None:
    """A download that broke off."""
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="llama"):
        load(llama_folder)


def test_pickled_weights_are_refused_and_not_opened(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    (llama_folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\)") as caught:
        load(llama_folder)
    assert "safetensors" in str(caught.value.remedy)


def test_a_folder_without_weights_says_so(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(llama_folder)


Change = Callable[[dict[str, Any]], Any]
LIES: dict[str, tuple[Change, str]] = {
    "more layers than weights": (lambda c: c.update(num_hidden_layers=3, layer_types=None), "in no weight file"),
    "another width": (lambda c: c.update(hidden_size=64), "llama"),
    "an unknown architecture": (lambda c: c.update(model_type="lllama"), "doesn't know this architecture"),
    "no architecture": (lambda c: (c.pop("model_type"), c.pop("architectures")), "llama"),
    "an encoder": (lambda c: c.update(model_type="t5"), "encoder-decoder"),
    "numbers that don't fit": (lambda c: c.update(num_attention_heads=0), "llama"),
    "a word for a number": (lambda c: c.update(hidden_size="wide"), "expected int, got str"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_config_that_lies_is_an_error_of_the_model(lie: str, llama_folder: Path) -> None:
    """Not a traceback, and not a model with random weights in it."""
    path = llama_folder / "config.json"
    content = json.loads(path.read_text())
    change, says = LIES[lie]
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=says):
        load(llama_folder)


def test_folders_that_are_no_models(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        load(tmp_path / "none")
    with pytest.raises(ModelError, match="is a file"):
        load(llama_folder / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        load(tmp_path)
    assert "adapter.path" in str(caught.value.remedy)
    for text, says in (("{", "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=says):
            load(tmp_path)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such folder") as caught:
        read_architecture(ModelConfig(name_or_path="nobody/has-this-model"))
    assert "Without network" in str(caught.value.remedy)


def test_a_base_quantized_another_way_is_refused_by_name(llama_folder: Path) -> None:
    path = llama_folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="gptq"):
        load(llama_folder)


def test_quantization_that_reaches_little_is_refused_unless_allowed() -> None:
    """Fused experts are no linear layers: bitsandbytes leaves them in full precision without a word."""
    reach = quantization_reach(build_on_meta(tiny_config("gpt_oss")))
    with pytest.raises(ModelError, match="unquantized") as caught:
        refuse_partial(reach, QuantizationConfig(type="nf4"))
    assert "allow_partial" in str(caught.value.remedy)
    refuse_partial(reach, QuantizationConfig(type="nf4", allow_partial=True))
    refuse_partial(quantization_reach(build_on_meta(tiny_config("llama"))), QuantizationConfig(type="nf4"))
