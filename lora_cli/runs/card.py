"""The model card of an adapter: README.md, with the front matter that the hub reads.

Says only what holds on any machine: hub ids, figures and settings, never a local path. Knows nothing about
how the figures came about.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.plan import Plan

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DATA_SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".txt",
    ".arrow",
)


def hub_id(name: str) -> str | None:
    """`name` if it names something on the hub; None for a file or folder, here or on another machine."""
    local = os.path.exists(name) or name.endswith(_DATA_SUFFIXES)
    return name if _HUB_ID.fullmatch(name) and not local else None


def model_card(name: str, plan: Plan, summary: Mapping[str, Any], datasets: Sequence[str]) -> str:
    """The card of the adapter of run `name`. `datasets` are the sources' paths as configured."""
    base = hub_id(plan.model.name)
    known = [dataset for dataset in dict.fromkeys(map(hub_id, datasets)) if dataset is not None]
    title = re.sub(r"[^\w .-]", " ", name).strip()
    about = (
        f"A LoRA adapter for [{base}](https://huggingface.co/{base})" if base else "A LoRA adapter for a local model"
    )
    return "\n".join(
        [
            *_front_matter(base, known),
            "",
            f"# {title}",
            "",
            f"{about} ({plan.model.architecture}).",
            "",
            *_usage(base),
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {text} |" for label, text in _figures(plan, summary)),
            "",
            "Losses are nats per trained token.",
            "",
        ]
    )


def _front_matter(base: str | None, datasets: Sequence[str]) -> list[str]:
    # JSON strings are YAML strings, whatever an id looks like.
    lines = ["---"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora"]
    if base:
        lines.append(f"- {json.dumps(f'base_model:adapter:{base}')}")
    if datasets:
        lines += ["datasets:", *(f"- {json.dumps(dataset)}" for dataset in datasets)]
    return [*lines, "---"]


def _usage(base: str | None) -> list[str]:
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base or 'path/to/the/base/model')})",
        'model = PeftModel.from_pretrained(base, "path/to/this/adapter")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/adapter")',
        "```",
    ]


def _figures(plan: Plan, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    parameters = plan.parameters
    steps = plan.steps
    figures = [
        ("adapter", str(plan.model.adapter)),
        ("trainable parameters", f"{parameters.trainable:,} of {parameters.total:,}"),
        ("base during training", ", ".join(filter(None, (plan.model.dtype, plan.model.quantization)))),
        ("steps", f"{summary['steps']:,}, {steps.batch_size:,} examples each"),
        (
            "learning rate",
            f"{steps.learning_rate:g}, {steps.lr_scheduler_type}, {steps.warmup:,} warm-up steps",
        ),
        ("tokens", f"{summary['num_tokens']:,}, {summary['num_supervised_tokens']:,} of them trained"),
    ]
    if summary["first_loss"] is not None and summary["final_loss"] is not None:
        course = f"{summary['first_loss']:.4f} to {summary['final_loss']:.4f}"
        figures.append(("training loss", f"{course} (means of first and last {summary['loss_span']:,} steps)"))
    if summary["first_eval_loss"] is not None and summary["final_eval_loss"] is not None:
        course = f"{summary['first_eval_loss']:.4f} to {summary['final_eval_loss']:.4f}"
        figures.append(("validation loss", f"{course} (first and last evaluation)"))
    return figures
