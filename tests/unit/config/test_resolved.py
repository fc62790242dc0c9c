from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lora_cli.config import Config, dump_config, load_config, starter_config
from lora_cli.config.resolved import with_absolute_paths

NAMES = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() and not text.startswith("~"))
TRAIN = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-30, 1e30),
        "adam_epsilon": st.floats(1e-300, 1.0, exclude_min=True),
        "seed": st.integers(0, 2**32 - 1),
        "max_steps": st.none() | st.integers(1, 10**9),
        "warmup_steps": st.integers(0, 10**6) | st.floats(0, 1, exclude_max=True),
        "report_to": st.lists(st.sampled_from(["wandb", "mlflow"]), unique=True),
        "gradient_checkpointing": st.sampled_from(["auto", True, False]),
    },
)
DATA = st.fixed_dictionaries(
    {"train": NAMES | st.lists(NAMES, min_size=1, max_size=3)},
    optional={
        "validation": st.floats(0, 1, exclude_min=True, exclude_max=True) | NAMES,
        "columns": st.dictionaries(NAMES, NAMES, max_size=2),
    },
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, train=TRAIN, data=DATA)
def test_the_resolved_file_loads_to_the_same_config(tmp_path, name: str, train: dict[str, Any], data: dict[str, Any]):
    config = Config.model_validate({"model": {"name_or_path": name}, "data": data, "train": train, "output_dir": name})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == with_absolute_paths(config)


def test_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "here").write_text("x")
    config = Config.model_validate(
        {
            "model": {"name_or_path": "model"},
            "adapter": {"path": "../adapter"},
            "data": {
                "train": ["data/a.jsonl", "here", "org/data"],
                "validation": "b.csv",
                "chat_template": "t.jinja",
            },
            "output_dir": "runs/a",
        }
    )
    there = with_absolute_paths(config)
    assert there.model.name_or_path == str(tmp_path / "model")
    assert there.adapter is not None and there.adapter.path == str(tmp_path / ".." / "adapter")
    paths = [source.path for source in there.data.train]
    assert paths == [str(tmp_path / "data/a.jsonl"), str(tmp_path / "here"), "org/data"]
    assert there.data.validation[0].path == str(tmp_path / "b.csv")
    assert (there.data.chat_template, there.output_dir) == (
        str(tmp_path / "t.jinja"),
        str(tmp_path / "runs/a"),
    )


def test_the_resolved_file_says_everything(tmp_path):
    config = Config.model_validate({"model": {"name_or_path": "a"}, "data": {"train": "b"}, "output_dir": "c"})
    written = YAML(typ="safe", pure=True).load(dump_config(config))
    for section in ("model", "adapter", "data", "train"):
        assert list(written[section]) == list(type(getattr(config, section)).model_fields)


def test_a_secret_that_got_in_does_not_get_out():
    token = "hf_" + "a1B2" * 8
    config = Config.model_validate({"model": {"name_or_path": token}, "data": {"train": "b"}, "output_dir": "c"})
    assert token not in dump_config(config)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=NAMES, data=NAMES, quantization=st.sampled_from([None, "nf4", "int8"]))
def test_the_starter_loads_and_holds_what_was_asked(tmp_path, model, data, quantization):
    file = tmp_path / "lora.yaml"
    file.write_text(starter_config(model, data, "runs/x", quantization=quantization), encoding="utf-8")
    config = load_config(file)
    assert config.model.name_or_path == model
    assert config.data.train[0].path == data
    assert (config.model.quantization.type if config.model.quantization else None) == quantization


def test_the_starter_changes_no_default(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text(starter_config("gpt2", "a.jsonl", "runs/x"))
    sparse = {"model": {"name_or_path": "gpt2"}, "data": {"train": "a.jsonl"}, "output_dir": "runs/x"}
    assert load_config(file) == Config.model_validate(sparse)
    assert max(map(len, file.read_text().splitlines())) <= 110
    assert all("#" in line for line in file.read_text().splitlines() if line)


@pytest.mark.parametrize("word", ["null", "true", "3", "1e5", "a: b", "# x", "[a]", "no", "2024-01-01"])
def test_the_starter_keeps_text_text(tmp_path, word):
    file = tmp_path / "lora.yaml"
    file.write_text(starter_config(word, word, "runs/x"))
    assert load_config(file).model.name_or_path == word
