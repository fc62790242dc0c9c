"""Adapters put on one base and taken off: each as it is alone, several as their sum, and the base as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.engine.wearing import Piece, worn
from lora_cli.errors import ModelError
from tests.unit.merge.tiny import save_adapter, save_base

IDS = torch.tensor([[1, 7, 9, 23, 5, 11]])
KINDS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "use_rslora": True, "r": 2},
    {"target_modules": ["q_proj"], "use_dora": True},
    {"target_modules": ["q_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    {"target_modules": ["embed_tokens"]},
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / request.param, request.param, torch.float32)


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def test_every_kind_on_one_base_is_what_it_is_alone(base: Path, tmp_path: Path) -> None:
    """Bit for bit, whatever was worn before; Qwen2 has the biases that an adapter may replace."""
    folders = [save_adapter(tmp_path / str(i), base, seed=i, **kind) for i, kind in enumerate(KINDS)]
    alone = [logits(PeftModel.from_pretrained(load(base), str(folder))) for folder in folders]
    model = load(base)
    bare = logits(model)
    for folder, expected in [*zip(folders, alone, strict=True)] * 2:
        with worn(model, [Piece(folder)], torch.float32) as wearing:
            assert torch.equal(logits(wearing), expected)
            assert not torch.equal(expected, bare)
        assert torch.equal(logits(model), bare)


def test_a_stack_is_the_weighted_sum(base: Path, tmp_path: Path) -> None:
    """Of one linear layer, whose output is linear in the adapters."""
    one = save_adapter(tmp_path / "one", base, seed=1, target_modules=["lm_head"])
    other = save_adapter(tmp_path / "other", base, seed=2, target_modules=["lm_head"], r=2, use_rslora=True)
    model = load(base)
    bare = logits(model)
    effects = []
    for folder in (one, other):
        with worn(model, [Piece(folder)], torch.float32) as wearing:
            effects.append(logits(wearing) - bare)
    with worn(model, [Piece(one, 0.7), Piece(other, -0.3)], torch.float32) as wearing:
        torch.testing.assert_close(logits(wearing), bare + 0.7 * effects[0] - 0.3 * effects[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), bare)


def test_an_adapter_of_another_base_leaves_the_base_as_it_was(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(file).items()}, file)
    model = load(base)
    bare = logits(model)
    with pytest.raises(ModelError, match="doesn't fit its base"), worn(model, [Piece(folder)], torch.float32):
        pass
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("kind", KINDS[2:6])
def test_what_is_no_sum_is_neither_weighted_nor_stacked(base: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path / "adapter", base, **kind)
    plain = save_adapter(tmp_path / "plain", base, target_modules=["q_proj"])
    model = load(base)
    for pieces in ([Piece(folder, 0.5)], [Piece(plain), Piece(folder)]):
        with pytest.raises(ModelError, match="can't be weighted or stacked"), worn(model, pieces, torch.float32):
            pass
