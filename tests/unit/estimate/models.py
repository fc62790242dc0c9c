"""Tiny models of many architectures, from their configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from lora_cli.config import Config

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
SPECIALS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_positions": 256, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "num_experts": 4},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    "starcoder2": {},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": {**_LATENT, **_EXPERTS},
    "deepseek_v3": {**_LATENT, **_EXPERTS},
}


def tiny_architecture(name: str) -> PretrainedConfig:
    return CONFIG_MAPPING[name](**{**_COMMON, **SPECIALS[name]})


def make_config(folder: Path | str, *, tokens: int | str = 64, max_length: int = 32, **sections: Any) -> Config:
    train = {"micro_batch_tokens": tokens, "gradient_checkpointing": True, **sections.pop("train", {})}
    model = {"name_or_path": str(folder), **sections.pop("model", {})}
    data = {"train": "rows.jsonl", "max_length": max_length}
    return Config.model_validate({"model": model, "data": data, "train": train, "output_dir": "run", **sections})
