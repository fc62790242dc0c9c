"""Commands that train, and that work on what was trained: train, eval, generate, merge."""

from __future__ import annotations

from pathlib import Path
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


def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="May be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(metavar="PATH", help="One prompt per line.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Compare with this one. May be repeated.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give prompts to the model as they are.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Text from base and adapters.

    The same prompts through the base and every adapter, for comparison.
    """
    from lora_cli.engine.generation import Sampling
    from lora_cli.evaluate import generate, read_prompts
    from lora_cli.report.console import Console, show
    from lora_cli.report.evaluation import render_outputs

    with Console(quiet_stdout=True) as console:
        result = generate(
            target,
            prompts=read_prompts(prompt or (), prompts_file),
            adapters=adapter or (),
            sampling=Sampling(max_new_tokens, temperature, top_p, seed=seed),
            overrides=set_ or (),
            raw=raw,
            emit=console.emit,
        )
    if as_json:
        print_json(result.as_json())
    else:
        show(render_outputs(result))


def merge(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET", help="A run folder, adapter folder or config; several are combined, each as DIR:WEIGHT."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the model goes.")],
    base: Annotated[
        Literal["original", "quantized"] | None,
        typer.Option(help="Merge into the weights as on the hub, or as trained."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of the merged weights.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE")] = "5GB",
    method: Annotated[
        Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"],
        typer.Option(help="How several adapters are combined; cat is their exact weighted sum."),
    ] = "cat",
    density: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of values that ties, dare and pruning keep.")
    ] = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write the combination as an adapter; no base is read.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the comparison.")] = False,
    as_json: AsJson = False,
) -> None:
    """Streaming, verified merge.

    Writes a model that needs no adapter, and compares it with base + adapter. Exits 3 if they differ.
    """
    from lora_cli.merge import combine_adapters, merge
    from lora_cli.report.console import Console, show
    from lora_cli.report.merging import render_combination, render_merge

    if as_adapter:
        combination = combine_adapters(targets, output, method=method, density=density)
        if as_json:
            print_json(combination.as_json())
        else:
            show(render_combination(combination))
        return
    with Console(quiet_stdout=True) as console:
        result = merge(
            targets,
            output,
            base=base,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=not no_verify,
            method=method,
            density=density,
            emit=console.emit,
        )
    if as_json:
        print_json(result.as_json())
    else:
        show(render_merge(result))
    answer(result.problem is None, f"the merge is not fit for use: {result.problem}")
