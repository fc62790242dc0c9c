"""`lora export`: what a run becomes for llama.cpp, Ollama and vLLM, by the command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_cli.merge import merge
from tests.integration.conftest import Run

gguf = pytest.importorskip("gguf")

Lora = Callable[..., tuple[int, str, str]]


@pytest.fixture
def merged(trained: Callable[..., Run], tmp_path: Path) -> Path:
    merge([str(trained().folder)], tmp_path / "merged", verify=False)
    return tmp_path / "merged"


def test_a_merged_run_as_gguf(merged: Path, lora: Lora, tmp_path: Path) -> None:
    code, out, err = lora("export", merged, "--to", "gguf", "--output", tmp_path / "tiny.gguf", "--json")
    assert code == 0, err
    found = json.loads(out)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert (found["architecture"], found["tensors"]) == ("gpt2", len(reader.tensors))
    assert found["num_bytes"] == (tmp_path / "tiny.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    code, out, err = lora("export", merged, "--to", "gguf", "--output", tmp_path / "tiny.gguf")
    assert (code, out) == (2, "")
    assert "is taken" in err


def test_a_merged_run_for_ollama(merged: Path, lora: Lora, tmp_path: Path) -> None:
    code, out, err = lora("export", merged, "--to", "ollama", "--output", tmp_path / "ollama")
    assert code == 0, err
    assert "ollama create" in out
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    weights = re.match(r"FROM \./(.+)\n", text)
    assert weights is not None and (tmp_path / "ollama" / weights[1]).is_file()
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert text.count('"""') == 2


def test_an_adapter_as_gguf_and_for_vllm(trained: Callable[..., Run], lora: Lora, tiny: Path, tmp_path: Path) -> None:
    run = trained("adapter.r=20")
    code, out, err = lora("export", run.folder, "--to", "gguf", "--output", tmp_path / "adapter.gguf", "--json")
    assert code == 0, err
    assert json.loads(out)["what"] == "adapter"
    assert gguf.GGUFReader(tmp_path / "adapter.gguf").fields["adapter.type"].contents() == "lora"
    code, out, err = lora("export", run.folder, "--to", "vllm", "--json")
    assert code == 0, err
    words = json.loads(out)["command"]
    assert words[:3] == ["vllm", "serve", str(tiny)]
    assert f"run={run.folder / 'adapter'}" in words
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert Path(words[words.index("--chat-template") + 1]).is_file()
    code, out, err = lora("export", run.folder, "--to", "vllm")
    assert shlex.split(out.replace("serve    vllm", "vllm").replace("\\\n", " ")) == words
    code, out, err = lora("export", run.folder, "--to", "ollama", "--output", tmp_path / "ollama")
    assert (code, out) == (2, "")
    assert "lora merge" in err


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("adapter.use_dora=true", "use_dora"),
        ("adapter.modules_to_save=[ln_f]", "modules_to_save"),
        ("adapter.rank_pattern={c_attn: 2}", "rank_pattern"),
    ],
)
def test_what_vllm_refuses_is_said_beforehand(trained: Callable[..., Run], lora: Lora, setting: str, word: str) -> None:
    run = trained(setting, "train.max_steps=1")
    code, out, err = lora("export", run.folder, "--to", "vllm")
    assert (code, out) == (2, "")
    assert word in err and "Traceback" not in err


def test_a_broken_model_leaves_no_file(merged: Path, lora: Lora, tmp_path: Path) -> None:
    file = merged / "model.safetensors"
    save_file({name: tensor * 1e6 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    command = ("export", merged, "--to", "gguf", "--type", "f16", "--output", tmp_path / "tiny.gguf")
    code, out, err = lora(*command)
    assert (code, out) == (2, "")
    assert "doesn't fit float16" in err
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 10)
    code, out, err = lora(*command)
    assert (code, out) == (2, "")
    assert "promises" in err
