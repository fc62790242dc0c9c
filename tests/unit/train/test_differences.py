"""What may change when a run is resumed."""

from __future__ import annotations

import pytest

from lora_cli.config import load_config
from lora_cli.config.contradictions import contradictions
from lora_cli.config.resolved import dump_config
from lora_cli.errors import RunFolderError
from lora_cli.runs.folder import RunFolder
from lora_cli.train.differences import HARMLESS, refuse_differences

MINIMAL = "model: {name_or_path: org/name}\ndata: {train: a.jsonl}\noutput_dir: run\n"


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """The config that a run goes on with: started with some overrides, resumed with others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(MINIMAL)

    def compared(started=(), resumed=()):
        (tmp_path / "config.yaml").write_text(dump_config(load_config("run.yaml", started)))
        before = load_config(tmp_path / "config.yaml")
        return refuse_differences(before, load_config("run.yaml", resumed), RunFolder(tmp_path / "run"))

    return compared


def test_the_same_config_passes_and_stays_what_it_was(compare):
    resolved = ["model.dtype=float32", "train.micro_batch_tokens=512", "train.gradient_checkpointing=false"]
    config = compare(resolved)
    assert (config.model.dtype, config.train.micro_batch_tokens) == ("float32", 512)
    assert config.train.gradient_checkpointing is False, "what is auto was settled at the start"


def test_every_difference_is_named_with_both_values(compare):
    with pytest.raises(RunFolderError, match="3 settings that matter") as error:
        compare((), ["train.seed=1", "adapter.r=4", "adapter.lora_alpha=8"])
    lines = error.value.remedy.splitlines()
    assert lines[:3] == [
        "adapter.lora_alpha: 32 there, 8 now",
        "adapter.r: 16 there, 4 now",
        "train.seed: 42 there, 1 now",
    ]


def test_null_and_a_section_are_compared(compare):
    with pytest.raises(RunFolderError) as error:
        compare((), ["adapter=null"])
    assert "adapter.r: 16 there" in error.value.remedy
    with pytest.raises(RunFolderError, match="matter"):
        compare((), ["model.quantization={type: nf4}"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.logging_steps", 3),
        ("train.save_steps", 7),
        ("train.save_minutes", 2.0),
        ("train.save_total_limit", 5),
        ("train.max_steps", 900),
        ("train.num_train_epochs", 9.0),
        ("train.micro_batch_tokens", 64),
        ("train.gradient_checkpointing", True),
        ("train.activation_offloading", True),
    ],
)
def test_what_changes_no_step_is_taken_over(compare, key, value):
    assert key in HARMLESS
    config = compare(["train.micro_batch_tokens=512"], [f"{key}={value}"])
    assert getattr(config.train, key.removeprefix("train.")) == value


def test_what_is_offloaded_from_now_on_is_checkpointed(compare):
    config = compare(["train.gradient_checkpointing=false"], ["train.activation_offloading=true"])
    assert config.train.gradient_checkpointing is True
    assert compare(["train.gradient_checkpointing=true"]).train.gradient_checkpointing is True


def test_what_is_no_longer_checkpointed_is_no_longer_offloaded(compare):
    """Together they are a contradiction: the run's own config.yaml could not be read again."""
    settled = ["train.gradient_checkpointing=true", "train.activation_offloading=true"]
    config = compare(settled, ["train.gradient_checkpointing=false"])
    assert (config.train.gradient_checkpointing, config.train.activation_offloading) == (False, False)
    assert not list(contradictions(config))
    assert compare(settled).train.activation_offloading is True


@pytest.mark.parametrize(
    ("settled", "wish"),
    [
        ("train.loss=full", "train.loss=chunked"),
        ("model.attn_implementation=sdpa", "model.attn_implementation=documents"),
    ],
)
def test_a_wish_that_the_model_could_not_meet_is_no_difference(compare, settled, wish):
    assert compare([settled], [wish]).model_dump() == compare([settled], [settled]).model_dump()
    with pytest.raises(RunFolderError):
        compare([wish], [settled])


def test_relative_and_absolute_paths_are_the_same(compare, tmp_path):
    assert compare((), [f"data.train={tmp_path / 'a.jsonl'}"]).data.train[0].path == str(tmp_path / "a.jsonl")
