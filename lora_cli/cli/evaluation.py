"""The command that judges what was trained: eval, on rows or on standard benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_cli.cli.libraries import load_libraries
from lora_cli.cli.options import AsJson, Set, Target, answer, print_json
from lora_cli.errors import UserError

Base = Literal["trained", "original", "both"]


def evaluate(
    target: Target,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Rows to evaluate on: a file, a hub id, or {path, split}.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Generate answers as well.")] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Judge this adapter or merged model, too. May be repeated."),
    ] = None,
    base: Annotated[Base, typer.Option(help="The base quantized as in training, or its original weights.")] = "trained",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, metavar="N", help="At most so many rows, drawn by the seed.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of an answer; by default half as many again as the rows need."),
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The loss for each value of a column as well.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="REGEX", help="What it finds in answer and reference must be the same.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Weigh these answers; auto takes those of the rows.")
    ] = None,
    min_improvement: Annotated[
        float | None, typer.Option(metavar="NATS", help="Exit 3 if the loss falls by less.")
    ] = None,
    fail_if_worse: Annotated[bool, typer.Option("--fail-if-worse", help="Exit 3 if the verdict is worse.")] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness instead of rows: names or YAML files."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="With --tasks: examples before each question.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="With --tasks: ask through the chat template.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where figures, rows and page go, instead of the run folder.")
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Base and adapter side by side.

    Scores the same rows with and without the adapter, with an interval for the difference.
    """
    from lora_cli.engine.trained import find_target

    find_target(target, set_ or ())  # what isn't there is refused before torch is imported
    shared = {"overrides": set_ or (), "adapters": adapter or (), "limit": limit, "output": output}
    of_rows = {
        "data": data,
        "generate": generate,
        "max_new_tokens": max_new_tokens,
        "group_by": group_by,
        "pattern": pattern,
        "choices": choices,
        "min_improvement": min_improvement,
    }
    of_tasks = {"num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
    if tasks is None:
        _refuse(of_tasks, "needs --tasks")
        _on_rows(target, as_json, base=base, fail_if_worse=fail_if_worse, **shared, **of_rows)
        return
    _refuse(of_rows, "speaks of rows, and --tasks has none")
    if base == "both":
        raise UserError("--base both: --tasks are run on one base", remedy="Run it twice, with --output.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task", remedy="Such as --tasks arc_easy,hellaswag or --tasks mine.yaml.")
    _on_tasks(
        target,
        names,
        as_json,
        as_trained=base == "trained",
        num_fewshot=num_fewshot,
        chat=apply_chat_template,
        fail_if_worse=fail_if_worse,
        **shared,
    )


def _refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that would be read by nothing."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"--{name.replace('_', '-')} {why}")


def _on_rows(target: str, as_json: bool, **asked: Any) -> None:
    load_libraries()
    from lora_cli.evaluate import evaluate
    from lora_cli.report.console import Console, show
    from lora_cli.report.evaluation import render_evaluation

    with Console(quiet_stdout=True) as console:
        result = evaluate(target, emit=console.emit, **asked)
    if as_json:
        print_json(result.as_json())
    else:
        show(render_evaluation(result))
    unmet = result.demand.unmet_by(result.comparison)
    answer(unmet is None, unmet or "")


def _on_tasks(target: str, tasks: list[str], as_json: bool, **asked: Any) -> None:
    from lora_cli.evaluate import evaluate_tasks
    from lora_cli.report.console import Console, show
    from lora_cli.report.tasks import render_tasks

    with Console(quiet_stdout=True) as console:
        result = evaluate_tasks(target, tasks, emit=console.emit, **asked)
    if as_json:
        print_json(result.as_json())
    else:
        show(render_tasks(result))
    answer(result.meets_demand, f"the adapter is worse on some task: {result.comparison.verdict}")
