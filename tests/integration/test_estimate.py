"""`lora estimate-vram` on a folder that holds a config.json alone: no weights, no tokenizer, no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.cli import main
from tests.unit.estimate.models import tiny_architecture


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_architecture("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{name_or_path: {tmp_path / 'model'}}}\n"
        "data: {train: nowhere.jsonl, max_length: 64}\n"
        "train: {micro_batch_tokens: 256}\n"
        f"output_dir: {tmp_path / 'run'}\n",
        encoding="utf-8",
    )
    return path


def lora(*arguments: str) -> int:
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["lora", *arguments]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_json_on_stdout_and_nothing_is_written(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert sum(printed["components"].values()) == printed["process_bytes"]
    assert printed["micro_batch_tokens"] == 256
    assert not (config.parent / "run").exists()


def test_a_card_without_room_exits_3_and_says_so_first(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--vram", "0.3") == 3
    assert capfd.readouterr().out.lstrip().startswith("no ")


def test_an_unknown_card_exits_2_with_an_empty_stdout(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora("estimate-vram", str(config), "--gpu", "rtx-9999") == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Did you mean" in captured.err or "Known:" in captured.err
