"""Adapters of random weights, made by plain PEFT."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_adapter(folder, base_folder, *, scale, seed=0, **settings):
    """A PEFT adapter whose B is random, times `scale`."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    options = {"r": 4, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    model = get_peft_model(base, LoraConfig(**{**options, **settings}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale) if scale else parameter.zero_()
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)


def make_harmful_adapter(folder, base_folder, *, factor=50):
    """It trains the last norm as well: the model becomes very sure of its random choices, or of their opposite."""
    make_adapter(folder, base_folder, scale=0, modules_to_save=["ln_f"])
    tensors = load_file(folder / "adapter_model.safetensors")
    loud = {name: tensor * factor if "ln_f" in name else tensor for name, tensor in tensors.items()}
    save_file(loud, folder / "adapter_model.safetensors")
