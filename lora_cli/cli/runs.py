"""Commands that train, and that judge what was trained: train, eval."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lora_cli.cli.options import AsJson, ConfigFile, NoCache, Set, Target, answer, load, print_json


def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
    output_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run folder, instead of the config's.")
    ] = None,
    no_cache: NoCache = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Train; --resume continues.

    Validates everything before the first step, prints the plan, and writes only to output_dir.
    """
    settings = load(config, set_, output_dir=output_dir, no_cache=no_cache)
    from lora_cli.report.console import Console
    from lora_cli.train import train

    with Console(quiet_stdout=as_json) as console:
        summary = train(settings, resume=resume, emit=console.emit)
    if as_json:
        print_json(summary.as_json())


def evaluate(
    target: Target,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Rows to evaluate on.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Generate answers as well.")] = False,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Judge this one, too. May be repeated.")
    ] = None,
    base: Annotated[
        Literal["trained", "original", "both"],
        typer.Option(help="The base quantized as in training, or its original weights."),
    ] = "trained",
    limit: Annotated[
        int | None, typer.Option("-n", min=1, metavar="N", help="At most so many rows, drawn by the seed.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of an answer; by default half as many again as the rows need."),
    ] = None,
    min_improvement: Annotated[
        float | None, typer.Option(metavar="NATS", help="Exit 3 if the loss falls by less.")
    ] = None,
    fail_if_worse: Annotated[bool, typer.Option("--fail-if-worse", help="Exit 3 if the verdict is worse.")] = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Base and adapter side by side.

    Scores the same rows with and without the adapter, with an interval for the difference.
    """
    from lora_cli.evaluate import evaluate
    from lora_cli.report.console import Console, show
    from lora_cli.report.evaluation import render_evaluation

    with Console(quiet_stdout=True) as console:
        result = evaluate(
            target,
            data=data,
            generate=generate,
            overrides=set_ or (),
            adapters=adapter or (),
            base=base,
            limit=limit,
            max_new_tokens=max_new_tokens,
            min_improvement=min_improvement,
            fail_if_worse=fail_if_worse,
            emit=console.emit,
        )
    if as_json:
        print_json(result.as_json())
    else:
        show(render_evaluation(result))
    answer(result.meets_demand, f"the adapter is not as good as was asked: {result.comparison.verdict}")
