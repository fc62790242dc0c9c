"""The stock recipe of transformers, PEFT and bitsandbytes that published rows were measured with, on `meta`.

Not this project's trainer: the model in the compute dtype, a 4-bit base prepared by `prepare_model_for_kbit_training`,
adapters in float32, no autocast, `out = model(input_ids=..., labels=...); out.loss.backward()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from published_rows import attention_of, dtype_of, model_folder, quantization_of, target_of, version_of
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lora_cli.engine.memory.loading import label_weights, load_on_meta, without_initial_values
from lora_cli.engine.memory.pretend import pretend
from lora_cli.engine.memory.rehearsal import paged_aside
from lora_cli.engine.memory.trace import EMPTY_CACHE, Trace
from lora_cli.engine.memory.tracer import Tracer

QUANTIZES_IN_TURN = (5, 4)
"""transformers from here on brings a weight to the card when its turn to be quantized comes; before, THREADS did."""
THREADS = 4
"""transformers' GLOBAL_WORKERS."""
EMPTIES_CACHE = (0, 20)
"""PEFT from here on empties the cache in prepare_model_for_kbit_training."""
BITSANDBYTES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw8bit"), "AdamW8bit"),
    **dict.fromkeys(("paged_adamw_8bit", "paged_adamw8bit"), "PagedAdamW8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "paged_adamw32bit"), "PagedAdamW32bit"),
}


def stock_trace(row: dict[str, Any], models: Path) -> Trace:
    """Two steps of the row's recipe on `meta`."""
    attention = attention_of(row)
    config = AutoConfig.from_pretrained(model_folder(row["model"], models))
    target = target_of(row["gpu"], attention)
    quantization = quantization_of(row)
    tracer = Tracer("meta", target, config.get_text_config().vocab_size, truth=True)
    optimizer_name = row.get("optimizer") or "adamw"
    expanded = grouped_heads_expanded(attention == "sdpa_efficient")
    with tracer, pretend(target), expanded, paged_aside(optimizer_name, tracer):
        tracer.trace.mark("load")
        base = load_on_meta(
            config,
            tracer,
            dtype=dtype_of(row, target),
            attention="eager" if attention == "eager" else "sdpa",
            quantization=quantization,
            warm_up=quantization is not None,  # a quantized base needs a device_map; any other goes by `.cuda()`
            ahead=0 if quantization is None or version_of(row, "transformers") >= QUANTIZES_IN_TURN else THREADS - 1,
        )
        model = prepared(base, row, tracer)
        label_weights(model, tracer)
        parameters = [p for p in model.parameters() if p.requires_grad]
        tracer.watch_layers(model)
        tracer.watch_gradients(parameters)
        optimizer = optimizer_of(optimizer_name, parameters)
        ids = torch.zeros((row.get("batch") or 1, row["seq_len"]), dtype=torch.long, device=target.device)
        two_steps(model, optimizer, ids, tracer)
    return tracer.trace


def prepared(model: PreTrainedModel, row: dict[str, Any], tracer: Tracer) -> nn.Module:
    """What the recipe does between loading and training."""
    from peft import LoraConfig, get_peft_model

    model.config.use_cache = False
    if quantization_of(row) is not None:  # what prepare_model_for_kbit_training does to memory
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
        if version_of(row, "peft") >= EMPTIES_CACHE:
            tracer.trace.mark(EMPTY_CACHE)
    full = row.get("method") == "full"
    adapted: nn.Module = model.requires_grad_(full)
    if not full:
        with without_initial_values():
            adapted = get_peft_model(
                model,
                LoraConfig(
                    r=row.get("rank") or 16,
                    target_modules=row.get("targets") or "all-linear",
                    lora_dropout=row.get("lora_dropout") or 0.0,
                    task_type="CAUSAL_LM",
                ),
            )
    if row.get("grad_ckpt", True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted.train()


@contextmanager
def grouped_heads_expanded(wanted: bool) -> Iterator[None]:
    """PyTorch's memory-efficient attention knows no grouped heads: a program that asks for it expands them."""
    if not wanted:
        yield
        return
    attention = torch.nn.functional.scaled_dot_product_attention

    def expanded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        groups = query.size(-3) // key.size(-3)
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
            kwargs.pop("enable_gqa", None)
        return attention(query, key, value, *args, **kwargs)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", expanded):
        yield


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """By transformers' name, or one of its short forms."""
    if name in ("adamw", "adamw_torch"):
        return torch.optim.AdamW(parameters, foreach=True)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(parameters, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, foreach=True)
    from bitsandbytes.optim import adamw

    kind = BITSANDBYTES.get(name)
    if kind is None:
        raise ValueError(f"optimizer {name} is not in the stock recipe")
    optimizer: torch.optim.Optimizer = getattr(adamw, kind)(parameters)
    return optimizer


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, tracer: Tracer) -> None:
    for step in (1, 2):
        one_step(model, optimizer, ids, tracer, f"step {step}")


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, tracer: Tracer, name: str) -> None:
    """As its authors wrote it: gradients go when the next step begins, the output with the function's end."""
    optimizer.zero_grad(set_to_none=True)
    tracer.trace.mark(name)
    tracer.begin("forward")
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    with tracer.during("update"):
        optimizer.step()
