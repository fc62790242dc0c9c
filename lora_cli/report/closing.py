"""The closing summary of a run, with the commands to type next, as text."""

from __future__ import annotations

from pathlib import Path

from lora_cli.plan import Plan
from lora_cli.report import numbers
from lora_cli.report.events import Summary
from lora_cli.report.layout import INDENT, LABEL_WIDTH, command, labelled, page_width, short_path


def render_summary(summary: Summary, plan: Plan | None = None, width: int | None = None) -> str:
    """What `train` shows at the end; `plan` adds what had been estimated."""
    width = width or page_width()
    full = plan is not None and plan.model.adapter is None
    rows = [("done" if summary.stopped is None else "stopped", _done(summary)), ("loss", _losses(summary))]
    if summary.peak_memory_bytes:
        rows.append(("memory", _memory(summary, plan)))
    result = f"{short_path(summary.adapter_dir)}, {numbers.size(summary.adapter_bytes)}"
    rows.append(("model" if full else "adapter", result))
    lines = [line for label, text in rows for line in labelled(label, text, width)]
    label = "next"
    for words in _next_commands(summary, full):
        lines += command(words, width, first=f"{INDENT}{label:<{LABEL_WIDTH}}")
        label = ""
    return "\n".join(lines)


def _done(summary: Summary) -> str:
    trained = f"{numbers.counted(summary.num_supervised_tokens, 'token')} trained"
    time = f"{numbers.counted(summary.steps, 'step')} in {numbers.duration(summary.train_seconds)}"
    why = f" ({summary.stopped})" if summary.stopped else ""
    return f"{time}{why}, {summary.tokens_per_second:,.0f} tok/s; {trained}"


def _losses(summary: Summary) -> str:
    first, last = numbers.loss(summary.first_loss), numbers.loss(summary.final_loss)
    span = "first and last step" if summary.loss_span == 1 else f"means of first and last {summary.loss_span:,} steps"
    text = f"train {first} -> {last} ({span})"
    if summary.first_eval_loss is not None and summary.final_eval_loss is not None:
        text += f"\nvalid {numbers.loss(summary.first_eval_loss)} -> {numbers.loss(summary.final_eval_loss)}"
        text += " (first and last evaluation)"
    if summary.best_eval_loss is not None and summary.best_step is not None:
        text += f", best {numbers.loss(summary.best_eval_loss)} at step {summary.best_step:,}"
    return text


def _memory(summary: Summary, plan: Plan | None) -> str:
    tensors = plan is not None and plan.engine.device == "cuda"
    peak = f"peak {numbers.gib(summary.peak_memory_bytes)}{' of tensors' if tensors else ', the whole process'}"
    if plan is None or plan.memory is None:
        return peak
    off = 100 * (summary.peak_memory_bytes / plan.memory.allocated_bytes - 1)
    return f"{peak}, {numbers.percent(abs(off))} {'over' if off > 0 else 'under'} the estimate"


def _next_commands(summary: Summary, full: bool) -> list[list[str]]:
    run = short_path(summary.output_dir)
    if full:
        return [["lora", "eval", run]]
    return [["lora", "eval", run], ["lora", "merge", run, "--output", str(Path("merged", Path(run).name))]]
