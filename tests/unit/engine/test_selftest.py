"""What is proven at the start of a run, and the page that lists it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig

from lora_cli.config import AdapterConfig
from lora_cli.engine import attention, loss
from lora_cli.engine.miniature import WINDOW, miniature
from lora_cli.engine.selftest import TOLERANCE, prove
from tests.unit.engine.tiny import tiny_config

ROOT = Path(__file__).parents[3]
CURRENT = ("gpt2", "llama", "mistral", "gemma3_text", "gpt_oss", "gptj", "bloom", "lfm2", "jamba", "llama4_text")


@pytest.fixture(scope="module")
def architectures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "scripts" / "architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(architectures: ModuleType) -> None:
    proofs = {one: architectures.prove_architecture(one) for one in architectures.select(list(CURRENT))}
    assert architectures.outdated(architectures.PAGE.read_text(encoding="utf-8"), proofs) == []
    ways = {one.model_type: (proof.packing, proof.loss) for one, proof in proofs.items()}
    assert ways["llama"] == ("documents", "chunked")
    assert ways["gptj"] == ("mask", "chunked")
    assert ways["lfm2"] == ways["bloom"] == ("single", "chunked")


def test_the_page_lists_every_architecture_of_the_script(architectures: ModuleType) -> None:
    text = architectures.PAGE.read_text(encoding="utf-8")
    assert len({one.model_type for one in architectures.ARCHITECTURES}) >= 40
    assert all(f"| {one.name} | {one.model_type} |" in text for one in architectures.ARCHITECTURES)


def test_the_check_notices_another_verdict(architectures: ModuleType) -> None:
    (one,) = architectures.select(["llama"])
    proof = replace(architectures.prove_architecture(one), packing="mask")
    assert architectures.outdated(architectures.PAGE.read_text(encoding="utf-8"), {one: proof})


@pytest.mark.parametrize(
    ("model_type", "layers", "holds"),
    [
        ("lfm2", 3, {"Lfm2ShortConv", "Lfm2Attention"}),
        ("jamba", 5, {"JambaMambaMixer", "JambaAttention", "JambaSparseMoeBlock", "JambaMLP"}),
        ("bamba", 2, {"BambaMixer", "BambaAttention"}),
        ("qwen3_next", 4, {"Qwen3NextGatedDeltaNet", "Qwen3NextAttention"}),
        ("deepseek_v3", 4, {"DeepseekV3MLP", "DeepseekV3MoE"}),
        ("recurrent_gemma", 3, {"RecurrentGemmaRecurrentBlock", "RecurrentGemmaAttention"}),
        ("gemma3_text", 6, {"Gemma3Attention"}),
        ("llama", 1, {"LlamaAttention"}),
    ],
)
def test_a_miniature_holds_each_kind_of_layer_once(
    architectures: ModuleType, model_type: str, layers: int, holds: set[str]
) -> None:
    """A copy of a hybrid that left out its convolutions would pack, and prove nothing."""
    (one,) = architectures.select([model_type])
    model = miniature(AutoConfig.for_model(model_type, **one.settings))
    assert model.config.num_hidden_layers == layers
    assert holds <= {type(module).__name__ for module in model.modules()}


def test_a_miniature_keeps_windows_shorter_than_its_documents() -> None:
    model = miniature(AutoConfig.for_model("gemma3_text"))
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert windows == [WINDOW] * 5 + [None]


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over the whole row instead of each document."""
    real = attention.boundaries

    def one_document(batch: loss.FlatBatch) -> dict[str, object]:
        total = batch.num_tokens
        return real(batch) | {"document_lengths": (total,), "cu_seq_lens_q": torch.tensor([0, total])}

    monkeypatch.setattr(attention, "boundaries", one_document)
    proof = prove(tiny_config("llama"), AdapterConfig(r=4))
    assert proof.packing == "mask"
    assert "documents see each other" in proof.notes[0]


def test_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leak nothing: only packed against alone shows them."""
    from lora_cli.engine import selftest

    real = selftest.flatten

    def running_on(*arguments: object) -> object:
        batch = real(*arguments)  # type: ignore[arg-type]
        return replace(batch, position_ids=batch.position_ids + 3 * batch.position_ids.eq(0).cumsum(1) - 3)

    monkeypatch.setattr(selftest, "flatten", running_on)
    # GPT-2's positions are absolute; with rotary ones, a shift of a whole document is no mistake.
    proof = prove(tiny_config("gpt2"), AdapterConfig(r=4, target_modules=("c_attn",)), attn_implementation="documents")
    assert proof.packing != "documents"


def test_wrong_gradients_of_the_loss_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to a loss summed over tokens, an error in small gradients must not look small."""
    real = loss._ChunkedLoss.backward

    def slightly_off(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if g is None else g * (1 + 1e-3) for g in real(ctx, grad))

    monkeypatch.setattr(loss._ChunkedLoss, "backward", staticmethod(slightly_off))
    proof = prove(tiny_config("llama"), AdapterConfig(r=4))
    assert proof.loss == "full"
    assert proof.loss_error > TOLERANCE


def test_a_full_loss_that_is_asked_for_needs_no_reason() -> None:
    proof = prove(tiny_config("llama"), AdapterConfig(r=4), wanted_loss="full")
    assert (proof.packing, proof.loss, proof.notes) == ("documents", "full", ())


def test_the_benchmark_runs() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_train.py"), "--steps", "2", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "ratio" in done.stdout
