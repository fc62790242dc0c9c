"""Several adapters in one merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.errors import UserError
from lora_cli.merge import combine_adapters, merge
from tests.unit.merge.tiny import save_adapter, save_base

Settings = dict[str, Any]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", "llama", torch.float32)


def two(tmp_path: Path, base: Path, one: Settings, other: Settings) -> tuple[Path, Path]:
    adapters = [save_adapter(tmp_path / f"adapter{i}", base, seed=i, **s) for i, s in enumerate((one, other), start=1)]
    return adapters[0], adapters[1]


def deltas(base: Path, merged: Path) -> dict[str, torch.Tensor]:
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"], "r": 2}),
        ({"target_modules": ["q_proj"], "use_rslora": True}, {"target_modules": ["down_proj", "q_proj"]}),
        ({"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.*q_proj": 3}}),
    ],
)
def test_cat_is_the_weighted_sum(tmp_path: Path, base: Path, one: Settings, other: Settings) -> None:
    a, b = two(tmp_path, base, one, other)
    for name, adapter in (("a", a), ("b", b)):
        merge([str(adapter)], tmp_path / name, verify=False)
    report = merge([f"{a}:0.7", f"{b}:-0.3"], tmp_path / "both")
    assert report.verified
    both, of_a, of_b = (deltas(base, tmp_path / name) for name in ("both", "a", "b"))
    assert any(delta.any() for delta in both.values())
    for name, delta in both.items():
        torch.testing.assert_close(delta, 0.7 * of_a[name] - 0.3 * of_b[name], atol=1e-6, rtol=1e-5)


def test_one_adapter_can_be_weakened(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge([str(adapter)], tmp_path / "whole", verify=False)
    merge([f"{adapter}:0.5"], tmp_path / "half", verify=False)
    whole, half = deltas(base, tmp_path / "whole"), deltas(base, tmp_path / "half")
    for name, delta in half.items():
        torch.testing.assert_close(delta, 0.5 * whole[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare_ties"])
def test_other_methods(tmp_path: Path, base: Path, method: Any) -> None:
    a, b = two(tmp_path, base, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]})
    report = merge([str(a), str(b)], tmp_path / "merged", method=method, density=0.5)
    assert report.verified
    assert report.changed == 2


def test_a_combination_can_stay_an_adapter(tmp_path: Path, base: Path) -> None:
    a, b = two(tmp_path, base, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "r": 2})
    result = combine_adapters([f"{a}:0.7", f"{b}:-0.3"], tmp_path / "adapter")
    assert (result.rank, result.combination) == (6, "cat of adapter1 x 0.7, adapter2 x -0.3")
    merge([str(tmp_path / "adapter")], tmp_path / "through", verify=False)
    merge([f"{a}:0.7", f"{b}:-0.3"], tmp_path / "at-once", verify=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("through", "at-once"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_what_has_no_combination_is_refused(tmp_path: Path, base: Path) -> None:
    a, b = two(tmp_path, base, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(UserError, match="use_dora, which can't be combined"):
        merge([str(a), str(b)], tmp_path / "merged")
    with pytest.raises(UserError, match="needs --density"):
        merge([str(a), str(a)], tmp_path / "merged", method="ties")
    other = save_base(tmp_path / "other", "llama", torch.float32)
    file = b / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(UserError, match="adapters of two bases"):
        merge([str(a), str(b)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
