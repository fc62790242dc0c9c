"""What several commands share: their arguments, loading the config, and giving an answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.cli.network import stay_offline_without_network
from lora_cli.errors import NegativeAnswer

if TYPE_CHECKING:
    from lora_cli.config import Config, Grid

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)]
Target = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A run folder, an adapter folder or a config.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, as train.seed=7. May be repeated."),
]
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".bz2", ".xz", ".zst", ".arrow")
"""What ends like this is a file, here or missing, and never a hub id."""

NoCache = Annotated[bool, typer.Option("--no-cache", help="Tokenize again, and keep nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")]


def load(path: Path, overrides: list[str] | None, *, output_dir: str | None = None, no_cache: bool = False) -> Config:
    from lora_cli.config import load_config

    config = load_config(path, _given(overrides, output_dir, no_cache))
    _stay_offline(config)
    return config


def load_sweep(
    path: Path,
    overrides: list[str] | None,
    grid: list[str] | None,
    *,
    output_dir: str | None = None,
    no_cache: bool = False,
) -> Grid:
    from lora_cli.config import load_grid

    found = load_grid(path, _given(overrides, output_dir, no_cache), grid or ())
    _stay_offline(found.config)
    return found


def _given(overrides: list[str] | None, output_dir: str | None, no_cache: bool) -> list[str]:
    given = list(overrides or ())
    if output_dir is not None:
        given.append(f"output_dir={json.dumps(output_dir, ensure_ascii=False)}")
    if no_cache:
        given.append("data.cache=false")
    return given


def _stay_offline(config: Config) -> None:
    validation = config.data.validation if isinstance(config.data.validation, tuple) else ()
    sources = [source.path for source in (*config.data.train, *validation) if not source.path.endswith(DATA_FILES)]
    stay_offline_without_network([config.model.name_or_path, *sources])


def print_json(value: Any) -> None:
    """One document on stdout; under torchrun, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        from lora_cli.runs.atomic import without_infinities

        print(json.dumps(without_infinities(value), indent=2, ensure_ascii=False, allow_nan=False))


def answer(yes: bool, otherwise: str) -> None:
    if not yes:
        raise NegativeAnswer(otherwise)
