"""Is the adapter better than its base, and by how much?

    rows        which rows, and whether they were trained on; columns: what sets them in groups
    bench       all that every model is put through, settled before weights are read
    models      the base, loaded once as trained, with adapters put on and taken off
    remembered  what a base made of the rows, kept for the next adapter
    scoring     each row's loss and right tokens
    answers     each row's prompt answered; matching, overlap: answers compared with references
    choices     rows whose answer is one of a few
    statistics  paired bootstrap intervals, score intervals, the sign test
    figures     a pair's measures; verdict: the figures in words
    changes     the rows that changed most, token by token
    table       rows.parquet; records: what is left in the run folder
    paired      all of it: `evaluate`
    harness     standard benchmarks instead of rows: `evaluate_tasks`
    voices      who answers: base, adapters, stacks of them
    prompts     a prompt, or a conversation, as token ids
    prompting   `generate`
    conversation the same, with a memory, for a chat

Knows nothing about training or screens. Importing this package imports nothing else, so that what isn't there can be
refused in a moment: torch alone takes a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_cli.evaluate.harness import evaluate_tasks
    from lora_cli.evaluate.paired import evaluate
    from lora_cli.evaluate.prompting import generate
    from lora_cli.evaluate.prompts import read_prompts

__all__ = ["evaluate", "evaluate_tasks", "generate", "read_prompts"]

_HOMES = {
    "evaluate": "lora_cli.evaluate.paired",
    "evaluate_tasks": "lora_cli.evaluate.harness",
    "generate": "lora_cli.evaluate.prompting",
    "read_prompts": "lora_cli.evaluate.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
