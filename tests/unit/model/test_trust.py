"""What others made, refused by name before a library opens it; what is harmless passes."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_cli.errors import ModelError
from lora_cli.model.trust import (
    refuse_adapter_settings,
    refuse_config_settings,
    refuse_disguised,
    refuse_links_out,
    refuse_shard_names,
    refuse_special_files,
)

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}


def test_a_pipe_is_refused_without_being_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refuse_special_files(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a named pipe"):
        refuse_special_files(tmp_path)


def test_links_out_are_refused_and_those_of_the_hub_cache_are_not(tmp_path):
    blob = tmp_path / "models--a" / "blobs" / "0123"
    snapshot = tmp_path / "models--a" / "snapshots" / "abcd"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(blob)
    refuse_links_out(snapshot)
    elsewhere = tmp_path / "model"
    elsewhere.mkdir()
    (elsewhere / "inner").symlink_to(elsewhere)
    refuse_links_out(elsewhere)
    (elsewhere / "config.json").symlink_to(blob)
    with pytest.raises(ModelError, match=r"links to .*0123"):
        refuse_links_out(elsewhere)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"transformers_weights": "../../w.safetensors"}, "transformers_weights"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"_attn_implementation": {"": "someone/kernel:f"}}, "_attn_implementation"),
    ],
)
def test_a_config_that_leads_elsewhere(tmp_path, content, named):
    refuse_config_settings({"model_type": "gpt2", "attn_implementation": "sdpa"}, tmp_path / "config.json")
    with pytest.raises(ModelError, match=named):
        refuse_config_settings(content, tmp_path / "config.json")


def test_an_adapter_beside_the_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter beside the model"):
        refuse_config_settings({}, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"corda_config": {"cache_file": "x"}}, "corda_config"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"auto_mapping": {"parent_library": "evil"}}, "evil"),
    ],
)
def test_an_adapter_that_does_more_than_describe_a_lora(tmp_path, changes, named):
    refuse_adapter_settings(PLAIN | {"init_lora_weights": True, "auto_mapping": None}, tmp_path)
    refuse_adapter_settings(PLAIN | {"auto_mapping": {"parent_library": "transformers.models.gpt2"}}, tmp_path)
    with pytest.raises(ModelError, match=named):
        refuse_adapter_settings({**PLAIN, **changes}, tmp_path)


@pytest.mark.parametrize("settings", [None, [], "LORA", 3])
def test_an_adapter_config_that_is_no_object(tmp_path, settings):
    with pytest.raises(ModelError, match="JSON object"):
        refuse_adapter_settings(settings, tmp_path)


def test_weights_that_are_what_they_say_pass(tmp_path):
    for name, tensors in (("a", {"w": torch.zeros(3)}), ("b", {f"w{n}": torch.zeros(1) for n in range(400)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        refuse_disguised(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_under_another_name(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"w": [1.0] * 9}, protocol))
    with pytest.raises(ModelError, match="a pickle"):
        refuse_disguised(path)


def test_a_header_whose_length_begins_like_a_pickle_passes(tmp_path):
    """The first byte is the length's lowest: 0x80 there is chance."""
    header = json.dumps({"__metadata__": {"x": ""}}).encode()
    header += b" " * (-len(header) % 128)
    assert len(header) == 128
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refuse_disguised(path)


@given(st.binary(max_size=64))
def test_whatever_is_no_safetensors_file_is_refused(tmp_path_factory, content):
    path: Path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8:
        return
    with pytest.raises(ModelError, match="safetensors"):
        refuse_disguised(path)


@pytest.mark.parametrize("name", ["/etc/a.safetensors", "../a.safetensors", "a/../../b.safetensors", "a.bin", 3, None])
def test_shards_out_of_the_folder_or_of_another_kind(tmp_path, name):
    refuse_shard_names(["a-1.safetensors", "sub/a-2.safetensors"], tmp_path)
    with pytest.raises(ModelError, match="as a shard"):
        refuse_shard_names(["a-1.safetensors", name], tmp_path)
