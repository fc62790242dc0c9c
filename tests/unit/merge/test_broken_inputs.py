"""Inputs that must not become a model: each is named, and nothing has the name asked for."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.errors import UserError
from lora_cli.merge import merge
from lora_cli.merge import shards as shards_module
from lora_cli.model.fingerprint import weights_fingerprint
from tests.unit.merge.tiny import CONFIGS, save_adapter, save_base

Tensors = dict[str, torch.Tensor]


def spoiled(value: float, where: str) -> Callable[[Tensors], Tensors]:
    """Tensors whose name holds `where`, filled with a number that isn't one."""
    return lambda saved: {name: torch.full_like(t, value) if where in name else t for name, t in saved.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", "llama", torch.float32, max_shard_size="20KB")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])


def refused(adapter: Path, output: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        merge([str(adapter)], output, verify=False)
    for word in words:
        assert word in str(caught.value), caught.value
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.endswith(".partial")]


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file)


def point_to(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))


def test_base_of_another_size(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIGS["llama"], "intermediate_size", 64)
    point_to(adapter, save_base(tmp_path / "other", "llama", torch.float32))
    refused(adapter, tmp_path / "merged", "down_proj", "another size")


def test_base_of_another_architecture(adapter: Path, tmp_path: Path) -> None:
    point_to(adapter, save_base(tmp_path / "other", "gpt2", torch.float32))
    refused(adapter, tmp_path / "merged", "GPT2LMHeadModel")


def test_adapter_for_layers_that_the_base_lacks(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIGS["llama"], "num_hidden_layers", 1)
    point_to(adapter, save_base(tmp_path / "other", "llama", torch.float32))
    refused(adapter, tmp_path / "merged", "4 of 8 tensors fit no module", "layers.1")


def test_renamed_keys(adapter: Path, tmp_path: Path) -> None:
    rewrite(
        adapter / "adapter_model.safetensors",
        lambda saved: {name.replace("q_proj", "query"): value for name, value in saved.items()},
    )
    refused(adapter, tmp_path / "merged", "4 of 8 tensors fit no module", "query")


def test_a_tensor_too_few(adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter / "adapter_model.safetensors", lambda saved: dict(list(saved.items())[1:]))
    refused(adapter, tmp_path / "merged", "lacks model.layers.0.mlp.down_proj.lora_A")


def test_nan_in_the_adapter(adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter / "adapter_model.safetensors", spoiled(torch.nan, "1.self_attn.q_proj.lora_B"))
    refused(adapter, tmp_path / "merged", "layers.1.self_attn.q_proj.lora_B.weight holds NaN")


def test_nan_in_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    for file in base.glob("*.safetensors"):
        rewrite(file, spoiled(torch.inf, "0.self_attn.q_proj"))
    refused(adapter, tmp_path / "merged", "layers.0.self_attn.q_proj.weight: the base holds NaN or infinity")


def test_values_that_float16_lacks(adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter / "adapter_model.safetensors", lambda saved: {n: v * 1e3 for n, v in saved.items()})
    with pytest.raises(UserError, match="doesn't fit float16"):
        merge([str(adapter)], tmp_path / "merged", verify=False, dtype="float16")


def test_truncated_shard(base: Path, adapter: Path, tmp_path: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    refused(adapter, tmp_path / "merged", shard.name, "promises")


def test_missing_shard(base: Path, adapter: Path, tmp_path: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    refused(adapter, tmp_path / "merged", shard.name, "missing")


def test_tensor_in_two_shards(base: Path, adapter: Path, tmp_path: Path) -> None:
    one, two = sorted(base.glob("*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    rewrite(two, lambda saved: {**saved, name: load_file(one)[name]})
    refused(adapter, tmp_path / "merged", name, one.name, two.name)


def test_another_base_than_the_one_saved_beside_the_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    point_to(adapter, save_base(tmp_path / "other", "llama", torch.bfloat16, seed=7))
    refused(adapter, tmp_path / "merged", "model.embed_tokens.weight differs")


def test_fingerprint_tells_two_bases_of_one_shape_apart(tmp_path: Path) -> None:
    one = save_base(tmp_path / "one", "llama", torch.bfloat16)
    other = save_base(tmp_path / "other", "llama", torch.bfloat16, seed=7)
    again = save_base(tmp_path / "again", "llama", torch.bfloat16)
    assert weights_fingerprint(one) == weights_fingerprint(again) != weights_fingerprint(other)


def test_initialization_that_changed_the_base(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    refused(adapter, tmp_path / "merged", "'pissa' takes a part out of the base")


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range"])
def test_disk_full_half_way(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    calls = 0

    def until_full(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real(*arguments))

    real = getattr(os, call)
    monkeypatch.setattr(shards_module.os, call, until_full)
    refused(adapter, tmp_path / "merged", "the disk is full")
    assert calls > 3


def test_where_the_kernel_cannot_copy_the_bytes_are_the_same(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    merge([str(adapter)], tmp_path / "one", verify=False)
    monkeypatch.setattr(shards_module.os, "copy_file_range", unable)
    merge([str(adapter)], tmp_path / "two", verify=False)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_too_little_room_is_said_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    refused(adapter, tmp_path / "merged", "1,000 bytes left")


def test_killed_half_way_leaves_nothing_under_the_name(adapter: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from lora_cli.merge import merge
from lora_cli.report.events import Working

def die(event):
    if isinstance(event, Working) and event.what == "merging" and event.done > event.total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

merge([{str(adapter)!r}], Path({str(tmp_path / "merged")!r}), verify=False, emit=die)
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    merge([str(adapter)], tmp_path / "merged", verify=False)
    assert (tmp_path / "merged" / "config.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_a_taken_name_is_left_alone(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is taken"):
        merge([str(adapter)], tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]
