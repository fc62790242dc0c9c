"""Commands that come before a run, and change nothing: init, check, preview, params, estimate-vram,
schema."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_cli.cli.libraries import load_libraries
from lora_cli.cli.options import AsJson, ConfigFile, NoCache, Set, answer, load, print_json
from lora_cli.errors import UserError

if TYPE_CHECKING:
    from lora_cli.plan import Plan


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


def check(
    config: ConfigFile,
    no_cache: NoCache = False,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Delete all tokenized data that is kept, of any run.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Take a few steps here, to say how long the run will be.")
    ] = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Everything that can be known before the run.

    Validates the config, reads the data, counts tokens and parameters, and makes the plan. Writes nothing.
    With --probe it also loads the weights and times a few steps.
    """
    settings = load(config, set_, no_cache=no_cache)
    load_libraries()
    from lora_cli.data.cache import Cache, cache_folder
    from lora_cli.engine.planning import make_plan
    from lora_cli.report.console import Console, show
    from lora_cli.report.screens import render_cache, render_check, render_speed

    cache = Cache(cache_folder())
    cleared = cache.clear() if clear_cache else None
    with Console(quiet_stdout=as_json) as console:
        plan = make_plan(settings, console.emit)
        speed = None
        if probe:
            from lora_cli.train.probe import probe_speed

            speed = probe_speed(settings, console.emit)
    if as_json:
        probed = {} if speed is None else {"probe": asdict(speed)}
        print_json({**_plan_as_json(plan), "cache": asdict(cache.usage()), **probed})
    else:
        kept = cache.usage()
        deleted = None if cleared is None else cleared.size_bytes
        shown = render_cache(str(cache.folder), kept.size_bytes, kept.entries, deleted)
        timed = "" if speed is None else render_speed(**asdict(speed))
        show(render_check(plan, cache=shown, speed=timed))


def preview(
    config: ConfigFile,
    count: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many examples.")] = 3,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Examples token by token, trained tokens marked.

    Shows what the model will see, and on which tokens it will be trained. Loads no weights.
    """
    settings = load(config, set_)
    from lora_cli.engine.planning import load_preview
    from lora_cli.report.console import show
    from lora_cli.report.preview import render_preview

    found = load_preview(settings, count)
    if as_json:
        print_json(found.as_json())
    else:
        show(render_preview(found.examples, found.packs, found.micro_batch_tokens))


def params(
    config: ConfigFile,
    ranks: Annotated[str | None, typer.Option(metavar="R,R,...", help="Compare ranks, as 4,8,16,32,64.")] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Parameter counts per module kind.

    Needs the model's config.json alone: no weights, no data.
    """
    wanted = _ranks(ranks)
    settings = load(config, set_)
    from lora_cli.engine.planning import compare_ranks, parameter_report
    from lora_cli.report.console import show
    from lora_cli.report.screens import render_parameters, render_ranks

    if wanted:
        reports = compare_ranks(settings, wanted)
        if as_json:
            print_json({"ranks": {str(rank): report.as_json() for rank, report in reports.items()}})
        else:
            show(render_ranks(reports))
        return
    report = parameter_report(settings)
    if as_json:
        print_json(report.as_json())
    else:
        show(render_parameters(report))


def estimate(
    config: ConfigFile,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A card, as rtx-4090.")] = None,
    vram: Annotated[float | None, typer.Option(min=0, metavar="GIB", help="Memory of the card.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Look for the cheapest change that fits.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Full fine-tuning, LoRA and QLoRA.")] = False,
    tflops: Annotated[
        float | None, typer.Option(metavar="N", help="TFLOP/s that the card sustains: says how long it takes.")
    ] = None,
    expandable: Annotated[
        bool | None,
        typer.Option(
            "--expandable/--no-expandable",
            help="PyTorch's expandable_segments. From PYTORCH_ALLOC_CONF unless given.",
            show_default=False,
        ),
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Peak memory, what fits, what would make it fit.

    Needs the model's config.json alone: no GPU, no weights, no data. Exits 3 if it does not fit.
    """
    settings = load(config, set_)
    load_libraries()
    from lora_cli.estimate import estimate_vram
    from lora_cli.report.console import show
    from lora_cli.report.estimate import render_estimate

    result = estimate_vram(
        settings, gpu=gpu, vram_gib=vram, fit=fit, compare=compare, tflops=tflops, expandable=expandable
    )
    if as_json:
        print_json(result.as_json())
    else:
        show(render_estimate(result))
    answer(result.fits is not False, "it does not fit")


def schema() -> None:
    """JSON Schema of the config.

    For editors: lora schema > schema.json, and "# yaml-language-server: $schema=schema.json" in the config.
    """
    from lora_cli.config import config_schema

    print_json(config_schema())


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
        **{name: value for name, value in asdict(plan).items() if name not in ("data", "steps", "parameters")},
    }
