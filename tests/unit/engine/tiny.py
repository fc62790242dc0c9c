"""Tiny random models of the architectures that matter most, with weights large enough for a mistake to show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.15,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": 7, "head_dim": 8},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "gemma": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | _TWO_KINDS | {"head_dim": 16, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": _COMMON | _TWO_KINDS | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "cohere": _COMMON | {"logit_scale": 0.0625},
    "granite": _COMMON | {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt_oss": _COMMON | _TWO_KINDS | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """The config of a tiny model."""
    return AutoConfig.for_model(model_type, **(SETTINGS[model_type] | settings))


def tiny_model(model_type: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny float32 model, frozen, the same at each call."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:  # sinks and biases: zero would hide them
                parameter.normal_(std=0.3)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()
