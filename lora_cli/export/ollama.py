"""The Modelfile: which weights, the template in Ollama's language, the stop tokens, how to sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_cli.export.turns import Turns

MODELFILE = "Modelfile"
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""transformers' names and Ollama's."""


def modelfile(weights: str, turns: Turns | None, stops: list[str], generation: dict[str, Any], positions: int) -> str:
    """The text of a Modelfile; `weights` is a file beside it. Without `turns` prompts go in as they are."""
    lines = [f"FROM ./{weights}", ""]
    template = turns.as_go() if turns is not None else "{{ .Prompt }}"
    lines += [f'TEMPLATE """{template}"""', ""]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {positions}")
    if generation.get("do_sample"):
        lines += [f"PARAMETER {name} {generation[key]}" for key, name in _SAMPLING.items() if generation.get(key)]
    return "\n".join([*lines, ""])


def generation_settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json says, if it is there."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
