"""Score the tracer against peaks that others measured: python scripts/score_estimator.py ROWS.json --models DIR

Each row names a model (its config.json lies in DIR) and a stock recipe of transformers, PEFT and bitsandbytes, not of
this project's trainer: the model in the compute dtype, a 4-bit base prepared by `prepare_model_for_kbit_training`,
adapters in float32, no autocast, `out = model(input_ids=..., labels=...); out.loss.backward()`, the peak of the second
step. The recipe is rebuilt on `meta` and traced with the tracer that `lora estimate-vram` uses. No
constant is fitted to a row, a model or a recipe; what was inferred from published rows is said in docs/memory.md.

What a row leaves out is the recipe's: checkpointing on, adapters of rank 16 on all linear layers, AdamW, float16 before
Ampere and bfloat16 from there on. Fields that are not known are ignored. A row that can't be traced is named with the
reason, and the others are scored.
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
from lora_cli.engine.memory.rehearsal import paged_aside
from lora_cli.engine.memory.replay import Replay, replay
from lora_cli.engine.memory.trace import EMPTY_CACHE, Trace
from lora_cli.engine.memory.tracer import Tracer
from lora_cli.engine.target import Target

MIB = 2**20
DTYPES = {
    **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp32", "float32"), torch.float32),
}
CAPABILITIES = (
    *((r"\bt4\b|rtx.?20|titan rtx", (7, 5)), (r"v100", (7, 0)), (r"a100|a30\b", (8, 0))),
    *((r"a10g?\b|a40\b|a[3-6]000|a16\b|rtx.?30", (8, 6)), (r"\bl4\b|l40|rtx.?40|[56]000 ada", (8, 9))),
    *((r"h100|h200|h800|h20\b|gh200", (9, 0)), (r"b200|b100", (10, 0)), (r"rtx.?50|pro 6000", (12, 0))),
)
"""Architectures of cards by their names, for rows that don't say `sm_..`."""
QUANTIZES_IN_TURN = (5, 4)
"""transformers from here on brings a weight to the card when its turn to be quantized comes; before, THREADS did."""
BITSANDBYTES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw8bit"), "AdamW8bit"),
    **dict.fromkeys(("paged_adamw_8bit", "paged_adamw8bit"), "PagedAdamW8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "paged_adamw32bit"), "PagedAdamW32bit"),
}
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
    given = json.loads(arguments.rows.read_text(encoding="utf-8"))
    rows = given["rows"] if isinstance(given, dict) else given
    scores, failed = [], []
    for row in rows:
        if arguments.only and row["id"] not in arguments.only:
            continue
        began = time.perf_counter()
        try:
            found = replay(stock_trace(row, arguments.models), since="step 2")
            scored = score(row, found, time.perf_counter() - began)
        except Exception as error:  # one row that can't be traced must not hide the others
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            failed.append({"id": row["id"], "reason": reason})
            print(f"{row['id']}: can't be traced: {reason}", file=sys.stderr)
            continue
        scores.append(scored)
        print(line(row, scores[-1]), file=sys.stderr, flush=True)
    columns = {name: [s[f"{name}_error_percent"] for s in scores] for name in ("allocated", "reserved")}
    columns |= {name: [s["phases"].get(name) for s in scores] for name in PHASES}
    summary = {name: spread([error for error in errors if error is not None]) for name, errors in columns.items()}
    if arguments.json:
        print(json.dumps({"rows": scores, "summary": summary, "failed": failed}, indent=2))
        return
    for name, figures in summary.items():
        if figures:
            print(f"{name:9}  " + "  ".join(f"{key} {value:+.2f} %" for key, value in figures.items()))
    print(f"{len(scores)} rows scored, {len(failed)} could not be traced")


def stock_trace(row: dict[str, Any], models: Path) -> Trace:
    """Two steps of the row's recipe on `meta`."""
    attention = attention_of(row)
    config = AutoConfig.from_pretrained(model_folder(row["model"], models))
    target = target_of(row["gpu"], attention)
    dtype = DTYPES[row.get("compute_dtype") or ("bf16" if target.native_bfloat16 else "fp16")]
    quantization = quantization_of(row)
    tracer = Tracer("meta", target, config.get_text_config().vocab_size, truth=True)
    optimizer_name = row.get("optimizer") or "adamw"
    expanded = grouped_heads_expanded(attention == "sdpa_efficient")
    with tracer, pretend(target), expanded, paged_aside(optimizer_name, tracer):
        tracer.trace.mark("load")
        base = load_on_meta(
            config,
            tracer,
            dtype=dtype,
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


def model_folder(model: str, models: Path) -> Path:
    """The folder of `Qwen/Qwen2.5-1.5B-Instruct`: by its last part, or by the whole id."""
    names = (model.split("/")[-1], model, model.replace("/", "--"), model.replace("/", "_"))
    found = next((models / name for name in names if (models / name / "config.json").is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no config.json of {model} in {models}")
    return found


def attention_of(row: dict[str, Any]) -> str:
    """`eager`, `sdpa_efficient` where the program asked for that kernel, or `sdpa`; flash is one of SDPA's kernels."""
    name = str(row.get("attn") or "sdpa")
    if name in ("eager", "sdpa_efficient"):
        return name
    if name.startswith(("sdpa", "flash")):
        return "sdpa"
    raise ValueError(f"attention {name} is not in the stock recipe")


def quantization_of(row: dict[str, Any]) -> QuantizationConfig | None:
    """Of `{"type": "nf4", "double_quant": false}`, of `"nf4"`, or of the method's name."""
    given = row.get("quant") or ("nf4" if row.get("method") == "qlora" else None)
    if given is None:
        return None
    known: Any = given if isinstance(given, dict) else {"type": str(given), "double_quant": False}
    return QuantizationConfig(type=known["type"], double_quant=bool(known.get("double_quant")))


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


def version_of(row: dict[str, Any], package: str) -> tuple[int, ...]:
    """Of a package that the row was measured with; far in the future where the row doesn't say."""
    numbers = re.match(r"(\d+)\.(\d+)", (row.get("software") or {}).get(package) or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else (99, 0)


def target_of(gpu: str, attention: str) -> Target:
    """The target of `Tesla T4 (sm_75)`."""
    found = re.search(r"sm_(\d+)(\d)", gpu)
    by_name = next((capability for pattern, capability in CAPABILITIES if re.search(pattern, gpu.lower())), None)
    if found is None and by_name is None:
        raise ValueError(f"{gpu!r} names no architecture, such as sm_80, and is no card that is known")
    capability = (int(found[1]), int(found[2])) if found is not None else by_name
    assert capability is not None
    return Target("cuda", capability, "efficient" if attention == "sdpa_efficient" else "auto")


def score(row: dict[str, Any], found: Replay, seconds: float) -> dict[str, Any]:
    allocated, reserved = found.peak_allocated_bytes / MIB, found.peak_reserved_bytes / MIB
    return {
        "id": row["id"],
        "allocated_mib": allocated,
        "reserved_mib": reserved,
        "measured_allocated_mib": row.get("peak_allocated_mib"),
        "measured_reserved_mib": row.get("peak_reserved_mib"),
        "allocated_error_percent": percent(allocated, row.get("peak_allocated_mib")),
        "reserved_error_percent": percent(reserved, row.get("peak_reserved_mib")),
        "phases": {
            name: percent(found.phases.get(name, 0) / MIB, row[key]) for name, key in PHASES.items() if row.get(key)
        },
        "peak": f"{found.moment.phase} {found.moment.place} {found.moment.operator}",
        "seconds": seconds,
    }


def line(row: dict[str, Any], scored: dict[str, Any]) -> str:
    name = f"{row['id']} {row['model'].split('/')[-1][:14]:14} {row.get('method') or 'lora':5} "
    name += f"{attention_of(row)[:5]:5} {row.get('batch') or 1:2} x {row['seq_len']:5}"
    parts = [
        f"{kind} {scored[f'measured_{kind}_mib'] or 0:8.1f} {scored[f'{kind}_mib']:8.1f} {signed(scored, kind)}"
        for kind in ("allocated", "reserved")
    ]
    phases = " ".join(f"{key[:3]} {value:+.2f}" for key, value in scored["phases"].items())
    return f"{name}  {'  '.join(parts)}  {phases}  {scored['seconds']:.1f} s"


def signed(scored: dict[str, Any], kind: str) -> str:
    error = scored[f"{kind}_error_percent"]
    return "  not measured" if error is None else f"{error:+6.2f} %"


def percent(predicted: float, measured: float | None) -> float | None:
    return 100 * (predicted / measured - 1) if measured else None


def spread(errors: list[float]) -> dict[str, float]:
    """Median and p95 of the errors' sizes, and the errors that lie lowest and highest."""
    if not errors:
        return {}
    sizes = sorted(map(abs, errors))
    p95 = sizes[min(len(sizes) - 1, round(0.95 * (len(sizes) - 1)))]
    return {"median": statistics.median(sizes), "p95": p95, "lowest": min(errors), "highest": max(errors)}


if __name__ == "__main__":
    main()
