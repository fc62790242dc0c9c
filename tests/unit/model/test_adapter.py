"""What an adapter reaches, what it refuses, and that PEFT reads what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_cli.config import AdapterConfig
from lora_cli.engine.step import train_step
from lora_cli.engine.world import join_world
from lora_cli.errors import ModelError
from lora_cli.model.adapter import attach_adapter, check_adapter_folder, unreached_by_all_linear
from lora_cli.model.architecture import build_on_meta
from tests.unit.engine.learning import LENGTHS, PACKED, batches, examples, make_learner
from tests.unit.engine.tiny import SETTINGS, tiny_model


def adapted(model: torch.nn.Module) -> set[str]:
    """Full names of the modules that got an adapter."""
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    ("targets", "lost"),
    [(("q_proj", "qproj"), "'qproj'"), (("c_attn",), "'c_attn'"), (r".*\.attention\..*", "attention")],
    ids=["one of two", "another model's", "expression"],
)
def test_targets_that_match_nothing_list_what_there_is(
    llama: PreTrainedModel, targets: str | tuple[str, ...], lost: str
) -> None:
    """PEFT is content when any one matches, and the others are lost without a word."""
    with pytest.raises(ModelError, match="match") as caught:
        attach_adapter(llama, AdapterConfig(target_modules=targets), seed=0)
    assert lost in caught.value.message
    for offered in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
        assert offered in str(caught.value.remedy)


def test_a_broken_expression_is_named(llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="regular expression"):
        attach_adapter(llama, AdapterConfig(target_modules="(q_proj"), seed=0)


def test_modules_to_save_that_match_nothing_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match=r"modules_to_save: 'score'"):
        attach_adapter(llama, AdapterConfig(modules_to_save=("score",)), seed=0)


def test_all_linear_is_every_linear_layer_but_the_head(llama: PreTrainedModel) -> None:
    found = adapted(attach_adapter(llama, AdapterConfig(), seed=0))
    assert len(found) == 14
    assert not any("lm_head" in name for name in found)


def test_all_linear_keeps_to_the_language_model_of_a_multimodal_one() -> None:
    """Gemma 3 loads with its vision tower, whose layers have the same names."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config=SETTINGS["gemma3_text"],
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    base = build_on_meta(config)
    unreached = unreached_by_all_linear(base)
    with torch.device("meta"):
        found = adapted(attach_adapter(base.requires_grad_(False), AdapterConfig(), seed=0))
    assert len(found) == 14
    assert all("language_model" in name for name in found)
    assert any("vision_tower" in name for name in unreached)


def test_all_linear_leaves_routers_alone() -> None:
    """PhiMoE's router is a linear layer that gives a tuple: an adapter around it would fail in the first step."""
    config = AutoConfig.for_model(
        "phimoe",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = attach_adapter(AutoModelForCausalLM.from_config(config), AdapterConfig(), seed=0)
    assert {name.rsplit(".", 1)[-1] for name in adapted(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()


def test_the_first_weights_follow_from_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 17)  # whatever was drawn before
        model = attach_adapter(tiny_model("llama"), AdapterConfig(), seed=seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


ROUND_TRIPS = {
    "gpt2": AdapterConfig(r=4, target_modules=("c_attn", "c_proj")),
    "llama": AdapterConfig(r=4),
    "llama rslora": AdapterConfig(r=4, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "llama dora": AdapterConfig(r=4, use_dora=True),
    "llama head": AdapterConfig(r=4, modules_to_save=("lm_head",)),
    "llama ranks": AdapterConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}),
    "gemma2": AdapterConfig(r=4, exclude_modules=("gate_proj",)),
    "qwen2 biases": AdapterConfig(r=4, bias="lora_only"),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_plain_peft_loads_what_was_trained_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model_type = name.split()[0]
    model = attach_adapter(tiny_model(model_type), ROUND_TRIPS[name], seed=3).train()
    learner = make_learner(model.get_base_model())
    rows, world = examples(LENGTHS), join_world()
    for _ in range(2):
        train_step(learner, batches(rows, PACKED, 64, world), int(rows.supervised.sum()), world)
    model.eval()
    model.save_pretrained(tmp_path)
    plain_base = tiny_model(model_type)
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        loaded_logits, base_logits = loaded(input_ids=ids).logits, plain_base(input_ids=ids).logits
        model.get_base_model().set_attn_implementation(plain_base.config._attn_implementation)
        own_logits = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(loaded_logits, own_logits, rtol=1e-6, atol=1e-6)
    assert (loaded_logits - base_logits).abs().max() > 1e-2


def test_an_adapter_that_is_gone_on_from_keeps_its_weights(tmp_path: Path) -> None:
    first = attach_adapter(tiny_model("llama"), AdapterConfig(r=4, init_lora_weights=False), seed=1)
    first.save_pretrained(tmp_path)
    again = attach_adapter(tiny_model("llama"), AdapterConfig(path=str(tmp_path)), seed=2)
    before = {n: p for n, p in first.named_parameters() if p.requires_grad}
    after = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter folder"):
        check_adapter_folder(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        check_adapter_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        check_adapter_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match="IA3"):
        check_adapter_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(ModelError, match="not JSON"):
        check_adapter_folder(tmp_path)
