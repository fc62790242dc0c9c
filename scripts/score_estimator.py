"""Score the tracer against peaks that others measured: python scripts/score_estimator.py ROWS.json --models DIR

Each row names a model (its config.json lies in DIR) and a stock recipe of transformers, PEFT and bitsandbytes, not of
this project's trainer: the model in the compute dtype, a 4-bit base prepared by `prepare_model_for_kbit_training`,
adapters in float32, no autocast, `out = model(input_ids=..., labels=...); out.loss.backward()`, the peak of the second
step. The recipe is rebuilt on `meta` and traced with the tracer that `lora estimate-vram` uses. Nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lora_cli.config import QuantizationConfig
from lora_cli.engine.memory.loading import label_weights, load_on_meta, without_initial_values
from lora_cli.engine.memory.pretend import pretend
from lora_cli.engine.memory.replay import Replay, replay
from lora_cli.engine.memory.trace import EMPTY_CACHE, Trace
from lora_cli.engine.memory.tracer import Tracer
from lora_cli.engine.target import Target

MIB = 2**20
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
QUANTIZES_IN_TURN = (5, 4)
"""transformers from here on brings a weight to the card when its turn to be quantized comes; before, THREADS did."""
THREADS = 4
"""transformers' GLOBAL_WORKERS."""
EMPTIES_CACHE = (0, 20)
"""PEFT from here on empties the cache in prepare_model_for_kbit_training."""
PHASES = {"forward": "peak_forward_mib", "backward": "peak_backward_mib", "update": "peak_optimizer_mib"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders, each with a config.json")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="*", help="ids of rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = json.loads(arguments.rows.read_text(encoding="utf-8"))["rows"]
    scores = []
    for row in rows:
        if arguments.only and row["id"] not in arguments.only:
            continue
        began = time.perf_counter()
        try:
            found = replay(stock_trace(row, arguments.models), since="step 2")
        except Exception as error:  # one row that can't be traced must not hide the others
            print(f"{row['id']}: can't be traced: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        scores.append(score(row, found, time.perf_counter() - began))
        print(line(row, scores[-1]), file=sys.stderr, flush=True)
    summary = {name: spread([s[f"{name}_error_percent"] for s in scores]) for name in ("allocated", "reserved")}
    if arguments.json:
        print(json.dumps({"rows": scores, "summary": summary}, indent=2))
        return
    for name, figures in summary.items():
        print(f"{name:9}  " + "  ".join(f"{key} {value:+.2f} %" for key, value in figures.items()))


def stock_trace(row: dict[str, Any], models: Path) -> Trace:
    """Two steps of the row's recipe on `meta`."""
    config = AutoConfig.from_pretrained(models / row["model"].split("/")[-1])
    target, dtype = target_of(row["gpu"], row["attn"]), DTYPES[row["compute_dtype"]]
    quantization = QuantizationConfig(**row["quant"]) if row.get("quant") else None
    tracer = Tracer("meta", target, config.get_text_config().vocab_size, truth=True)
    with tracer, pretend(target), grouped_heads_expanded(row["attn"] == "sdpa_efficient"):
        tracer.trace.mark("load")
        base = load_on_meta(
            config,
            tracer,
            dtype=dtype,
            attention="eager" if row["attn"] == "eager" else "sdpa",
            quantization=quantization,
            warm_up=quantization is not None,  # a quantized base needs a device_map; any other goes by `.cuda()`
            ahead=0 if quantization is None or version_of(row, "transformers") >= QUANTIZES_IN_TURN else THREADS - 1,
        )
        model = prepared(base, row, tracer)
        label_weights(model, tracer)
        parameters = [p for p in model.parameters() if p.requires_grad]
        tracer.watch_layers(model)
        tracer.watch_gradients(parameters)
        optimizer = optimizer_of(row["optimizer"], parameters)
        ids = torch.zeros((row["batch"], row["seq_len"]), dtype=torch.long, device=target.device)
        two_steps(model, optimizer, ids, tracer)
    return tracer.trace


def prepared(model: PreTrainedModel, row: dict[str, Any], tracer: Tracer) -> nn.Module:
    """What the recipe does between loading and training."""
    from peft import LoraConfig, get_peft_model

    model.config.use_cache = False
    if row.get("quant"):  # what prepare_model_for_kbit_training does to memory
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
        if version_of(row, "peft") >= EMPTIES_CACHE:
            tracer.trace.mark(EMPTY_CACHE)
    adapted: nn.Module = model.requires_grad_(row["method"] == "full")
    if row["method"] != "full":
        with without_initial_values():
            adapted = get_peft_model(
                model,
                LoraConfig(r=row["rank"], target_modules=row["targets"], lora_dropout=0.0, task_type="CAUSAL_LM"),
            )
    if row["grad_ckpt"]:
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
    if name in ("adamw", "adamw_torch"):
        return torch.optim.AdamW(parameters, foreach=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, foreach=True)
    if name in ("adamw_8bit", "adamw_bnb_8bit", "adamw8bit"):
        from bitsandbytes.optim.adamw import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(parameters)
        return optimizer
    raise ValueError(f"optimizer {name} is not in the stock recipe")


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, tracer: Tracer) -> None:
    for step in (1, 2):
        one_step(model, optimizer, ids, tracer, f"step {step}")


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, tracer: Tracer, name: str
) -> None:
    """As its authors wrote it: gradients go when the next step begins, the output with the function's end."""
    optimizer.zero_grad(set_to_none=True)
    tracer.trace.mark(name)
    tracer.begin("forward")
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    with tracer.during("update"):
        optimizer.step()


def version_of(row: dict[str, Any], package: str) -> tuple[int, ...]:
    """Of a package that the row was measured with; far in the future where the row doesn't say."""
    numbers = re.match(r"(\d+)\.(\d+)", (row.get("software") or {}).get(package) or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else (99, 0)


def target_of(gpu: str, attention: str) -> Target:
    """The target of `Tesla T4 (sm_75)`."""
    found = re.search(r"sm_(\d+)(\d)", gpu)
    if found is None:
        raise ValueError(f"{gpu!r} names no architecture, such as sm_80")
    capability = (int(found[1]), int(found[2]))
    return Target("cuda", capability, "efficient" if attention == "sdpa_efficient" else "auto")


def score(row: dict[str, Any], found: Replay, seconds: float) -> dict[str, Any]:
    allocated, reserved = found.peak_allocated_bytes / MIB, found.peak_reserved_bytes / MIB
    return {
        "id": row["id"],
        "allocated_mib": allocated,
        "reserved_mib": reserved,
        "allocated_error_percent": percent(allocated, row["peak_allocated_mib"]),
        "reserved_error_percent": percent(reserved, row["peak_reserved_mib"]),
        "phases": {
            name: percent(found.phases.get(name, 0) / MIB, row[key]) for name, key in PHASES.items() if row.get(key)
        },
        "peak": f"{found.moment.phase} {found.moment.place} {found.moment.operator}",
        "seconds": seconds,
    }


def line(row: dict[str, Any], scored: dict[str, Any]) -> str:
    name = f"{row['id']} {row['model'].split('/')[-1][:14]:14} {row['method']:5} {row['attn'][:5]} "
    name += f"{row['batch']:2} x {row['seq_len']:5}"
    phases = " ".join(f"{key[:3]} {value:+.2f}" for key, value in scored["phases"].items())
    return (
        f"{name}  allocated {row['peak_allocated_mib']:8.1f} {scored['allocated_mib']:8.1f} "
        f"{scored['allocated_error_percent']:+6.2f} %  reserved {row['peak_reserved_mib']:6.0f} "
        f"{scored['reserved_mib']:6.0f} {scored['reserved_error_percent']:+6.2f} %  {phases}  {scored['seconds']:.1f} s"
    )


def percent(predicted: float, measured: float) -> float:
    return 100 * (predicted / measured - 1)


def spread(errors: list[float]) -> dict[str, float]:
    """Median and p95 of the errors' sizes, and the errors that lie lowest and highest."""
    if not errors:
        return {}
    sizes = sorted(map(abs, errors))
    p95 = sizes[min(len(sizes) - 1, round(0.95 * (len(sizes) - 1)))]
    return {"median": statistics.median(sizes), "p95": p95, "lowest": min(errors), "highest": max(errors)}


if __name__ == "__main__":
    main()
