"""What a plan says before the run, and that the live model is held to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cli.config import AdapterConfig, Config, DataConfig, ModelConfig, Source, TrainConfig
from lora_cli.engine.planning import check_against_plan, largest_dropout, make_plan
from lora_cli.errors import ModelError
from lora_cli.model.adapter import attach_adapter
from tests.unit.engine.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 with a tokenizer of a few words, and a file of rows."""
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "one", "two", "three"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three"}\n' * 5)
    return tmp_path


def config(folder: Path, *, max_length: int = 64, **adapter: Any) -> Config:
    return Config(
        model=ModelConfig(name_or_path=str(folder / "model"), dtype="float32"),
        adapter=AdapterConfig(r=4, target_modules=("c_attn",), **adapter),
        data=DataConfig(train=(Source(path=str(folder / "rows.jsonl")),), max_length=max_length, cache=False),
        train=TrainConfig(batch_size=2, num_train_epochs=2),
        output_dir=str(folder / "run"),
    )


def test_a_plan_counts_steps_and_parameters_and_writes_nothing(folder: Path) -> None:
    plan = make_plan(config(folder))
    assert (plan.steps.per_epoch, plan.steps.total, plan.steps.warmup) == (3, 6, 1)
    assert plan.parameters.trainable == 2 * 4 * (32 + 96)
    assert (plan.engine.packing, plan.engine.loss, plan.engine.notes) == ("documents", "chunked", ())
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("dropout", "warned"), [(0.0, False), (0.125, True)])
def test_active_dropout_is_said(folder: Path, dropout: float, warned: bool) -> None:
    """With it, losses depend on how rows are packed."""
    plan = make_plan(config(folder, lora_dropout=dropout))
    assert plan.engine.dropout == dropout
    assert any("dropout 0.125" in warning for warning in plan.warnings) == warned


def test_the_models_own_dropout_counts() -> None:
    assert largest_dropout(tiny_model("gpt2", attn_pdrop=0.2)) == 0.2
    assert largest_dropout(tiny_model("llama", attention_dropout=0.3)) == 0.3
    assert largest_dropout(tiny_model("llama")) == 0


def test_rows_beyond_learned_positions_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="129 is beyond the 128 positions") as caught:
        make_plan(config(folder, max_length=129))
    assert "data.max_length: 128" in str(caught.value.remedy)


def test_a_live_model_that_is_not_the_planned_one_is_refused(folder: Path) -> None:
    plan = make_plan(config(folder))
    live = attach_adapter(tiny_model("gpt2"), AdapterConfig(r=4, target_modules=("c_attn",)), seed=0)
    check_against_plan(live, plan)
    fewer = replace(plan.parameters, trainable=plan.parameters.trainable - 1)
    with pytest.raises(ModelError, match="the plan says"):
        check_against_plan(live, replace(plan, parameters=fewer))
    with torch.no_grad(), pytest.raises(ModelError, match="the plan says"):
        check_against_plan(tiny_model("gpt2"), plan)
