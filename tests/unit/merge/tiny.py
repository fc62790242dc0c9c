"""Tiny random models and adapters on disk, and the oracle: base + delta in float32, rounded once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "gemma": GemmaConfig(**_SMALL, head_dim=8),
    "gemma2": Gemma2Config(**_SMALL, head_dim=8, sliding_window=16),
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def save_base(folder: Path, name: str, dtype: torch.dtype, *, seed: int = 0, **save: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.1).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int = 1, scale: float = 0.1, **settings: Any) -> Path:
    """An adapter with random tensors everywhere, B and DoRA's magnitudes included, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = _quietly(get_peft_model, model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    _quietly(model.save_pretrained, folder)
    return folder


def oracle(
    base: Path, adapter: Path, dtype: torch.dtype, *, tied: bool = False, exact: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What the merged model must hold: PEFT's plain merge in float32, or more.

    PEFT adds to tied weights in place, and so to both; what was trained changed one. Hence weights come untied,
    except for adapters that change both by themselves.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=exact)
    if not tied:
        values = model.state_dict()
        model.config.tie_word_embeddings = False
        model = AutoModelForCausalLM.from_config(model.config, dtype=exact)
        model.load_state_dict(values)
    merged = _quietly(PeftModel.from_pretrained, model, str(adapter), autocast_adapter_dtype=False).merge_and_unload()
    return {name: tensor.to(dtype) for name, tensor in merged.state_dict().items()}


def _quietly(call: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)
