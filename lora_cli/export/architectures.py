"""What GGUF says of an architecture, and how its tensors lie there: their names, their order, what is turned or added.

By llama.cpp's conventions (the keys in the `gguf` package, and docs/development/HOWTO-add-model.md there): matrices as
[out, in]; for what it calls `llama`, the rows of queries and keys so that rotated pairs are neighbours; Gemma's norms
with the 1 that its layers add; an expert's matrices stacked. Knows nothing about files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "GPT2LMHeadModel": "gpt2",
}
"""transformers' classes and GGUF's architectures."""

_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_ROUTER = ".mlp.gate.weight"


@dataclass(frozen=True)
class Piece:
    """A tensor of the file, and how it comes from a parameter of the model."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]
    float32: bool
    """Always in float32: vectors, and routers."""


@dataclass(frozen=True)
class Architecture:
    """One architecture, with one model's settings."""

    name: str
    config: PretrainedConfig

    def pieces(self, parameter: str, shape: tuple[int, ...]) -> list[Piece]:
        """What a parameter of the model becomes.

        Raises:
            ModelError: GGUF has no place for it.
        """
        if ".mlp.experts." in parameter:
            return self._experts(parameter, shape)
        turned = self.name == "gpt2" and parameter.endswith(_CONV1D)
        laid_out = shape[::-1] if turned else shape
        float32 = len(shape) < 2 or parameter.endswith(_ROUTER)
        return [Piece(self.tensor_name(parameter), laid_out, lambda value: self._laid_out(parameter, value), float32)]

    def tensor_name(self, parameter: str) -> str:
        """`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        if parameter.endswith(_ROUTER):
            return f"blk.{parameter.split('.')[2]}.ffn_gate_inp.weight"
        kinds = {kind.name.lower(): kind for kind in MODEL_ARCH}
        names = get_tensor_name_map(kinds[self.name], self.num_layers)
        found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"{parameter} has no place in a GGUF file of architecture {self.name}")
        return found

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def _head_dim(self) -> int:
        named = getattr(self.config, "head_dim", None)
        return int(named or self.config.hidden_size // self.config.num_attention_heads)

    def rows(self, parameter: str, value: Tensor) -> Tensor:
        """The rows of a linear layer's output in GGUF's order; of LoRA's B as of the weight."""
        if self.name != "llama":
            return value
        if ".q_proj." in parameter:
            return _neighbours(value, int(self.config.num_attention_heads))
        if ".k_proj." in parameter:
            return _neighbours(value, int(self.config.num_key_value_heads))
        return value

    def _laid_out(self, parameter: str, value: Tensor) -> Tensor:
        if self.name == "gpt2" and parameter.endswith(_CONV1D):
            return value.T
        if self.name in ("gemma", "gemma2") and parameter.endswith("norm.weight"):
            return value.float() + 1.0
        return self.rows(parameter, value)

    def _experts(self, parameter: str, shape: tuple[int, ...]) -> list[Piece]:
        layer = parameter.split(".")[2]
        if parameter.endswith("down_proj"):
            return [Piece(f"blk.{layer}.ffn_down_exps.weight", shape, lambda value: value, False)]
        half = shape[1] // 2
        half_shape = (shape[0], half, shape[2])
        return [
            Piece(f"blk.{layer}.ffn_gate_exps.weight", half_shape, lambda value: value[:, :half], False),
            Piece(f"blk.{layer}.ffn_up_exps.weight", half_shape, lambda value: value[:, half:], False),
        ]

    def rope_factors(self) -> Tensor | None:
        """Llama 3's divisors of the rotary frequencies, [head_dim / 2], which GGUF keeps as a tensor."""
        rope = _rope(self.config)
        if rope.get("rope_type") != "llama3":
            return None
        frequencies = rope["rope_theta"] ** -(torch.arange(0, self._head_dim, 2, dtype=torch.float64) / self._head_dim)
        length = 2 * math.pi / frequencies
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        context, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
        smooth = (context / length - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found = torch.where(length > context / low, torch.tensor(factor, dtype=torch.float64), between)
        return torch.where(length < context / high, torch.ones((), dtype=torch.float64), found).float()

    def describe(self, writer: Any) -> None:
        """The settings, as keys of the file.

        Raises:
            ModelError: positions that are scaled in a way that is not known here.
        """
        config = self.config
        writer.add_block_count(self.num_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        if self.name == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
            return
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        if self.name == "llama":
            writer.add_rope_dimension_count(self._head_dim)
        self._describe_positions(writer)
        if getattr(config, "num_local_experts", None):
            writer.add_expert_count(config.num_local_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
        if self.name == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
            writer.add_sliding_window(config.sliding_window)

    def _describe_positions(self, writer: Any) -> None:
        from gguf import RopeScalingType

        rope = _rope(self.config)
        kind = rope.get("rope_type", "default")
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
        if kind == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        elif kind == "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        elif kind not in ("default", "llama3"):
            raise ModelError(f"positions scaled by {kind!r} are not known here", remedy=CONVERTER)


CONVERTER = (
    "llama.cpp's own converter knows more: put its convert_hf_to_gguf.py on the PATH, or its folder into LLAMA_CPP_DIR."
)


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The architecture of a model.

    Raises:
        ModelError: one that is not known here, or a setting of it that GGUF can't hold.
    """
    names = config.architectures or ["unknown"]
    if names[0] not in ARCHITECTURES:
        known = ", ".join(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for name in ARCHITECTURES)
        raise ModelError(f"{names[0]} can't be written as GGUF here, only {known}", remedy=CONVERTER)
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    if ARCHITECTURES[names[0]] != "gemma2" and window is not None and uses and window < config.max_position_embeddings:
        raise ModelError(
            f"{names[0]} with a sliding window of {window:,} tokens: llama.cpp would attend to all of them",
            remedy="Shorter texts aren't affected: set max_position_embeddings in its config.json to the window.",
        )
    if getattr(config, "attention_bias", False) and ARCHITECTURES[names[0]] == "llama":
        raise ModelError(f"{names[0]} with biases in its attention can't be written as GGUF here", remedy=CONVERTER)
    return Architecture(ARCHITECTURES[names[0]], config)


def _neighbours(value: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered from (first halves, second halves) to pairs."""
    rest = value.shape[1:]
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *rest).transpose(1, 2).reshape(value.shape)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})
