"""The commands that train."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_cli.cli.libraries import load_libraries
from lora_cli.cli.options import AsJson, ConfigFile, NoCache, Set, load, load_sweep, print_json


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

    with Console(quiet_stdout=as_json) as console:
        load_libraries(console.emit)
        from lora_cli.train import train

        summary = train(settings, resume=resume, emit=console.emit)
    if as_json:
        print_json(summary.as_json())


def sweep(
    config: ConfigFile,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=[VALUE,...]", help="A setting's values: adapter.r=[8,16]. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in output_dir.")] = False,
    output_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder of the sweep, instead of the config's.")
    ] = None,
    no_cache: NoCache = False,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Train a grid of settings at the same time, on one frozen base.

    Every combination becomes a member with a run folder of its own, in output_dir; a leaderboard ranks them.
    """
    settings = load_sweep(config, set_, grid, output_dir=output_dir, no_cache=no_cache)
    from lora_cli.report.console import Console

    with Console(quiet_stdout=as_json) as console:
        load_libraries(console.emit)
        from lora_cli.sweep import sweep

        summary = sweep(settings, resume=resume, emit=console.emit)
    if as_json:
        print_json(summary.as_json())
