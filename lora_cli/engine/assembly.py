"""The live model: base weights, adapter, attention, checkpointing, as a prepared run says."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lora_cli.config import Config
from lora_cli.engine.computation import Computation
from lora_cli.engine.offloading import offload
from lora_cli.engine.selftest import Proof
from lora_cli.engine.target import target_of
from lora_cli.model.adapter import attach_adapter
from lora_cli.model.dtypes import resolve_dtype
from lora_cli.model.weights import load_base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def make_computation(config: Config, proof: Proof, device: torch.device) -> Computation:
    """How the forward pass will run, from what was proven."""
    dtype = resolve_dtype(config.model.dtype, device)
    return Computation(
        packing=proof.packing,
        loss=proof.loss,
        dtype=dtype,
        attention=proof.attention,
        fusion=proof.fusion_on(target_of(device), dtype, config.model.quantization),
        flash4=proof.flash4,
    )


def load_model(
    config: Config, architecture: PretrainedConfig, computation: Computation, device: torch.device
) -> PreTrainedModel:
    """The base with its weights on `device`, frozen; in full fine-tuning float32 and ready to train."""
    full = config.adapter is None
    dtype = torch.float32 if full else computation.dtype
    base = load_base(config.model, architecture, device=device, dtype=dtype, attention=computation.attention)
    leave_out_side_outputs(base)
    return base


def leave_out_side_outputs(base: PreTrainedModel) -> None:
    """No auxiliary loss of routers: it is no mean over tokens, and would depend on packing."""
    text = base.config.get_text_config()
    if "output_router_logits" in vars(text):
        text.output_router_logits = False


def make_trainable(
    base: PreTrainedModel, config: Config, computation: Computation, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """The base with its adapter attached and in training mode; itself, all parameters trainable, without one."""
    if config.model.resize_embeddings and len(tokenizer) > base.config.get_text_config().vocab_size:
        base.resize_token_embeddings(len(tokenizer))
    return attach(base, config, computation)


def attach(base: PreTrainedModel, config: Config, computation: Computation) -> PreTrainedModel | PeftModel:
    """`make_trainable` for a base whose embeddings have their size; needs no tokenizer."""
    if config.adapter is None:
        _checkpoint(base, config)
        computation.prepare(base)
        base.requires_grad_(True)
        base.train()
        return base
    model = attach_adapter(base, config.adapter, seed=config.train.seed)
    _checkpoint(causal_lm(model), config)
    computation.prepare(causal_lm(model))
    model.train()
    if computation.dtype != torch.float32:
        leave_casting_to_autocast(model)
    return model


def _checkpoint(model: PreTrainedModel, config: Config) -> None:
    """Checkpoint the layers, if the config says so; an adapter is attached by now.

    transformers and PEFT make the embedding's output need a gradient, which only reentrant checkpointing asks for: it
    keeps that output, takes its gradient's memory, and has the first layer compute one for nobody.
    """
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
        if config.train.activation_offloading is True:
            tokens = config.train.micro_batch_tokens
            offload(model, tokens if isinstance(tokens, int) else 0)


def leave_casting_to_autocast(model: nn.Module) -> None:
    """Stop PEFT from casting a layer's input to float32, only for autocast to cast it back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010 - PEFT reads it, and declares it nowhere


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model itself, with whatever PEFT has injected into it."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
