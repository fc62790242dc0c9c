"""The command that trains."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_cli.cli.options import AsJson, ConfigFile, NoCache, Set, load, print_json


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
