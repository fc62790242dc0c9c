"""Every config that is shipped: it loads, says how it is run, and its editor schema is current."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.config import config_schema, load_config

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def test_the_promised_configs_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "llama-3.1-8b-lora",
        "llama-3.1-8b-qlora",
        "llama-3.1-70b-qlora",
        "qwen2.5-7b-lora",
        "qwen3-8b-qlora",
        "mistral-7b-qlora",
        "gpt2-lora",
        "demo-lora",
        "demo-qlora",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_opens_with_its_command(path):
    config = load_config(path)
    lines = path.read_text().splitlines()
    assert lines[0] == f"# lora train configs/{path.name}"
    assert lines[1] == "# yaml-language-server: $schema=schema.json"
    assert ("qlora" in path.stem) == (config.model.quantization is not None)
    assert path.stem.split("-")[0] in (config.output_dir + config.model.name_or_path).lower()


def test_no_two_configs_write_to_the_same_folder():
    folders = [load_config(path).output_dir for path in CONFIGS]
    assert len(folders) == len(set(folders))


def test_the_checked_in_schema_is_current():
    written = json.loads((FOLDER / "schema.json").read_text())
    assert written == config_schema(), "lora schema > configs/schema.json"
