from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lora_cli.plan import DataAccount, Engine, ModelFacts, ParameterReport, Plan, Steps, Writes
from lora_cli.runs.card import hub_id, model_card

PLAN = Plan(
    model=ModelFacts(
        "meta-llama/Llama-3.1-8B-Instruct", "0e9e39f", "LlamaForCausalLM", "bfloat16", None, "r 16, alpha 32"
    ),
    parameters=ParameterReport(13_631_488, 8_043_892_736, ()),
    data=DataAccount(10, 10, 0, 0, 100, 50, 10, 10),
    validation=None,
    steps=Steps(30, 10, 3.0, 16, 1, 2e-4, "cosine"),
    engine=Engine("cpu", 1, 4096, "documents", "chunked", False, 0.0),
    memory=None,
    writes=Writes("/home/me/runs/docs", 1, "at the end", 1),
)
SUMMARY = {
    "steps": 30,
    "num_tokens": 300,
    "num_supervised_tokens": 150,
    "first_loss": 1.4127,
    "final_loss": 1.0219,
    "loss_span": 3,
    "first_eval_loss": None,
    "final_eval_loss": None,
}


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return dict(YAML(typ="safe").load(front))


def test_front_matter_for_a_base_on_the_hub() -> None:
    card = model_card("docs", PLAN, SUMMARY, ["tatsu-lab/alpaca", "data/train.jsonl", "tatsu-lab/alpaca"])
    assert front_matter(card) == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "base_model:adapter:meta-llama/Llama-3.1-8B-Instruct"],
        "datasets": ["tatsu-lab/alpaca"],
    }
    assert "1.4127 to 1.0219 (means of first and last 3 steps)" in card
    assert "13,631,488 of 8,043,892,736" in card
    assert "None" not in card
    assert "/home/me" not in card


def test_a_local_base_is_not_mentioned_anywhere(tmp_path: Path) -> None:
    local = replace(PLAN, model=replace(PLAN.model, name=str(tmp_path / "llama")))
    card = model_card("docs", local, SUMMARY, [str(tmp_path / "train.jsonl")])
    assert front_matter(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    assert str(tmp_path) not in card


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B", "no"])
def test_hub_ids(name: str) -> None:
    assert hub_id(name) == name
    plan = replace(PLAN, model=replace(PLAN.model, name=name))
    assert front_matter(model_card("docs", plan, SUMMARY, []))["base_model"] == name


@pytest.mark.parametrize(
    "name",
    [
        "/models/llama",
        "./llama",
        "../llama",
        "~/llama",
        "a/b/c",
        "data/train.jsonl",
        "train.csv.gz",
        "C:\\m",
        "",
        "https://user:hf_token@example.org/m",
    ],
)
def test_paths_are_no_hub_ids(name: str) -> None:
    assert hub_id(name) is None


def test_a_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/tiny") == "models/tiny"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert hub_id("models/tiny") is None
