"""The merged folder: built under another name beside the one asked for, and renamed when it is whole.

Puts the base's config, tokenizer and other small files beside the weights, so that transformers loads the folder as
it is. Knows nothing about how the weights came about.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import UserError
from lora_cli.merge.shards import explain
from lora_cli.runs.atomic import sync, write_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


@contextmanager
def staged(output: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder beside `output`; whatever happens within, it is gone afterwards unless it was renamed.

    Raises:
        UserError: `output` is taken, can't be created, or the disk has less than `num_bytes` left.
    """
    check_free(output)
    stage = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        stage.mkdir()
    except OSError as error:
        raise explain(error, output) from error
    try:
        free = shutil.disk_usage(stage).free
        if free < num_bytes:
            raise UserError(
                f"{output.parent.absolute()} has {free:,} bytes left; the merged model takes {num_bytes:,}",
                remedy="Free some space, or give another --output.",
            )
        yield stage
    except OSError as error:
        raise explain(error, output) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_free(output: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: there is something at `output`.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output.absolute()} is taken", remedy="Give another --output; nothing is overwritten.")


def commit(stage: Path, output: Path) -> Path:
    """Give a finished folder its name."""
    sync(stage)
    stage.rename(output)
    sync(output.parent)
    return output


def set_aside(stage: Path, output: Path) -> Path:
    """Keep a folder that isn't fit for use under a name that says so."""
    number = 1
    aside = output.with_name(f"{output.name}.unverified")
    while aside.exists():
        number += 1
        aside = output.with_name(f"{output.name}.unverified-{number}")
    return commit(stage, aside)


def accompany(stage: Path, base: Path, adapter: Path, *, unties: bool, dtype: str | None) -> None:
    """Everything beside the weights: the base's files, with the adapter's tokenizer where it has one."""
    for file in sorted(base.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not file.name.startswith((".", "README")):
            shutil.copyfile(file, stage / file.name)
    copy_tokenizer(adapter, stage)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    write_json(stage / "config.json", _adjusted(config, unties=unties, dtype=dtype))


def copy_tokenizer(source: Path, stage: Path) -> None:
    """The tokenizer in `source`, if there is one, in place of any other."""
    if not (source / "tokenizer_config.json").is_file():
        return
    for name in _TOKENIZER:
        (stage / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)


def _adjusted(config: dict[str, Any], *, unties: bool, dtype: str | None) -> dict[str, Any]:
    """config.json as it holds for the merged weights; a language model inside another has settings of its own."""
    adjusted = {key: value for key, value in config.items() if key != "quantization_config"}
    inner = adjusted.get("text_config")
    if isinstance(inner, dict):
        tied_inside = {"tie_word_embeddings"} & inner.keys()
        adjusted["text_config"] = _adjusted(inner, unties=unties and bool(tied_inside), dtype=dtype)
    if unties:
        adjusted["tie_word_embeddings"] = False
    if dtype is not None:
        adjusted.pop("torch_dtype", None)
        adjusted["dtype"] = dtype
    return adjusted


def _sweep(output: Path) -> None:
    """Remove what a killed merge to the same name has left behind."""
    left = re.compile(re.escape(f".{output.name}.") + r"(\d+)\.partial")
    for folder in output.parent.iterdir():
        found = left.fullmatch(folder.name)
        if found is not None and not Path("/proc", found[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)
