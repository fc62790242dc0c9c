"""Commands that make something new of what was trained: merge, extract, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.cli.options import AsJson, answer, print_json


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
        str,
        typer.Option(metavar="METHOD", help="How several adapters are combined; cat is their exact weighted sum."),
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


def extract(
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="A run of full fine-tuning, or a whole model.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the adapter goes.")],
    base: Annotated[
        str | None, typer.Option(metavar="ID", help="Hub id or folder of its base, where no run says it.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, metavar="R", help="Of each layer's product.")] = 16,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Save this module whole, such as embed_tokens. May be repeated."),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the comparison on text.")] = False,
    as_json: AsJson = False,
) -> None:
    """An adapter from a fully fine-tuned model.

    For each linear layer the product of the given rank that comes nearest to its change, with the error that is left.
    """
    from lora_cli.merge import extract
    from lora_cli.report.console import Console, show
    from lora_cli.report.merging import render_extraction

    with Console(quiet_stdout=True) as console:
        found = extract(
            tuned,
            output,
            base=base,
            rank=rank,
            modules_to_save=modules_to_save or (),
            verify=not no_verify,
            emit=console.emit,
        )
    if as_json:
        print_json(found.as_json())
    else:
        show(render_extraction(found))


def export(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="A merged or whole model, a run or an adapter.", show_default=False),
    ],
    to: Annotated[Literal["gguf", "ollama", "vllm"], typer.Option("--to", help="Whom it is for.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="A .gguf file, or Ollama's folder.")
    ] = None,
    type_name: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        typer.Option("--type", help="Of the weights in GGUF; auto loses nothing."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """For llama.cpp, Ollama and vLLM.

    A GGUF file of a model or of an unmerged adapter, a folder for Ollama, or vLLM's command line. What can't be
    converted says why.
    """
    from lora_cli.export import export
    from lora_cli.report.console import Console, show
    from lora_cli.report.merging import render_export

    with Console(quiet_stdout=True) as console:
        found = export(target, to, output, type_name=type_name, emit=console.emit)
    if as_json:
        print_json(found.as_json())
    else:
        show(render_export(found))
