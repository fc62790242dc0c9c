"""Merged tensors against the oracle, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_cli.config import ModelConfig
from lora_cli.merge.adapter import lay_over
from lora_cli.merge.base import open_base
from lora_cli.merge.streaming import Written, write_merged
from lora_cli.merge.work import plan_work
from lora_cli.model.architecture import read_architecture
from lora_cli.report.events import ignore

from tests.unit.merge.tiny import oracle, save_adapter, save_base


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
    ("gemma", {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [1]}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    (
        "mixtral",
        {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_variant_is_base_plus_delta_rounded_once(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    base = save_base(tmp_path / "base", name, torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merged_to(tmp_path / "merged", base, adapter)
    tied = "trainable_token_indices" in settings and name.endswith("tied")
    check_equal(tmp_path / "merged", oracle(base, adapter, torch.bfloat16, tied=tied))
