"""A LoRA extracted from a tuned model: exact where its rank suffices, the best there is where it doesn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.errors import UserError
from lora_cli.merge import extract, factors, merge
from tests.unit.merge.tiny import save_adapter, save_base

MODELS = ["gpt2", "llama", "llama-tied", "qwen2", "mixtral"]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_lora_has_made_is_found_again(tmp_path: Path, name: str) -> None:
    """Merge one of rank 4, extract at rank 4: the same weights, to float32 rounding."""
    base = save_base(tmp_path / "base", name, torch.float32)
    # Experts and routers are no linear layers.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "mixtral" else "all-linear"
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=targets, scale=0.3)
    merge([str(adapter)], tmp_path / "tuned", verify=False)
    found = extract(str(tmp_path / "tuned"), tmp_path / "extracted", base=str(base), rank=4)
    assert found.modules and not found.left_out
    assert all(module.error < 1e-4 for module in found.modules)
    assert found.likeness is not None
    assert found.likeness.kl_adapter < 1e-8 < found.likeness.kl_base
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "extracted")).merge_and_unload().state_dict()
    for parameter, value in tuned.items():
        assert float((again[parameter] - value).abs().max()) < 1e-5, parameter


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_product_of_that_rank_comes_nearer(tmp_path: Path, name: str, rank: int) -> None:
    """The error is the tail of the singular values, in float64; norms and embeddings are said to be left out."""
    base = save_base(tmp_path / "base", name, torch.float32)
    tuned = save_base(tmp_path / "tuned", name, torch.float32, seed=5)
    found = extract(str(tuned), tmp_path / "extracted", base=str(base), rank=rank, verify=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    saved = load_file(tmp_path / "extracted" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(found.modules)
    for module in found.modules:
        key = f"{module.name}.weight"
        delta = after[key].double() - before[key].double()
        singular = torch.linalg.svdvals(delta)
        best = float(torch.linalg.norm(singular[rank:]) / torch.linalg.norm(singular))
        assert module.error == pytest.approx(best, abs=1e-5), key
        a, b = (saved[f"base_model.model.{module.name}.lora_{one}.weight"].double() for one in "AB")
        product = (b @ a).T if name == "gpt2" else b @ a
        assert float(torch.linalg.norm(delta - product) / torch.linalg.norm(delta)) == pytest.approx(best, abs=1e-5)
    held = {f"{module.name}.weight" for module in found.modules}
    assert held | set(found.left_out) == {key for key in before if not torch.equal(before[key], after[key])}


def test_large_matrices_are_explained_as_well_as_they_can_be() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1100, 24) @ torch.randn(24, 1300) + 0.05 * torch.randn(1100, 1300)
    assert min(matrix.shape) > factors._EXACT
    singular = torch.linalg.svdvals(matrix)
    best = float(torch.linalg.norm(singular[16:]) / torch.linalg.norm(singular))
    a, b, error = factors.nearest_factors(matrix, 16)
    assert (a.shape, b.shape) == ((16, 1300), (1100, 16))
    assert error == pytest.approx(best, rel=1e-3)


def test_modules_can_be_saved_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    tuned = save_base(tmp_path / "tuned", "llama", torch.bfloat16, seed=5)
    names = ["lm_head", "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    found = extract(str(tuned), tmp_path / "extracted", base=str(base), rank=32, modules_to_save=names)
    assert not found.left_out
    assert found.likeness is not None and found.likeness.kl_adapter < 1e-6 < found.likeness.kl_base
    report = merge([str(tmp_path / "extracted")], tmp_path / "again")
    assert report.verified, report.problem
    expected, again = (load_file(tmp_path / one / "model.safetensors") for one in ("tuned", "again"))
    for name in expected:
        # What is written is base + product; sums that fall on the border of two numbers may round either way.
        close = torch.isclose(expected[name].float(), again[name].float(), rtol=2**-7, atol=1e-4)
        assert bool(close.all()), name


def test_layers_that_did_not_change_are_not_in_it(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], layers_to_transform=[1])
    merge([str(adapter)], tmp_path / "tuned", verify=False)
    found = extract(str(tmp_path / "tuned"), tmp_path / "extracted", base=str(base), verify=False)
    assert [module.name for module in found.modules] == ["model.layers.1.self_attn.q_proj"]
    config = json.loads((tmp_path / "extracted" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_experts_that_changed_are_said_to_be_left_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.float32)
    tuned = save_base(tmp_path / "tuned", "mixtral", torch.float32, seed=5)
    found = extract(str(tuned), tmp_path / "extracted", base=str(base), verify=False)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"} <= set(found.left_out)


def test_what_has_nothing_to_extract_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float32)
    output = tmp_path / "extracted"
    with pytest.raises(UserError, match="there is nothing to extract"):
        extract(str(base), output, base=str(base))
    with pytest.raises(UserError, match="doesn't say what it was made from"):
        extract(str(base), output)
    with pytest.raises(UserError, match="different architectures"):
        extract(str(save_base(tmp_path / "other", "gpt2", torch.float32)), output, base=str(base))
    with pytest.raises(UserError, match="is an adapter already"):
        extract(str(save_adapter(tmp_path / "adapter", base)), output)
    broken = save_base(tmp_path / "broken", "llama", torch.float32, seed=2)
    file = broken / "model.safetensors"
    save_file({n: t * torch.nan if "1.self_attn.q" in n else t for n, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.weight holds NaN"):
        extract(str(broken), output, base=str(base))
    with pytest.raises(UserError, match="matches no module"):
        extract(str(broken), output, base=str(base), modules_to_save=["nothing"])
    assert not output.exists()
