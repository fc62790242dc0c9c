"""Compiled kernels: the gradients and losses of a padded batch, and plain PyTorch wherever they can't be had."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.config import AdapterConfig
from lora_cli.engine.fused import fitting
from lora_cli.engine.fused.fitting import fuse
from lora_cli.engine.fused.native import compiled, kernels, proof
from lora_cli.engine.fused.native import layer as native_layer
from lora_cli.engine.fused.pointwise import GELU_TANH, SILU, Activation
from lora_cli.engine.selftest import prove
from lora_cli.engine.world import World
from tests.unit.engine.learning import LENGTHS, PACKED, engine_steps, examples
from tests.unit.engine.padded import padded_gradients, padded_steps
from tests.unit.engine.test_fused import MAKES, apart, gradients, live
from tests.unit.engine.tiny import tiny_config

NATIVE = replace(PACKED, fusion="native")
LONG = (300, 3, 191, 64, 1, 65, 40)
"""Documents of several blocks of 64 tokens, of whole ones, and of parts of one."""
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""Of a value by itself: in bfloat16 half of its last place, which is what rounding it once costs."""
pytestmark = pytest.mark.skipif(not kernels.available(), reason="needs a C compiler")


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model_type", MAKES)
def test_layers_give_the_gradients_of_a_padded_batch(model_type: str, tokens: int, world: World) -> None:
    settings = {"sliding_window": None} if model_type == "mistral" else {}
    model = live(model_type, **settings)
    assert fuse(model, "native") == 2
    found = gradients(model, NATIVE, LENGTHS, world, tokens)
    assert apart(found, padded_gradients(live(model_type, **settings), examples(LENGTHS))) < 2e-6


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("size", [8, 24, 64])
def test_long_documents_all_groupings_and_sizes_of_heads(heads: int, size: int, world: World) -> None:
    settings = {"num_key_value_heads": heads, "head_dim": size, "max_position_embeddings": 512}
    found = gradients(live("llama", **settings), NATIVE, LONG, world, 700)
    assert apart(found, padded_gradients(live("llama", **settings), examples(LONG))) < 2e-6


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_losses_are_those_of_a_padded_loop(model_type: str, world: World) -> None:
    losses = [result.loss for result in engine_steps(model_type, 64, world, NATIVE)]
    assert losses == pytest.approx([step.loss for step in padded_steps(model_type)], rel=1e-6, abs=0)


@pytest.mark.parametrize("targets", [("v_proj",), ("q_proj", "down_proj"), ("o_proj", "up_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_of_the_linear_layers_adapted(targets: tuple[str, ...], dtype: torch.dtype, world: World) -> None:
    adapter = AdapterConfig(r=4, target_modules=targets)
    model = narrowed(live("qwen2", adapter), dtype)
    found = gradients(model, replace(NATIVE, dtype=dtype), LENGTHS, world, 64)
    expected = padded_gradients(live("qwen2", adapter), examples(LENGTHS))
    assert apart(found, expected) < (2e-6 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_bfloat16_is_as_near_as_the_modules_own(size: int, world: World) -> None:
    settings = {"head_dim": size, "max_position_embeddings": 512}
    expected = padded_gradients(live("llama", **settings), examples(LONG))
    model = narrowed(live("llama", **settings), torch.bfloat16)
    own = apart(gradients(model, replace(PACKED, dtype=torch.bfloat16), LONG, world, 700), expected)
    ours = apart(gradients(copy.deepcopy(model), replace(NATIVE, dtype=torch.bfloat16), LONG, world, 700), expected)
    assert ours < 1.2 * own


def narrowed(model: Any, dtype: torch.dtype) -> Any:
    """Frozen weights in the dtype that the run would load them in."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def test_recomputed_layers_give_the_same_bits(world: World) -> None:
    plain = gradients(live("llama"), NATIVE, LENGTHS, world, 64)
    model = live("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    found = gradients(model, NATIVE, LENGTHS, world, 64)
    assert all(torch.equal(found[name], grad) for name, grad in plain.items())


def test_documents_too_long_for_the_kernels_run_as_without(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layer, "LONGEST", max(LENGTHS) - 1)
    monkeypatch.setattr(kernels, "attend", lambda *_: pytest.fail("the kernel ran"))
    found = gradients(live("llama"), NATIVE, LENGTHS, world, 4096)
    assert apart(found, padded_gradients(live("llama"), examples(LENGTHS))) < 2e-6


def test_a_second_way_back_is_refused() -> None:
    """Gradients have taken the place of what the layer had kept."""
    model = live("llama")
    fuse(model, "native")
    ids = torch.arange(3, 12)[None]
    kept = {"document_lengths": (9,), "use_cache": False, "attention_mask": None}
    NATIVE.prepare(model)  # type: ignore[arg-type]
    total = model.model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 9]), **kept).last_hidden_state.sum()  # type: ignore[operator]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
def test_gates_as_large_as_they_come(activation: Activation, dtype: torch.dtype) -> None:
    """Sigmoids underflow and overflow, and nothing else does: no gate makes a number none."""
    sizes = torch.logspace(-6, 12, 96)
    gate = torch.cat([sizes, -sizes]).to(dtype)
    rows = torch.stack([gate, torch.full_like(gate, 0.75)]).view(1, -1)
    expected = activation.there(gate.double()) * 0.75
    found = kernels.gated(rows, activation).double()
    torch.testing.assert_close(found, expected[None], rtol=TOLERANCE[dtype], atol=1e-6)
    grad = torch.ones(1, len(gate), dtype=dtype)
    kernels.gated_back(rows, grad, activation)
    torch.testing.assert_close(grad, found.to(dtype), rtol=0.0, atol=0.0)
    slopes = rows.double()[:, : len(gate)]
    small = gate.double().abs() < 60  # beyond, x (1 - sigmoid(x)) is the slope's only error
    exact = activation.back(torch.full_like(gate, 0.75).double(), gate.double())
    torch.testing.assert_close(slopes[:, small], exact[None, small], rtol=TOLERANCE[dtype], atol=1e-5)
    assert slopes.isfinite().all()


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    """A gate of 32 or more is its own SiLU; the product of two bfloat16s is exact in float32, and rounded once."""
    draw = torch.Generator().manual_seed(3)
    gate = (32 + 200 * torch.rand(4096, generator=draw)).to(torch.bfloat16)
    up = torch.randn(4096, generator=draw).to(torch.bfloat16)
    exact = gate.float() * up.float()
    ties = (exact.view(torch.int32) & 0xFFFF) == 0x8000
    assert ties.sum() > 10
    found = kernels.gated(torch.stack([gate, up]).view(1, -1), SILU)
    assert torch.equal(found[0], exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_finds_them_right(dtype: torch.dtype) -> None:
    assert prove(tiny_config("llama"), AdapterConfig(r=4), native=dtype).fusion == "native"
    assert prove(tiny_config("llama"), AdapterConfig(r=4), native=dtype, fused=False).fusion is None
    assert prove(tiny_config("qwen3"), AdapterConfig(r=4), native=dtype).fusion == "linears"


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_back", "gated", "attend", "attend_back", "cross_entropy"])
def test_a_wrong_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)

    def wrong(*arguments: Any, **named: Any) -> Any:
        result = right(*arguments, **named)
        (result[0] if isinstance(result, tuple) else result).view(-1)[-1] += 0.1
        return result

    monkeypatch.setattr(kernels, name, wrong)
    assert not proof.holds(proof.Sizes(4, 2, 64, 256, 688, 500), torch.float32)
    assert prove(tiny_config("llama"), AdapterConfig(r=4), native=torch.float32).fusion == "layers"


def test_a_layer_wrong_in_16_bits_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fitting.NativeLayer.apply

    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        out: torch.Tensor = right(x, *rest)  # type: ignore[no-untyped-call]
        return out * torch.linspace(0.5, 1.5, out.shape[1]).bfloat16() if x.dtype == torch.bfloat16 else out

    monkeypatch.setattr(fitting.NativeLayer, "apply", wrong)
    assert prove(tiny_config("llama"), AdapterConfig(r=4), native=torch.float32).fusion == "native"
    assert prove(tiny_config("llama"), AdapterConfig(r=4), native=torch.bfloat16).fusion == "layers"


def compiler(folder: Path, text: str) -> str:
    file = folder / "cc"
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.mark.parametrize("text", ["exit 1", "echo 1.0; exit 1", 'echo 1.0; shift $(($# - 1)); echo "" > nothing'])
def test_without_a_working_compiler_the_layers_run_without_kernels(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", compiler(tmp_path, f'[ "$1" = --version ] && {{ {text.split(";")[0]}; exit; }}\n{text}'))
    compiled.library.cache_clear()
    try:
        assert compiled.library() is None
        assert prove(tiny_config("llama"), AdapterConfig(r=4), native=torch.float32).fusion == "layers"
    finally:
        compiled.library.cache_clear()
    assert not list(tmp_path.glob("native/.*")), "nothing half-made is left"


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compiled._compiler() is None


def test_a_damaged_library_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    found = compiled._compiler()
    assert found is not None
    place = tmp_path / "native" / f"{compiled._key(found)}.so"
    place.parent.mkdir()
    place.write_bytes(b"not a library")
    compiled.library.cache_clear()
    try:
        assert compiled.library() is None
    finally:
        compiled.library.cache_clear()


def test_first_starts_at_once_leave_one_library(tmp_path: Path) -> None:
    """Each finds a library that works, whoever was first."""
    code = "from lora_cli.engine.fused.native import kernels; assert kernels.available()"
    environment = os.environ | {"LORA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    assert [place.suffix for place in (tmp_path / "native").iterdir()] == [".so"]


def test_the_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.library() is not None
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    compiled.library.cache_clear()
    assert compiled.library() is not None
