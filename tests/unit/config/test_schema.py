from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from lora_cli.config import (
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
    QuantizationConfig,
    Source,
    TrainConfig,
)
from lora_cli.config.contradictions import SCHEDULE_NEEDS, SCHEDULE_NUMBERS
from lora_cli.config.kinds import Optimizer, Scheduler

SECTIONS = [Config, ModelConfig, QuantizationConfig, AdapterConfig, DataConfig, Source, TrainConfig]


def config(**sections: Any) -> Config:
    base = {"model": {"name_or_path": "gpt2"}, "data": {"train": "a.jsonl"}, "output_dir": "out"}
    return Config.model_validate({**base, **sections})


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_documented(section: type[BaseModel]) -> None:
    assert section.model_fields
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().model.name_or_path = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("adapter", {"r": "3"}),
        ("adapter", {"r": 3.0}),
        ("adapter", {"r": True}),
        ("adapter", {"r": 0}),
        ("adapter", {"lora_dropout": 1.0}),
        ("adapter", {"init_lora_weights": "olora"}),
        ("adapter", {"target_modules": []}),
        ("adapter", {"rank_pattern": {"q_proj": True}}),
        ("train", {"learning_rate": True}),
        ("train", {"learning_rate": float("nan")}),
        ("train", {"learning_rate": float("inf")}),
        ("train", {"learning_rate": 0}),
        ("train", {"eval_steps": 1.0}),
        ("train", {"eval_steps": 0}),
        ("train", {"warmup_steps": 1.5}),
        ("train", {"warmup_steps": -1}),
        ("train", {"report_to": "wandb"}),
        ("train", {"seed": 2**32}),
        ("train", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
        ("train", {"lr_scheduler_kwargs": {"power": True}}),
        ("train", {"max_steps": 1.5}),
        ("data", {"train": []}),
        ("data", {"train": ""}),
        ("data", {"train": "a", "validation": 1}),
        ("data", {"train": "a", "validation": 0.0}),
        ("data", {"train": "a", "max_length": 1}),
        ("data", {"train": [{"path": "a", "weight": 0}]}),
        ("data", {"train": [{"path": "a", "weight": -1.0}]}),
    ],
)
def test_values_of_the_wrong_kind_or_size_are_refused(section: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**{section: values})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"eval_steps": 0.1}),
        ("train", {"eval_steps": 50}),
        ("train", {"warmup_steps": 0}),
        ("train", {"warmup_steps": 0.5}),
        ("train", {"max_grad_norm": None}),
        ("train", {"gradient_checkpointing": False}),
        ("train", {"learning_rate": 1}),
        ("data", {"train": "a", "validation": 0.05}),
        ("data", {"train": "a", "validation": ["b", {"path": "c"}]}),
        ("adapter", {"target_modules": ["q_proj"]}),
        ("adapter", {"layers_to_transform": [0, 1]}),
        ("adapter", {"init_lora_weights": False}),
    ],
)
def test_all_documented_forms_are_taken(section: str, values: dict[str, Any]) -> None:
    assert config(**{section: values})


def test_lora_alpha_is_twice_the_rank_unless_given() -> None:
    assert config(adapter={"r": 4}).adapter.lora_alpha == 8  # type: ignore[union-attr]
    assert config(adapter={"r": 4, "lora_alpha": None}).adapter.lora_alpha == 8  # type: ignore[union-attr]
    assert config(adapter={"r": 4, "lora_alpha": 5}).adapter.lora_alpha == 5  # type: ignore[union-attr]
    assert config().adapter.lora_alpha == 32  # type: ignore[union-attr]


def test_null_is_full_fine_tuning_and_a_missing_adapter_is_lora() -> None:
    assert config(adapter=None).adapter is None
    assert config().adapter == AdapterConfig()


def test_one_source_may_be_a_path_or_a_mapping() -> None:
    wanted = (Source(path="a.jsonl"),)
    for form in ("a.jsonl", {"path": "a.jsonl"}, ["a.jsonl"], [{"path": "a.jsonl"}]):
        assert config(data={"train": form}).data.train == wanted


def test_the_home_folder_is_expanded() -> None:
    assert config(output_dir="~/runs/a").output_dir == str(Path.home() / "runs/a")


def test_defaults_that_depend_on_another_field() -> None:
    assert config(train={"lr_scheduler_type": "constant"}).train.warmup_steps == 0
    assert config().train.warmup_steps == 0.03
    quantized = config(model={"name_or_path": "gpt2", "quantization": {"type": "int8"}})
    assert quantized.model.quantization == QuantizationConfig(type="int8", double_quant=False)


def test_schedules_are_those_of_transformers_that_need_no_measured_loss() -> None:
    from transformers import SchedulerType

    theirs = {schedule.value for schedule in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert set(get_args(Scheduler)) == theirs


def test_schedule_numbers_are_parameters_of_the_schedules() -> None:
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert set(SCHEDULE_NUMBERS) == set(get_args(Scheduler))
    filled_in = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items():
        if kind.value in SCHEDULE_NUMBERS:
            parameters = inspect.signature(make).parameters
            words = {name for name, each in parameters.items() if each.annotation in (str, "str")}
            assert set(SCHEDULE_NUMBERS[kind.value]) == set(parameters) - filled_in - words, kind.value
    assert set(SCHEDULE_NEEDS) <= set(SCHEDULE_NUMBERS)


def test_optimizers_bear_the_names_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    theirs = {name.value for name in OptimizerNames}
    assert set(get_args(Optimizer)) - theirs == {"paged_adamw"}, "transformers calls it paged_adamw_32bit"
