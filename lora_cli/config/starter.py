"""The commented config that `lora init` writes: the fields that most runs set, with their documentation
beside them."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any

from lora_cli.config.allowed import Allowed, number
from lora_cli.config.json_schema import config_schema

SHOWN: tuple[tuple[str, ...], ...] = (
    ("model", "name_or_path"),
    ("model", "dtype"),
    ("model", "quantization"),
    ("adapter", "r"),
    ("adapter", "lora_alpha"),
    ("adapter", "lora_dropout"),
    ("adapter", "target_modules"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "format"),
    ("data", "max_length"),
    ("data", "overlong"),
    ("data", "train_on"),
    ("train", "num_train_epochs"),
    ("train", "batch_size"),
    ("train", "micro_batch_tokens"),
    ("train", "learning_rate"),
    ("train", "lr_scheduler_type"),
    ("train", "warmup_steps"),
    ("train", "logging_steps"),
    ("train", "eval_steps"),
    ("train", "save_steps"),
    ("train", "seed"),
    ("output_dir",),
)
"""Everything else keeps its default and is in the schema."""

SECTIONS = {path[0] for path in SHOWN if len(path) > 1}

_VALUE_WIDTH = 34


def starter_config(
    model: str, data: str, output_dir: str, *, quantization: str | None = None, name: str = "lora.yaml"
) -> str:
    """The text of a config that trains `model` on `data`; `name` is the file it is meant for."""
    allowed = Allowed(config_schema())
    values: dict[tuple[str, ...], str] = {
        ("model", "name_or_path"): _scalar(model),
        ("model", "quantization"): "null" if quantization is None else f"{{type: {_scalar(quantization)}}}",
        ("data", "train"): _scalar(data),
        ("output_dir",): _scalar(output_dir),
    }
    lines = [f"# lora train {name}", "# Every other key, with its default: lora schema"]
    for section, paths in groupby(SHOWN, key=lambda path: path[0]):
        lines.append("")
        if section in SECTIONS:
            lines.append(_line(f"{section}:", allowed.description((section,))))
        for path in paths:
            written = f"{'  ' * (len(path) - 1)}{path[-1]}: {values.get(path) or _default(path, allowed)}"
            lines.append(_line(written, _comment(path, allowed)))
    return "\n".join(lines) + "\n"


def _line(written: str, comment: str) -> str:
    return f"{written:<{_VALUE_WIDTH}}  # {comment}"


def _comment(path: tuple[str, ...], allowed: Allowed) -> str:
    choices = allowed.choices(path)
    choices = choices if len(choices) > 1 and len(choices) <= 5 else []
    return allowed.description(path) + (f": {' | '.join(choices)}" if choices else "")


def _default(path: tuple[str, ...], allowed: Allowed) -> str:
    value: Any = allowed.default(path)
    if isinstance(value, float):
        return number(value)
    return _scalar(value) if isinstance(value, str) else json.dumps(value)


def _scalar(text: str) -> str:
    """`text` as YAML: bare where it is clearly text, in double quotes otherwise."""
    plain = re.fullmatch(r"[A-Za-z./~_][\w./@+-]*", text) is not None
    return (
        text if plain and text.lower() not in ("true", "false", "null", "~") else json.dumps(text, ensure_ascii=False)
    )
