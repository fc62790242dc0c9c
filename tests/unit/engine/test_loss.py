"""The loss in chunks is transformers' own, with the gradients of everything that is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.config import AdapterConfig
from lora_cli.engine import loss
from lora_cli.engine.batch import FlatBatch, flat_batch
from lora_cli.engine.computation import Computation
from tests.unit.engine.learning import LENGTHS, PACKED, examples, with_adapter
from tests.unit.engine.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
ADAPTERS = {
    "lora": AdapterConfig(r=4),
    "lora on the head": AdapterConfig(r=4, target_modules=("q_proj", "lm_head")),
    "head saved": AdapterConfig(r=4, modules_to_save=("lm_head",)),
    "full": None,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks to a batch, the last one short; on these sizes one would do."""
    monkeypatch.setattr(loss, "_CHUNK_VALUES", {"cpu": 17 * VOCABULARY})


def batch() -> FlatBatch:
    return flat_batch(examples(LENGTHS), range(len(LENGTHS)), CPU)


def live(model: PreTrainedModel, adapter: AdapterConfig | None) -> PreTrainedModel:
    """With everything that `adapter` trains, and no B at zero."""
    if adapter is None:
        return model.requires_grad_(True).train()
    found = with_adapter(model, adapter)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return found


def loss_and_gradients(model: PreTrainedModel, computation: Computation) -> tuple[Tensor, dict[str, Tensor]]:
    computation.prepare(model)
    total = computation.loss_sum(model, batch()) / 7  # a gradient other than 1 arrives in backward
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total.detach(), found


def assert_same(model: PreTrainedModel, expect: frozenset[str] = frozenset()) -> None:
    full, full_grads = loss_and_gradients(model, replace(PACKED, loss="full"))
    chunked, chunked_grads = loss_and_gradients(model, PACKED)
    assert chunked.item() == pytest.approx(full.item(), rel=1e-6)
    assert chunked_grads.keys() == full_grads.keys()
    assert all(any(part in name for name in full_grads) for part in expect), "what it is about must be trained"
    for name, gradient in full_grads.items():
        assert (chunked_grads[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-6), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_whatever_is_trained_gets_its_gradient(name: str, tied: bool) -> None:
    model = live(tiny_model("llama", tie_word_embeddings=tied), ADAPTERS[name])
    about = {
        "lora": {"q_proj.lora_A"},
        "lora on the head": {"lm_head.lora_A", "lm_head.lora_B"},
        "head saved": {"lm_head.modules_to_save"},
        "full": {"embed_tokens"} if tied else {"embed_tokens", "lm_head"},
    }
    assert_same(model, frozenset(about[name]))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gemma3_text", "cohere", "granite"])
@pytest.mark.parametrize("adapter", [AdapterConfig(r=4), None], ids=["lora", "full"])
def test_what_stands_between_backbone_and_logits_is_the_models_own(
    model_type: str, adapter: AdapterConfig | None
) -> None:
    """Gemma 2 caps its logits, Cohere scales them, Granite divides them."""
    assert_same(live(tiny_model(model_type), adapter))


def test_a_bare_head_would_be_wrong_there() -> None:
    """The test above could not fail if those settings did nothing."""
    for model_type, setting in (("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")):
        model, plain = tiny_model(model_type), tiny_model(model_type, **{setting: 1.0})
        losses = [PACKED.loss_sum(m, batch()).item() for m in (model, plain) if PACKED.prepare(m) is None]
        assert abs(losses[0] - losses[1]) > 0.01 * losses[0]


@pytest.mark.parametrize("way", ["chunked", "full"])
def test_losses_of_single_tokens_add_up(way: str) -> None:
    model = tiny_model("gemma2")
    computation = replace(PACKED, loss=way)
    computation.prepare(model)
    with torch.no_grad():
        total = computation.loss_sum(model, batch())
    each = computation.token_losses(model, batch())
    assert each.shape == (batch().num_supervised_tokens,)
    assert each.sum().item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("way", ["chunked", "full"])
def test_a_micro_batch_without_trained_tokens_adds_nothing(way: str) -> None:
    """A mean over no token would be NaN, and poison the step."""
    rows = examples(LENGTHS)
    silent = flat_batch(rows, [len(rows) - 1], CPU)
    assert silent.num_supervised_tokens == 0
    model = live(tiny_model("llama"), AdapterConfig(r=4))
    computation = replace(PACKED, loss=way)
    computation.prepare(model)
    total = computation.loss_sum(model, silent)
    total.backward()
    assert total.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = live(tiny_model("llama"), AdapterConfig(r=4))
    PACKED.prepare(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    PACKED.loss_sum(model, batch()).backward()
    assert max(rows) == 17
    assert sum(rows) == batch().num_supervised_tokens
