"""The command `lora`: its commands by name, and the one function that starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from lora_cli import __version__
from lora_cli.cli import before, evaluation, generation, merging, runs
from lora_cli.cli.failures import report_bug
from lora_cli.cli.help import LoraCommand, LoraGroup
from lora_cli.cli.quiet import quiet_libraries

app = typer.Typer(
    cls=LoraGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "init": before.init,
    "check": before.check,
    "preview": before.preview,
    "params": before.params,
    "estimate-vram": before.estimate,
    "train": runs.train,
    "sweep": runs.sweep,
    "eval": evaluation.evaluate,
    "generate": generation.generate,
    "merge": merging.merge,
    "extract": merging.extract,
    "export": merging.export,
    "schema": before.schema,
}
for name, function in COMMANDS.items():
    app.command(name, cls=LoraCommand)(function)


def _version(asked: bool) -> None:
    if asked:
        print(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=lambda on: _version(on))] = False,
) -> None:
    """Fine-tune language models with LoRA and QLoRA from one YAML file."""


def main() -> None:
    """Run the command that sys.argv asks for, and exit."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if not debug:
        quiet_libraries()
    try:
        app(arguments, prog_name="lora", obj={"debug": debug})
    except Exception:  # whatever is left is a bug
        report_bug()
