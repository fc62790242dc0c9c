"""The command line: parse, load the config, call one function, print its result.

Each command imports what it needs in its body, so that `lora --help` loads nothing and a broken config is refused
before torch is. Knows the options; screens are in `report`, failures and exit codes in `cli_errors`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_cli import __version__
from lora_cli.cli_errors import report_bug
from lora_cli.cli_help import LoraCommand, LoraGroup
from lora_cli.errors import NegativeAnswer, UserError

if TYPE_CHECKING:
    from lora_cli.config import Config
    from lora_cli.plan import Plan

app = typer.Typer(
    cls=LoraGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
Target = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A run folder, an adapter folder or a config.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, as train.seed=7. May be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")]


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda on: _version(on))
    ] = False,
) -> None:
    """Fine-tune language models with LoRA and QLoRA from one YAML file."""


@app.command("init", cls=LoraCommand)
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("lora.yaml"),
    model: Annotated[str | None, typer.Option(metavar="ID", help="Hub id or folder of the model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Training rows: a file or hub id.")] = None,
    output_dir: Annotated[str | None, typer.Option(metavar="DIR", help="The run folder.")] = None,
    quantization: Annotated[
        Literal["nf4", "fp4", "int8"] | None, typer.Option(help="Quantize the base: QLoRA.")
    ] = None,
) -> None:
    """Write a commented starter config.

    Asks for the model and the data, unless they are given. Overwrites nothing.
    """
    from lora_cli.config import starter_config

    if path.exists():
        raise UserError(f"{path.absolute()} exists", remedy="Give another name; nothing is overwritten.")
    model = model or _ask("model", "hub id or folder")
    data = data or _ask("data", "jsonl, json, csv or parquet file, or hub id")
    output_dir = output_dir or f"runs/{path.stem}"
    text = starter_config(model, data, output_dir, quantization=quantization, name=str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"can't write {path.absolute()}: {error.strerror}") from error
    print(f"wrote {path}\n\n  next     lora check {path}\n           lora train {path}")


@app.command("check", cls=LoraCommand)
def check(config: ConfigFile, set_: Set = None, as_json: AsJson = False) -> None:
    """Everything that can be known before the run.

    Validates the config, reads the data, counts tokens and parameters, and makes the plan. Writes nothing.
    """
    settings = _load(config, set_)
    from lora_cli.engine.planning import make_plan
    from lora_cli.report.console import Console, show
    from lora_cli.report.screens import render_check

    with Console(quiet_stdout=as_json) as console:
        plan = make_plan(settings, console.emit)
    if as_json:
        _print_json(_plan_as_json(plan))
    else:
        show(render_check(plan))


@app.command("preview", cls=LoraCommand)
def preview(
    config: ConfigFile,
    count: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many examples.")] = 3,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Examples token by token, trained tokens marked.

    Shows what the model will see, and on which tokens it will be trained. Loads no weights.
    """
    settings = _load(config, set_)
    from lora_cli.engine.planning import load_preview
    from lora_cli.report.console import show
    from lora_cli.report.preview import render_preview

    examples = load_preview(settings, count)
    if as_json:
        _print_json({"examples": [example.as_json() for example in examples]})
    else:
        show(render_preview(examples))


@app.command("params", cls=LoraCommand)
def params(
    config: ConfigFile,
    ranks: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="Compare ranks, as 4,8,16,32,64.")
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Parameter counts per module kind.

    Needs the model's config.json alone: no weights, no data.
    """
    wanted = _ranks(ranks)
    settings = _load(config, set_)
    from lora_cli.engine.planning import compare_ranks, parameter_report
    from lora_cli.report.console import show
    from lora_cli.report.screens import render_parameters, render_ranks

    if wanted:
        reports = compare_ranks(settings, wanted)
        if as_json:
            _print_json({"ranks": {str(rank): report.as_json() for rank, report in reports.items()}})
        else:
            show(render_ranks(reports))
        return
    report = parameter_report(settings)
    if as_json:
        _print_json(report.as_json())
    else:
        show(render_parameters(report))


@app.command("estimate-vram", cls=LoraCommand)
def estimate(
    config: ConfigFile,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A card, as rtx-4090.")] = None,
    vram: Annotated[float | None, typer.Option(min=0, metavar="GIB", help="Memory of the card.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Look for the cheapest change that fits.")] = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Peak memory, what fits, what would make it fit.

    Needs the model's config.json alone: no GPU, no weights, no data. Exits 3 if it does not fit.
    """
    settings = _load(config, set_)
    from lora_cli.estimate import estimate_vram
    from lora_cli.report.console import show
    from lora_cli.report.screens import render_estimate

    result = estimate_vram(settings, gpu=gpu, vram_gib=vram, fit=fit)
    if as_json:
        _print_json(result.as_json())
    else:
        show(render_estimate(result))
    _answer(result.fits is not False, "it does not fit")


@app.command("train", cls=LoraCommand)
def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
    output_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run folder, instead of the config's.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Tokenize again.")] = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Train; --resume continues.

    Validates everything before the first step, prints the plan, and writes only to output_dir.
    """
    settings = _load(config, set_, output_dir=output_dir, no_cache=no_cache)
    from lora_cli.report.console import Console
    from lora_cli.train import train

    with Console(quiet_stdout=as_json) as console:
        summary = train(settings, resume=resume, emit=console.emit)
    if as_json:
        _print_json(summary.as_json())


@app.command("eval", cls=LoraCommand)
def evaluate(
    target: Target,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Rows to evaluate on.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Generate answers as well.")] = False,
    min_improvement: Annotated[
        float | None, typer.Option(metavar="NATS", help="Exit 3 if the loss falls by less.")
    ] = None,
    fail_if_worse: Annotated[bool, typer.Option("--fail-if-worse", help="Exit 3 if the loss rises.")] = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Base and adapter side by side.

    Scores the same rows with and without the adapter, with an interval for the difference.
    """
    from lora_cli.evaluate import evaluate
    from lora_cli.report.console import Console, show
    from lora_cli.report.screens import render_evaluation

    with Console(quiet_stdout=True) as console:
        result = evaluate(target, data=data, generate=generate, overrides=set_ or (), emit=console.emit)
    if as_json:
        _print_json(result.as_json())
    else:
        show(render_evaluation(result))
    wanted = min_improvement if min_improvement is not None else 0.0 if fail_if_worse else None
    _answer(wanted is None or result.improvement >= wanted, "the adapter is not better by what was asked")


@app.command("generate", cls=LoraCommand)
def generate(
    target: Target,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="May be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(metavar="PATH", help="One prompt per line.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Compare with this one. May be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    as_json: AsJson = False,
) -> None:
    """Text from base and adapters.

    The same prompts through the base and every adapter, for comparison.
    """
    from lora_cli.evaluate import generate, read_prompts
    from lora_cli.report.console import show
    from lora_cli.report.screens import render_outputs

    outputs = generate(
        target,
        read_prompts(prompt or (), prompts_file),
        adapters=adapter or (),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        _print_json({"outputs": [asdict(output) for output in outputs]})
    else:
        show(render_outputs(outputs))


@app.command("merge", cls=LoraCommand)
def merge(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET", help="Run or adapter folders; DIR=WEIGHT combines several."),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the model goes.")],
    base: Annotated[
        Literal["original", "quantized"] | None,
        typer.Option(help="Merge into the weights as on the hub, or as trained."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of the merged weights.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE")] = "5GB",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the comparison.")] = False,
    as_json: AsJson = False,
) -> None:
    """Streaming, verified merge.

    Writes a model that needs no adapter, and compares it with base + adapter. Exits 3 if they differ.
    """
    from lora_cli.merge import merge
    from lora_cli.report.console import Console, show
    from lora_cli.report.screens import render_merge

    with Console(quiet_stdout=True) as console:
        result = merge(
            targets,
            output,
            base=base,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=not no_verify,
            emit=console.emit,
        )
    if as_json:
        _print_json(result.as_json())
    else:
        show(render_merge(result))
    _answer(result.verified is not False, "the merged model differs from base + adapter")


@app.command("schema", cls=LoraCommand)
def schema() -> None:
    """JSON Schema of the config.

    For editors: lora schema > schema.json, and "# yaml-language-server: $schema=schema.json" in the config.
    """
    from lora_cli.config import config_schema

    _print_json(config_schema())


def main() -> None:
    """The command `lora`."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        app(arguments, prog_name="lora", obj={"debug": debug})
    except Exception:  # whatever is left is a bug
        report_bug()


def _version(asked: bool) -> None:
    if asked:
        print(f"lora {__version__}")
        raise typer.Exit


def _load(
    path: Path, overrides: list[str] | None, *, output_dir: str | None = None, no_cache: bool = False
) -> Config:
    from lora_cli.config import load_config

    given = list(overrides or ())
    if output_dir is not None:
        given.append(f"output_dir={json.dumps(output_dir, ensure_ascii=False)}")
    if no_cache:
        given.append("data.cache=false")
    return load_config(path, given)


def _ask(option: str, what: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(f"no --{option} given, and nobody to ask", remedy=f"Add --{option}: a {what}.")
    while True:
        print(f"{option} ({what}): ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise UserError(f"no --{option} given")
        if line.strip():
            return line.strip()


def _ranks(text: str | None) -> list[int]:
    try:
        ranks = [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        ranks = [0]
    if any(rank < 1 for rank in ranks):
        raise UserError(f"--ranks {text} is not a list of ranks", remedy="Such as --ranks 4,8,16,32,64.")
    return ranks


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.data),
        "steps": plan.steps.total,
        "parameters": plan.parameters.as_json(),
        "schedule": asdict(plan.steps),
        **{
            name: value for name, value in asdict(plan).items() if name not in ("data", "steps", "parameters")
        },
    }


def _print_json(value: Any) -> None:
    """One document on stdout; under torchrun, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(value, indent=2, ensure_ascii=False))


def _answer(yes: bool, otherwise: str) -> None:
    if not yes:
        raise NegativeAnswer(otherwise)
