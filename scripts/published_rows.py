"""What a published row says, read leniently: fields missing, in other words, or unknown.

What a row leaves out is the recipe's: checkpointing on, adapters of rank 16 on all linear layers, AdamW, float16 before
Ampere and bfloat16 from there on. Fields that are not known are ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lora_cli.config import QuantizationConfig
from lora_cli.engine.target import Target

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


def dtype_of(row: dict[str, Any], target: Target) -> torch.dtype:
    """The compute dtype."""
    return DTYPES[row.get("compute_dtype") or ("bf16" if target.native_bfloat16 else "fp16")]


def target_of(gpu: str, attention: str) -> Target:
    """The target of `Tesla T4 (sm_75)`."""
    found = re.search(r"sm_(\d+)(\d)", gpu)
    by_name = next((capability for pattern, capability in CAPABILITIES if re.search(pattern, gpu.lower())), None)
    if found is None and by_name is None:
        raise ValueError(f"{gpu!r} names no architecture, such as sm_80, and is no card that is known")
    capability = (int(found[1]), int(found[2])) if found is not None else by_name
    assert capability is not None
    return Target("cuda", capability, "efficient" if attention == "sdpa_efficient" else "auto")


def version_of(row: dict[str, Any], package: str) -> tuple[int, ...]:
    """Of a package that the row was measured with; far in the future where the row doesn't say."""
    numbers = re.match(r"(\d+)\.(\d+)", (row.get("software") or {}).get(package) or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else (99, 0)
