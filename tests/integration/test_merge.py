"""From a run to a merged folder: the numbers, the choice of the base, the command, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_cli.merge import merge
from tests.integration.conftest import Run

NF4 = ("model.quantization.type=nf4",)


def live(run: Run) -> Any:
    """The model as training left it, with its own attention again."""
    run.model.get_base_model().set_attn_implementation("sdpa")
    return run.model


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the rent is due on a day of may when we met at noon")["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    return found


def test_a_run_merges_into_a_model_that_says_the_same(trained: Callable[..., Run], rows: Path, tmp_path: Path) -> None:
    run = trained(f"data.validation={rows / 'heldout.jsonl'}")
    report = merge([str(run.folder)], tmp_path / "merged")
    assert report.verified
    assert report.verification is not None
    assert report.verification.rows == "the run's validation data"
    assert report.verification.max_logit_difference < 1e-3 < report.verification.control
    assert report.verification.loss_merged == pytest.approx(report.verification.loss_adapter, abs=1e-5)
    assert report.verification.loss_merged < report.verification.loss_base
    assert report.base.base == "original"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, tmp_path / "merged"), logits(live(run), tmp_path / "merged"))


def test_everything_needed_lies_in_the_folder(trained: Callable[..., Run], tiny: Path, tmp_path: Path) -> None:
    run = trained()
    merge([str(run.folder / "adapter")], tmp_path / "merged", max_shard_size="50KB", verify=False)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors.index.json" in names
    assert not any(name.startswith(("adapter", ".")) for name in names)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert str(tmp_path) not in card
    assert str(tiny) not in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_quantized_run_goes_into_the_weights_that_it_saw(trained: Callable[..., Run], tmp_path: Path) -> None:
    run = trained(*NF4, "train.max_steps=12")
    report = merge([str(run.folder)], tmp_path / "merged")
    assert report.verified
    assert report.base.base == "quantized"
    assert report.base.kl_quantized is not None
    assert report.base.kl_original is not None
    assert report.base.kl_quantized < 1e-3 * report.base.kl_original
    # The live model is bitsandbytes' own arithmetic; the merged one plain float32.
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected, found = logits(live(run), tmp_path / "merged"), logits(merged, tmp_path / "merged")
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())


def test_the_original_base_can_be_asked_for(trained: Callable[..., Run], tiny: Path, tmp_path: Path) -> None:
    run = trained(*NF4)
    report = merge([str(run.folder)], tmp_path / "merged", base="original")
    assert report.verified
    assert report.base.base == "original"
    assert "as asked" in report.base.why
    base = load_file(tiny / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    same = [name for name in base if torch.equal(base[name], merged[name])]
    assert len(same) == len(base) - report.changed


def test_the_command(trained: Callable[..., Run], lora: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    run = trained()
    code, out, err = lora("merge", run.folder, "--output", tmp_path / "merged", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"tensors", "changed", "verification", "seconds", "peak_memory_bytes"} <= found.keys()
    assert {"max_logit_difference", "kl", "top1_agreement"} <= found["verification"].keys()
    code, out, err = lora("merge", run.folder, "--output", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert "is taken" in err
    code, out, _ = lora("merge", run.folder, "--output", tmp_path / "again")
    assert code == 0
    assert "verdict  verified" in out


def test_an_adapter_that_learned_nothing_has_no_effect(
    trained: Callable[..., Run], lora: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = trained()
    file = run.folder / "adapter" / "adapter_model.safetensors"
    zero = {n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(zero, file)
    code, out, err = lora("merge", run.folder, "--output", tmp_path / "merged", "--json")
    assert code == 3
    assert "no effect" in err
    assert json.loads(out)["changed"] == 0
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.unverified" / "model.safetensors").is_file()


def test_another_base_in_the_place_of_the_run_s_own(
    trained: Callable[..., Run], tiny: Path, lora: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Of the same size and names: nothing but the fingerprint that the run noted tells the two apart."""
    base = shutil.copytree(tiny, tmp_path / "base")
    run = trained(f"model.name_or_path={base}")
    file = base / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    code, out, err = lora("merge", run.folder, "--output", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert "isn't the base" in err and str(base) in err
    assert not (tmp_path / "merged").exists()


def test_some_modules_that_learned_nothing_are_warned_of(
    trained: Callable[..., Run], lora: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = trained()
    file = run.folder / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n and "h.0" in n else t for n, t in load_file(file).items()}, file)
    code, out, err = lora("merge", run.folder, "--output", tmp_path / "merged", "--json")
    assert code == 0, err
    assert "lora_B is zero in" in err
    assert any("lora_B is zero in" in text for text in json.loads(out)["warnings"])


def test_a_run_on_a_base_that_lies_quantized_on_disk(trained: Callable[..., Run], tiny: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, quantization_config=settings)
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "packed")
    run = trained(*NF4, f"model.name_or_path={tmp_path / 'packed'}", "train.max_steps=12")
    report = merge([str(run.folder / "adapter")], tmp_path / "merged")
    assert report.verified, report.problem
    assert (report.base.base, report.base.kl_original) == ("quantized", None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected, found = logits(live(run), tmp_path / "merged"), logits(merged, tmp_path / "merged")
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_run_whose_validation_rows_are_gone_is_verified_on_other_text(
    trained: Callable[..., Run], rows: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "heldout.jsonl"
    shutil.copy(rows / "heldout.jsonl", moved)
    run = trained(f"data.validation={moved}")
    moved.unlink()
    report = merge([str(run.folder)], tmp_path / "merged")
    assert report.verified
    assert report.verification is not None
    assert report.verification.rows == "a built-in text"


def test_the_screen_fits_a_narrow_terminal(
    trained: Callable[..., Run],
    lora: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained(*NF4)
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = lora("merge", f"{run.folder}:0.5", "--output", tmp_path / "merged")
    assert code == 0, err
    assert all(len(line) <= 60 or "/" in line for line in out.splitlines())
    for label in ("merged", "base", "checked", "control", "verdict"):
        assert f"\n  {label} " in f"\n{out}"


def test_an_adapter_of_a_full_fine_tuning(
    trained: Callable[..., Run],
    lora: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained("adapter=null", "train.learning_rate=3e-3")
    code, out, err = lora("extract", run.folder, "--rank", "8", "--output", tmp_path / "extracted", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["likeness"]["kl_adapter"] < found["likeness"]["kl_base"]
    assert 0 < found["error"] < 1
    assert len(found["modules"]) == 8
    card = (tmp_path / "extracted" / "README.md").read_text()
    assert "library_name: peft" in card and str(tmp_path) not in card
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = lora("extract", run.folder, "--rank", "2", "--output", tmp_path / "smaller")
    assert code == 0, err
    assert all(len(line) <= 60 or "/" in line for line in out.splitlines())
    code, _, err = lora("merge", run.folder, "--output", tmp_path / "merged")
    assert code == 2
    assert "lora extract" in err
