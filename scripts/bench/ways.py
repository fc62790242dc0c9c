"""The ways to train: each a command line in an environment of its own, and how its output tells of a step."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.world import ALPHA, LEARNING_RATE, LONGEST, RANK, ROWS_PER_STEP, SEED, Facts, lora_settings

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    says: str
    """What it is, for the table."""
    command: Callable[[Path, Facts, int | None], list[str]]
    """Of the world's folder, its facts, and the steps to stop after (None: an epoch)."""
    loss_in: re.Pattern[str]
    """Finds the loss in a line that tells of a step."""
    dtype: str = "float32"
    environment: str = "lora"
    """Whose Python runs it: `lora` is this one, any other is given by a flag."""
    same_steps: bool = False
    """Whether its rows, their order and the first weights are those of `lora`, so that every loss must agree."""
    metrics: str | None = None
    """A file of the world's folder with a line of JSON for each step, which has the losses in full."""


def _lora(dtype: str, *settings: str) -> Callable[[Path, Facts, int | None], list[str]]:
    def command(folder: Path, facts: Facts, steps: int | None) -> list[str]:
        config = folder / f"lora-{dtype}.json"
        config.write_text(json.dumps(lora_settings(folder, dtype, f"lora-{dtype}")), encoding="utf-8")
        stop = [] if steps is None else ["--set", f"train.max_steps={steps}"]
        more = [part for setting in settings for part in ("--set", setting)]
        return [sys.executable, "-m", "lora_cli", "train", str(config), *more, *stop]

    return command


def _padded(way: str) -> Callable[[Path, Facts, int | None], list[str]]:
    def command(folder: Path, facts: Facts, steps: int | None) -> list[str]:
        return ["python", str(HERE / "padded.py"), way, str(folder), *([] if steps is None else [str(steps)])]

    return command


def _trl(*settings: str, packed: bool = False) -> Callable[[Path, Facts, int | None], list[str]]:
    def command(folder: Path, facts: Facts, steps: int | None) -> list[str]:
        # As many tokens in a step as the others have: packed rows are full.
        rows = max(1, round(ROWS_PER_STEP * facts.tokens / facts.rows / LONGEST)) if packed else ROWS_PER_STEP
        arguments = {
            "model_name_or_path": folder / "model",
            "dataset_name": folder / "data",
            "output_dir": folder / "runs" / "trl",
            "use_peft": "true",
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "lora_target_modules": "all-linear",
            "max_length": LONGEST,
            "assistant_only_loss": "true",
            "per_device_train_batch_size": rows,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 1,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "seed": SEED,
            "use_cpu": "true",
            "disable_tqdm": "true",
        } | ({} if steps is None else {"max_steps": steps})
        pairs = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        return ["trl", "sft", *pairs, *(["--packing", "true"] if packed else []), *settings]

    return command


def _llama_factory(folder: Path, facts: Facts, steps: int | None) -> list[str]:
    described = {
        "file_name": "train.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"bench": described}), encoding="utf-8")
    settings = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_target": "all",
        "dataset_dir": str(folder / "data"),
        "dataset": "bench",
        "template": "chatml",
        "cutoff_len": LONGEST,
        "output_dir": str(folder / "runs" / "llama-factory"),
        "per_device_train_batch_size": ROWS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "use_cpu": True,
        "disable_tqdm": True,
    } | ({} if steps is None else {"max_steps": steps})
    config = folder / "llama-factory.yaml"  # JSON is YAML; files of that name it doesn't read
    config.write_text(json.dumps(settings), encoding="utf-8")
    return ["llamafactory-cli", "train", str(config)]


_TRAINER_LINE = re.compile(r"'loss': '?([0-9.]+)")
_LORA_LINE = re.compile(r"\bloss=([0-9.]+)")
_JSON_LINE = re.compile(r'"loss": ([0-9.]+)')
_METRICS = "runs/lora-{}/metrics.jsonl"
_FLOAT32 = ("--dtype", "float32", "--bf16", "false")

WAYS: Sequence[Way] = (
    Way("lora", "lora train", _lora("float32"), _LORA_LINE, same_steps=True, metrics=_METRICS.format("float32")),
    Way(
        "lora-unfused",
        "lora train, train.fused: false",
        _lora("float32", "train.fused=false"),
        _LORA_LINE,
        same_steps=True,
        metrics=_METRICS.format("float32"),
    ),
    Way("loop", "plain padded loop", _padded("loop"), _JSON_LINE, same_steps=True),
    Way("trainer", "transformers' Trainer + PEFT", _padded("trainer"), _JSON_LINE, same_steps=True),
    Way("trl", "TRL's `trl sft`", _trl(*_FLOAT32), _TRAINER_LINE, environment="trl"),
    Way(
        "trl-packed",
        "TRL's `trl sft --packing`",
        _trl(*_FLOAT32, packed=True),
        _TRAINER_LINE,
        environment="trl",
    ),
    Way("llama-factory", "LLaMA-Factory", _llama_factory, _TRAINER_LINE, environment="llama_factory"),
    Way(
        "lora-bf16",
        "lora train, bfloat16",
        _lora("bfloat16"),
        _LORA_LINE,
        dtype="bfloat16",
        metrics=_METRICS.format("bfloat16"),
    ),
    Way("trl-bf16", "TRL's `trl sft`, its own bf16", _trl(), _TRAINER_LINE, dtype="bfloat16", environment="trl"),
)
