"""A wrong merge must not pass, and a right one must, whatever the dtype and the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_cli.merge import merge
from lora_cli.merge.adapter import AdaptedModel, Unit
from lora_cli.merge.verification import distance
from tests.unit.merge.tiny import save_adapter, save_base

Merged = dict[str, Tensor]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
        ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
        ("gemma", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
        ("gemma2", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_right_merge_is_verified(tmp_path: Path, name: str, settings: dict[str, object], dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", name, dtype)
    report = merge([str(save_adapter(tmp_path / "adapter", base, **settings))], tmp_path / "merged")
    assert report.verified, report.problem
    assert report.verification is not None
    assert report.verification.control > report.verification.max_logit_difference
    assert (tmp_path / "merged" / "config.json").is_file()


def spoil(monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Unit, Merged, Mapping[str, Tensor]], Merged]) -> None:
    """Put a mistake behind each module's arithmetic, whether it is merged as a whole or in slices."""
    whole, in_slices = AdaptedModel.merge, AdaptedModel.merge_slice

    def merge_wrongly(self: AdaptedModel, unit: Unit, base: Mapping[str, Tensor]) -> Merged:
        before = {name: value.clone() for name, value in base.items()}
        return mistake(unit, whole(self, unit, base), before)

    def merge_slice_wrongly(self: AdaptedModel, unit: Unit, rows: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        before = rows.clone()
        return mistake(unit, {"rows": in_slices(self, unit, rows, own)}, {"rows": before})["rows"]

    monkeypatch.setattr(AdaptedModel, "merge", merge_wrongly)
    monkeypatch.setattr(AdaptedModel, "merge_slice", merge_slice_wrongly)


def too_strong(merged: Merged, base: Mapping[str, Tensor]) -> Merged:
    return {name: base[name] + 1.1 * (value - base[name]) for name, value in merged.items()}


def not_at_all(merged: Merged, base: Mapping[str, Tensor]) -> Merged:
    return {name: base[name].clone() for name in merged}


def turned_around(merged: Merged, base: Mapping[str, Tensor]) -> Merged:
    return {name: base[name] - (value - base[name]) for name, value in merged.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mistake", [too_strong, not_at_all, turned_around])
def test_wrong_merge_is_set_aside(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[Merged, Mapping[str, Tensor]], Merged],
    dtype: torch.dtype,
) -> None:
    spoil(monkeypatch, lambda _, merged, before: mistake(merged, before))
    base = save_base(tmp_path / "base", "llama", dtype)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear", scale=0.3)
    report = merge([str(adapter)], tmp_path / "merged")
    assert report.verified is False
    assert report.problem
    assert not (tmp_path / "merged").exists()
    assert Path(report.output).name == "merged.unverified"


def test_one_module_left_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(unit: Unit, merged: Merged, before: Mapping[str, Tensor]) -> Merged:
        return dict(before) if "layers.1.mlp.up_proj" in unit.name else merged

    spoil(monkeypatch, forget)
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules="all-linear", scale=0.3)
    assert merge([str(adapter)], tmp_path / "merged").verified is False


def test_without_verification_every_tensor_is_still_counted(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    report = merge([str(save_adapter(tmp_path / "adapter", base))], tmp_path / "merged", verify=False)
    assert report.verified is None
    assert (report.tensors, report.changed) == (21, 4)  # PEFT's default targets are q_proj and v_proj


def test_an_effect_smaller_than_rounding_is_said(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], scale=3e-3)
    report = merge([str(adapter)], tmp_path / "merged")
    assert any("--dtype float32" in text for text in report.warnings) or report.problem


def test_distance_of_nan_is_nan() -> None:
    same = torch.zeros(70, 5)
    broken = same.clone()
    broken[3, 2] = torch.nan
    assert distance(same, broken).largest != distance(same, broken).largest
    assert distance(same, same).top1_agreement == 1.0
