"""The end of a plain model on compiled kernels: its losses and gradients are exact, and whatever isn't plain runs its
own code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.config import AdapterConfig
from lora_cli.engine import computation, ending, loss
from lora_cli.engine.batch import FlatBatch, flat_batch
from lora_cli.engine.ending import ending_of
from lora_cli.engine.fused.native import head, kernels
from lora_cli.engine.head import trained_in_head
from lora_cli.engine.world import World
from tests.unit.engine.learning import LENGTHS, PACKED, engine_steps, examples
from tests.unit.engine.padded import padded_gradients, padded_steps
from tests.unit.engine.test_fused import apart, gradients, live
from tests.unit.engine.test_native import NATIVE, narrowed

pytestmark = pytest.mark.skipif(not kernels.available() or not kernels.has_tiles(), reason="needs matrix tiles")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny batches, as if they were worth it."""
    monkeypatch.setattr(head, "FEWEST", {torch.float32: 1, torch.bfloat16: 1})


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In float64."""
    wide = x.double().requires_grad_()
    logits = F.linear(wide, weight.double(), None if bias is None else bias.double())
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 32, 5), (32, 64, 128), (70, 96, 300), (1100, 32, 129)])
def test_losses_and_gradients(rows: int, width: int, vocabulary: int, dtype: torch.dtype, biased: bool) -> None:
    draw = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(shape, generator=draw).to(dtype) for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    targets[-1] = vocabulary - 1
    given = (x, weight, bias if biased else None, targets)
    losses, grad = head.losses(*given)
    expected_losses, expected_grad = exact(*given)
    assert losses.dtype == torch.float32
    assert grad.dtype == dtype
    assert off(losses, expected_losses) < 3e-7
    assert off(grad, expected_grad) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_more_rows_than_go_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ROWS", 32)
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(333, 64, generator=draw), torch.randn(200, 64, generator=draw)
    targets = torch.randint(200, (333,), generator=draw)
    losses, grad = head.losses(x, weight, None, targets)
    expected_losses, expected_grad = exact(x, weight, None, targets)
    assert off(losses, expected_losses) < 3e-7
    assert off(grad, expected_grad) < 1e-6


def test_logits_that_rise_from_panel_to_panel() -> None:
    """What is counted from grows with each panel, the last one too, by more than float32 holds."""
    width, vocabulary = 32, 5 * 128
    weight = torch.zeros(vocabulary, width)
    weight[:, 0] = torch.linspace(0, 300, vocabulary)
    weight[:, 1:] = torch.randn(vocabulary, width - 1, generator=torch.Generator().manual_seed(2)) * 0.1
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(3))
    x[:, 0] = 1.0
    targets = torch.arange(40) * 16
    losses, grad = head.losses(x, weight, None, targets)
    expected_losses, expected_grad = exact(x, weight, None, targets)
    assert off(losses, expected_losses) < 3e-7
    assert off(grad, expected_grad) < 1e-6


def test_a_well_predicted_token_keeps_its_small_gradient_in_16_bits() -> None:
    """The share of the target is 1 but for a millionth: rounded to eight bits, it would be all of the gradient."""
    width, vocabulary = 32, 100
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(4)).bfloat16()
    x = weight[:40].clone()
    targets = torch.arange(40)
    losses, grad = head.losses(x, weight, None, targets)
    expected_losses, expected_grad = exact(x, weight, None, targets)
    assert (losses - expected_losses).abs().max() < 2e-6
    small = (expected_losses > 1e-5) & (expected_losses < 1e-3)
    assert small.sum() > 5
    assert all(off(*pair) < 2e-2 for pair in zip(grad[small], expected_grad[small], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_no_loss(value: float, dtype: torch.dtype) -> None:
    """A step must see that something broke."""
    x, weight = torch.randn(3, 32).to(dtype), torch.randn(130, 32).to(dtype)
    x[1, 5] = value
    losses, _ = head.losses(x, weight, None, torch.tensor([0, 1, 129]))
    assert torch.isfinite(losses).tolist() == [True, False, True]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was found of each model that took the ending."""
    found: list[Any] = []
    real = loss.ending_losses

    def noting(ending: Any, *args: Any) -> Tensor:
        found.append(ending)
        return real(ending, *args)

    monkeypatch.setattr(loss, "ending_losses", noting)
    return found


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_padded_batch(tokens: int, tied: bool, world: World, taken: list[Any]) -> None:
    model = live("llama", tie_word_embeddings=tied)
    found = gradients(model, NATIVE, LENGTHS, world, tokens)
    expected = padded_gradients(live("llama", tie_word_embeddings=tied), examples(LENGTHS))  # type: ignore[arg-type]
    assert apart(found, expected) < 2e-6
    assert {id(each.norm) for each in taken} == {id(model.model.norm)}  # type: ignore[union-attr]


def test_losses_are_those_of_a_padded_loop(world: World, taken: list[Any]) -> None:
    losses = [result.loss for result in engine_steps("llama", 64, world, NATIVE)]
    assert losses == pytest.approx([step.loss for step in padded_steps("llama")], rel=1e-6, abs=0)
    assert taken


def test_bfloat16_is_nearer_than_chunks(world: World, taken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = padded_gradients(live("llama"), examples(LENGTHS))  # type: ignore[arg-type]
    way = replace(NATIVE, dtype=torch.bfloat16)
    ours = apart(gradients(narrowed(live("llama"), torch.bfloat16), way, LENGTHS, world, 64), expected)
    assert taken
    monkeypatch.setattr(loss, "ending_of", lambda *_: None)
    chunks = apart(gradients(narrowed(live("llama"), torch.bfloat16), way, LENGTHS, world, 64), expected)
    assert ours < 1.05 * chunks


def test_groups_have_gradients_of_their_own(world: World) -> None:
    model = live("llama")
    NATIVE.prepare(model)  # type: ignore[arg-type]
    batch = _batch()
    groups = torch.arange(batch.num_supervised_tokens) % 3

    def run() -> tuple[Tensor, Tensor]:
        sums = NATIVE.group_losses(model, batch, groups, 3)  # type: ignore[arg-type]
        (sums * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return sums.detach(), grads

    assert ending_of(model, 8) is not None  # type: ignore[arg-type]
    found = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "ending_of", lambda *_: None)
        expected = run()
    for ours, theirs in zip(found, expected, strict=True):
        assert off(ours, theirs) < 2e-6


def _batch() -> FlatBatch:
    return flat_batch(examples(LENGTHS), range(len(LENGTHS)), torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
def test_a_model_that_does_more_to_its_logits_keeps_its_head(model_type: str) -> None:
    """Gemma 2 caps them at 5 here, Cohere and Granite scale them."""
    assert ending_of(live(model_type), 8) is None  # type: ignore[arg-type]


def test_a_cap_far_above_the_logits_is_found() -> None:
    assert ending_of(live("gemma2", final_logit_softcapping=1e4), 8) is None  # type: ignore[arg-type]


def test_a_norm_that_adds_one_to_its_weight_stays_the_models_own(
    world: World, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computation, "fuse", lambda *_: 0)  # its layers would be no Gemma's, which is proven elsewhere
    found = gradients(live("gemma"), NATIVE, LENGTHS, world, 64)
    assert apart(found, padded_gradients(live("gemma"), examples(LENGTHS))) < 2e-6  # type: ignore[arg-type]
    assert taken
    assert all(each.norm is None for each in taken)


def test_what_a_backbone_does_behind_its_norm_is_seen(world: World, taken: list[Any]) -> None:
    def doubled() -> Any:
        model: Any = live("llama")
        own = model.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * 2
            return output

        model.model.forward = forward
        return model

    found = gradients(doubled(), NATIVE, LENGTHS, world, 64)
    assert apart(found, gradients(doubled(), PACKED, LENGTHS, world, 64)) < 2e-6
    assert taken[0].norm is not None
    assert all(each.norm is None for each in taken[1:])
    assert taken[1:]


@pytest.mark.parametrize(
    "adapter",
    [AdapterConfig(r=4, target_modules=("q_proj", "lm_head")), AdapterConfig(r=4, modules_to_save=("lm_head",))],
)
def test_a_trained_head_is_no_frozen_one(adapter: AdapterConfig) -> None:
    assert ending_of(live("llama", adapter), 8) is None  # type: ignore[arg-type]


def test_whatever_is_trained_behind_the_backbone_is_found() -> None:
    model: Any = live("llama")
    model.between = nn.Sequential(nn.Linear(32, 32))
    assert {id(p) for p in trained_in_head(model, model.model)} == {id(p) for p in model.between.parameters()}
    model.get_output_embeddings = lambda: model.model.embed_tokens  # some have no head of their own
    del model.lm_head, model.between
    assert trained_in_head(model, model.model) == []
    model.model.embed_tokens.requires_grad_(True)
    assert trained_in_head(model, model.model) == [model.model.embed_tokens.weight]


def test_changes_are_seen() -> None:
    model: Any = live("llama")
    assert ending_of(model, 8) is not None
    model.lm_head.requires_grad_(True)
    assert ending_of(model, 8) is None
    model.lm_head.requires_grad_(False)
    assert ending_of(model, 8).norm is model.model.norm  # type: ignore[union-attr]
    model.model.norm.requires_grad_(True)
    assert ending_of(model, 8).norm is None  # type: ignore[union-attr]
    model.model.norm.requires_grad_(False)
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert ending_of(model, 8) is None
    hook.remove()
    assert ending_of(model, 8) is not None
    model.lm_head = nn.Linear(32, 97).double().requires_grad_(False)
    assert ending_of(model, 8) is None


def test_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = live("llama")
    monkeypatch.setattr(head, "FEWEST", {torch.float32: 64})
    assert ending_of(model, 64) is not None
    assert ending_of(model, 63) is None
    monkeypatch.setattr(head, "WIDEST", 16)
    assert ending_of(model, 64) is None


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = head.losses

    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        losses, grad = right(*args)
        return losses, grad * (1 + 1e-3)

    monkeypatch.setattr(head, "losses", wrong)
    head.holds.cache_clear()
    try:
        assert ending_of(live("llama"), 8) is None  # type: ignore[arg-type]
    finally:
        head.holds.cache_clear()


def test_evaluation_runs_the_models_own_head(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = live("llama")
    NATIVE.prepare(model)
    monkeypatch.setattr(loss, "ending_losses", lambda *_: pytest.fail("the kernel ran"))
    with torch.no_grad():
        assert NATIVE.loss_sum(model, _batch()) > 0


def test_trials_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def note(name: str) -> None:
        real = getattr(ending, name)
        monkeypatch.setattr(ending, name, lambda *args: (tried.append(name), real(*args))[1])

    note("_is_plain")
    note("_is_rms_norm")
    model: Any = live("llama")
    for _ in range(3):
        ending_of(model, 8)
    assert tried == ["_is_plain", "_is_rms_norm"]
