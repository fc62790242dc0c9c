"""Whole runs on a CPU: a tiny GPT-2, a few ragged rows, no network."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import lora_cli
from lora_cli import load_config
from lora_cli.cli import main
from lora_cli.config import Config
from lora_cli.report.events import Event, Stepped, Summary, Warned
from lora_cli.train import results, train
from lora_cli.train import run as run_module
from tests.integration.adapters import make_adapter

ROOT = Path(lora_cli.__file__).parents[1]
TRAIN_ROWS, HELDOUT_ROWS = 41, 6
"""With batches of 8, the last step of an epoch has a single example."""

VOLATILE = ("tokens_per_second", "peak_memory_bytes")
"""What differs between two runs that are otherwise equal to the bit."""


@dataclass
class Run:
    """A run that is over, and what it said."""

    folder: Path
    summary: Summary
    events: list[Event] = field(default_factory=list)
    model: Any = None
    """The live model, adapter and all, as training left it."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def training_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if "eval_loss" in line]

    @property
    def stable_metrics(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in VOLATILE} for line in self.metrics]

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [event.loss for event in self.events if isinstance(event, Stepped)]

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Warned)]

    @property
    def adapter_bytes(self) -> bytes:
        return adapter_bytes(self.folder)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@contextmanager
def scripts() -> Iterator[None]:
    """Within it, what stands in scripts/ can be imported."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 40,000 random parameters, with tokenizer and chat template."""
    with scripts():
        from proofs.tiny import make_model
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A Llama of 30,000 random parameters, whose layers run fused, with the tokenizer of the tiny GPT-2."""
    with scripts():
        from proofs.tiny import make_llama
    return make_llama(tmp_path_factory.mktemp("models") / "llama", tiny)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and heldout.jsonl: conversations of one to three turns."""
    folder = tmp_path_factory.mktemp("rows")
    random = Random(0)
    words = "the rent is due on a day of may when we met at noon and it rained all over town".split()  # noqa: SIM905

    def said(most: int) -> str:
        return " ".join(random.choices(words, k=random.randint(1, most)))

    def conversation() -> str:
        turns = range(random.randint(1, 3))
        pairs = [({"role": "user", "content": said(8)}, {"role": "assistant", "content": said(5)}) for _ in turns]
        return json.dumps({"messages": [message for pair in pairs for message in pair]}) + "\n"

    (folder / "train.jsonl").write_text("".join(conversation() for _ in range(TRAIN_ROWS)))
    (folder / "heldout.jsonl").write_text("".join(conversation() for _ in range(HELDOUT_ROWS)))
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Samples of a few tokens, a cache of its own, and one thread, on which bits depend."""
    monkeypatch.setattr(results, "SAMPLE_TOKENS", 4)
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def write_config(tiny: Path, rows: Path) -> Callable[..., Path]:
    """Write a small config into a folder, with sections changed; its path."""

    def write(folder: Path, **sections: Any) -> Path:
        config: dict[str, Any] = {
            "model": {"name_or_path": str(tiny), "dtype": "float32"},
            "data": {"train": str(rows / "train.jsonl"), "max_length": 128, "cache": False},
            "train": {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 3},
            "output_dir": str(folder / "run"),
        }
        for name, value in sections.items():
            merge = isinstance(value, dict) and isinstance(config.get(name), dict)
            config[name] = {**config[name], **value} if merge else value
        path = folder / "tiny.yaml"
        path.write_text(json.dumps(config, indent=2))
        return path

    return write


@pytest.fixture
def config_file(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    """tiny.yaml; its output_dir is `run` beside it."""
    return write_config(tmp_path)


@pytest.fixture
def settings(config_file: Path) -> Callable[..., Config]:
    """The config of tiny.yaml, with overrides as `--set` takes them."""
    return lambda *overrides: load_config(config_file, overrides)


@pytest.fixture
def trained(settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Train tiny.yaml with overrides."""
    models: list[Any] = []
    make_trainable = run_module.make_trainable

    def and_keep(*arguments: Any) -> Any:
        models.append(make_trainable(*arguments))
        return models[-1]

    monkeypatch.setattr(run_module, "make_trainable", and_keep)

    def start(*overrides: str, resume: bool = False, emit: Callable[[Event], None] | None = None) -> Run:
        config = settings(*overrides)
        events: list[Event] = []

        def hear(event: Event) -> None:
            events.append(event)
            if emit is not None:
                emit(event)

        summary = train(config, resume=resume, emit=hear)
        return Run(Path(config.output_dir), summary, events, models[-1] if models else None)

    return start


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `lora ARGUMENTS` in this process: exit code, stdout, stderr."""

    def run(*arguments: str | os.PathLike[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], tiny: Path, rows: Path) -> Path:
    """A run folder with an adapter of random weights, as if trained with the held-out rows as validation."""
    folder = tmp_path_factory.mktemp("judged")
    config = write_config(folder, data={"validation": str(rows / "heldout.jsonl")})
    make_adapter(folder / "run" / "adapter", tiny, scale=0.3)
    shutil.copy(config, folder / "run" / "config.yaml")
    return folder / "run"


@pytest.fixture
def judged_copy(judged: Path, tmp_path: Path) -> Path:
    """The same, to be written into."""
    return Path(shutil.copytree(judged, tmp_path / "copied"))
