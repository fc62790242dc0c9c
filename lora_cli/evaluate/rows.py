"""The rows to evaluate on, the run's own or those of another source, and which of them were trained on.

Knows data; knows nothing about models or figures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from lora_cli.config import Config, DataConfig, Source
from lora_cli.config.document import read_document
from lora_cli.data.examples import Examples, PickedPlaces
from lora_cli.data.loading import load_examples
from lora_cli.data.order import shuffled
from lora_cli.engine.trained import Target
from lora_cli.errors import DataError, UserError
from lora_cli.evaluate.models import Reader
from lora_cli.report.events import Emit, Working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAINED_ON = (
    "the run holds no rows out: these are the ones that it was trained on, which says little about others. "
    "Name rows with --data"
)


Load = Callable[[DataConfig], tuple[Examples, Examples | None]]


@dataclass(frozen=True)
class EvaluationRows:
    """What both models are judged on."""

    name: str
    """A source, `validation` or `train`."""
    examples: Examples
    sources: tuple[Source, ...]
    """Where they come from."""
    supervised_bytes: NDArray[np.float64]
    """[N], UTF-8 bytes of each row's supervised text, stop tokens left out"""
    warnings: tuple[str, ...]


def load_rows(target: Target, reader: Reader, data: str | None, *, limit: int | None, emit: Emit) -> EvaluationRows:
    """The rows of `data`, or else the run's validation rows, or else, with a warning, its training rows.

    Args:
        limit: at most so many rows, drawn by the run's seed.

    Raises:
        DataError: a source or a row that can't be used.
        UserError: there is no source.
    """
    config = target.config
    seed = config.train.seed

    def load(data: DataConfig) -> tuple[Examples, Examples | None]:
        return load_examples(
            data,
            reader.tokenizer,
            reader.stop_token_ids,
            seed=seed,
            progress=lambda what, done, total: emit(Working(what, done, total, "rows")),
        )

    if data is None and target.bare:
        raise UserError(f"{target.name} is an adapter without its run", remedy="Name rows with --data.")
    warnings: tuple[str, ...] = ()
    if data is not None:
        sources = named_sources(data)
        name = ", ".join(source.path for source in sources)
        own = _limited_to_positions(config.data, reader) if target.bare else config.data
        try:
            examples, _ = load(own.model_copy(update={"train": sources, "validation": None}))
        except DataError as error:  # the rows stand where a config has those to train on
            message = error.message.replace("data.train:", f"--data {data}:", 1)
            raise DataError(message, remedy=error.remedy) from error
    else:
        train, validation = load(config.data)
        name, examples = ("train", train) if validation is None else ("validation", validation)
        named = config.data.validation
        sources = named if isinstance(named, tuple) else config.data.train
    left_out = _left_out(examples)
    if limit is not None and limit < len(examples):
        examples = _pick(examples, np.sort(shuffled(len(examples), seed)[:limit]))
    if name == "train" and data is None:
        warnings = (_TRAINED_ON,)
    elif data is None:
        warnings = _among(examples, train)
    elif not target.bare:
        warnings = _overlap(examples, config, load)
    warnings = (*warnings, *left_out, *examples.account.warnings)
    return EvaluationRows(name, examples, sources, supervised_bytes(examples, reader.tokenizer), warnings)


def named_sources(data: str) -> tuple[Source, ...]:
    """What `--data` names: a path or a hub id, or as in a config `{path: ..., split: ...}` or a list of these.

    Raises:
        UserError: it is no source.
    """
    value: Any = data
    if data.lstrip().startswith(("{", "[")) and not Path(data).exists():
        read = read_document(data, None)
        value = read.value
        if read.problems:
            raise _no_source(data, read.problems[0].message)
    try:
        return DataConfig.model_validate({"train": value}).train
    except ValidationError as error:
        raise _no_source(data, _wrong(error)) from error


def _no_source(data: str, wrong: str) -> UserError:
    remedy = "Such as --data test.jsonl, or --data '{path: org/name, split: test}', or a list of these."
    return UserError(f"--data {data or repr(data)}: {wrong}", remedy=remedy)


def _wrong(error: ValidationError) -> str:
    """The first mistake, in our words where pydantic's speak of Python."""
    first = error.errors()[0]
    key = ".".join(str(step) for step in first["loc"][1:] if isinstance(step, str))
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; the keys are {', '.join(Source.model_fields)}"
    if first["type"] in ("too_short", "string_too_short"):
        return f"{key or 'it'} is empty"
    return f"{key}: {first['msg']}" if key else str(first["msg"])


def rows_name(name: str) -> str:
    """`test` for `data/test.jsonl`: what the folder of an evaluation is called."""
    stems = [Path(one).name.split(".")[0] or "rows" for one in name.split(", ")]
    stem = "+".join(stems) if len(stems) <= 3 else f"{stems[0]}+{len(stems) - 1}"
    return "".join(character if character.isalnum() or character in "-_+" else "-" for character in stem)


def supervised_bytes(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.float64]:
    """UTF-8 bytes of the text that each row's supervised tokens spell, control tokens left out."""
    sizes = np.zeros(len(examples))
    for index in range(len(examples)):
        example = examples.example(index)
        for start, stop in supervised_runs(example.trained):
            text = str(tokenizer.decode(example.input_ids[start:stop], skip_special_tokens=True))
            sizes[index] += len(text.encode("utf-8"))
    return sizes


def supervised_runs(trained: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _overlap(examples: Examples, config: Config, load: Load) -> tuple[str, ...]:
    """A warning where rows were trained on; another where the training rows are gone."""
    try:
        train, _ = load(config.data)
    except DataError as error:
        return (f"can't tell whether these rows were trained on: {error.message}",)
    return _among(examples, train)


def _among(examples: Examples, train: Examples) -> tuple[str, ...]:
    """A warning where rows have the same tokens as training rows, wherever they come from."""
    trained_on = set(_hashes(train))
    seen = [index for index, found in enumerate(_hashes(examples)) if found in trained_on]
    if not seen:
        return ()
    return (f"{len(seen):,} of {len(examples):,} rows were trained on; the first is {examples.places[seen[0]]}",)


def _left_out(examples: Examples) -> tuple[str, ...]:
    """How many rows aren't judged, and why."""
    account = examples.account
    reasons = ", ".join(f"{len(places):,} {reason}" for reason, places in account.reasons.items())
    return (f"{account.dropped:,} of {account.rows:,} rows were left out: {reasons}",) if account.dropped else ()


def _hashes(examples: Examples) -> list[bytes]:
    return [
        hashlib.blake2b(examples.example(index).input_ids.tobytes(), digest_size=16).digest()
        for index in range(len(examples))
    ]


def _limited_to_positions(data: DataConfig, reader: Reader) -> DataConfig:
    """Without a run's config the length limit is the default; a short model's positions may be fewer."""
    if reader.position_limit is None:
        return data
    return data.model_copy(update={"max_length": min(data.max_length, reader.position_limit)})


def _pick(examples: Examples, chosen: Sequence[int] | NDArray[np.int64]) -> Examples:
    chosen = np.asarray(chosen, dtype=np.int64)
    parts = [examples.example(int(index)) for index in chosen]
    lengths = [len(part.input_ids) for part in parts]
    return Examples(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        offsets=np.cumsum([0, *lengths]),
        places=PickedPlaces([examples.places], chosen),
        account=examples.account,
        fingerprint=examples.fingerprint,
        truncated=np.flatnonzero(np.isin(chosen, examples.truncated)),
    )
