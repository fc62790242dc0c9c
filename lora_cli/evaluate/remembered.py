"""What a base made of the rows, kept between evaluations: it is the same for every adapter that comes.

An entry is a file named by a hash of everything that its content depends on, to the bit: weights, rows, how they are
packed, device, threads, this package's code and the libraries'. One that can't be read or kept is done without.
Knows files; knows nothing about adapters or figures.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lora_cli
from lora_cli.data.cache import cache_folder, key_of, tokenizer_fingerprint
from lora_cli.data.examples import Examples
from lora_cli.engine.generation import Generated
from lora_cli.evaluate.bench import Bench, Observed
from lora_cli.evaluate.models import Loaded
from lora_cli.evaluate.scoring import RowScores
from lora_cli.model.fingerprint import weights_fingerprint

_KEPT = 64
"""Entries; the oldest go first."""
_ROOMS = ("engine", "evaluate", "model", "data")
_LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes")


def recall(bench: Bench, loaded: Loaded) -> Observed | None:
    """What this base made of these rows, if it was asked before and its run's config allows a cache."""
    if not loaded.config.data.cache:
        return None
    try:
        with np.load(io.BytesIO(_place(bench, loaded).read_bytes())) as entry:
            answers = json.loads(entry["answers"].tobytes())
            losses = entry["choice_losses"] if "choice_losses" in entry.files else None
            return Observed(
                RowScores(entry["loss"], entry["correct"]),
                [Generated(tuple(one["token_ids"]), one["text"], one["stop_reason"]) for one in answers],
                losses,
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none, or damaged
        return None


def remember(bench: Bench, loaded: Loaded, observed: Observed) -> None:
    """Keep what the base made of the rows, where a cache is allowed and its folder can be written."""
    if not loaded.config.data.cache:
        return
    answers = json.dumps([asdict(answer) for answer in observed.answers]).encode()
    arrays: dict[str, Any] = {"loss": observed.scores.loss, "correct": observed.scores.correct}
    if observed.choice_losses is not None:
        arrays["choice_losses"] = observed.choice_losses
    content = io.BytesIO()
    np.savez(content, answers=np.frombuffer(answers, dtype=np.uint8), **arrays)
    place = _place(bench, loaded)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=".writing-")
        try:
            with open(descriptor, "wb") as file:
                file.write(content.getvalue())
            os.replace(temporary, place)
        finally:
            Path(temporary).unlink(missing_ok=True)
        by_age = sorted(place.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-_KEPT]:
            path.unlink(missing_ok=True)
    except OSError:
        return


def _place(bench: Bench, loaded: Loaded) -> Path:
    model = loaded.config.model
    folder = Path(model.name_or_path).expanduser()
    key = key_of(
        {
            "base": _weights(folder) if folder.is_dir() else getattr(loaded.base.config, "_commit_hash", None),
            "config": loaded.base.config.to_json_string(use_diff=False),
            "model": model.model_dump(mode="json"),
            "computation": [loaded.computation.packing, loaded.computation.loss, loaded.computation.attention],
            "dtype": str(loaded.computation.dtype),
            "micro_batch_tokens": loaded.micro_batch_tokens,
            "device": [loaded.device.type, _device_name(loaded.device), torch.get_num_threads()],
            "rows": _content(bench.rows.examples),
            "ballot": None if bench.ballot is None else _content(bench.ballot.examples),
            "prompts": [question.prompt_ids for question in bench.asked],
            "sampling": asdict(bench.sampling) if bench.asked else None,
            "tokenizer": tokenizer_fingerprint(bench.reader.tokenizer),
            "stops": sorted(bench.reader.stop_token_ids),
            "code": _code(),
        }
    )
    return cache_folder().parent / "evaluated" / f"{key}.npz"


def _weights(folder: Path) -> list[Any]:
    """Samples of the weights, and when their files were written: a change between the samples mustn't go unseen."""
    return [weights_fingerprint(folder), *(path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors")))]


def _content(examples: Examples) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(examples.offsets, dtype="<i8").tobytes(), digest_size=16)
    for index in range(len(examples)):
        example = examples.example(index)
        digest.update(example.input_ids.tobytes())
        digest.update(example.trained.tobytes())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the code that a score depends on."""
    digest = hashlib.blake2b(digest_size=16)
    package = Path(lora_cli.__file__).parent
    for path in sorted(path for room in _ROOMS for path in (package / room).rglob("*.py")):
        digest.update(path.read_bytes())
    for library in _LIBRARIES:
        digest.update(version(library).encode())
    return digest.hexdigest()
