"""The fused arithmetic: the gradients and losses of the modules' own code, wherever it is used, and aside elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_cli.config import AdapterConfig, QuantizationConfig
from lora_cli.engine import selftest
from lora_cli.engine.assembly import leave_casting_to_autocast
from lora_cli.engine.computation import Computation
from lora_cli.engine.fused import documents, gated, layer, parts
from lora_cli.engine.fused.fitting import Fusion, fuse
from lora_cli.engine.selftest import prove, prove_run
from lora_cli.engine.step import accumulate
from lora_cli.engine.target import CPU, Target
from lora_cli.engine.world import World
from tests.unit.engine.learning import LENGTHS, PACKED, batches, engine_steps, examples, make_learner, with_adapter
from tests.unit.engine.padded import padded_gradients, padded_steps
from tests.unit.engine.tiny import tiny_config, tiny_model
from tests.unit.estimate.models import make_config

LAYERS = replace(PACKED, fusion="layers")
LINEARS = replace(PACKED, fusion="linears")
LONG = (300, 3, 191, 290, 1, 192, 40)
"""Some of about one length, whose attention is one operation, and some that stand alone."""
MAKES = ("llama", "qwen2", "mistral")
"""Whole layers of these are fused."""
Gradients = dict[str, Tensor]


def live(model_type: str, adapter: AdapterConfig | None = None, **settings: Any) -> nn.Module:
    """A tiny model whose adapter is no zero."""
    model = with_adapter(tiny_model(model_type, **settings), adapter or AdapterConfig(r=4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def gradients(model: Any, computation: Computation, lengths: tuple[int, ...], world: World, tokens: int) -> Gradients:
    rows = examples(lengths)
    learner = make_learner(model, computation)
    for batch in batches(rows, computation, tokens, world):
        accumulate(learner, batch, int(rows.supervised.sum()))
    return {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None}


def apart(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return float(torch.stack([(found[name] - g).norm() for name, g in expected.items()]).norm() / norm)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model_type", MAKES)
def test_whole_layers_give_the_gradients_of_a_padded_batch(model_type: str, tokens: int, world: World) -> None:
    settings = {"sliding_window": None} if model_type == "mistral" else {}
    model = live(model_type, **settings)
    assert fuse(model, "layers") == 2
    found = gradients(model, LAYERS, LENGTHS, world, tokens)
    assert apart(found, padded_gradients(live(model_type, **settings), examples(LENGTHS))) < 2e-6


@pytest.mark.parametrize("fusion", ["layers", "linears"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_long_documents_and_all_groupings_of_heads(fusion: Fusion, heads: int, world: World) -> None:
    settings = {"num_key_value_heads": heads, "max_position_embeddings": 512}
    found = gradients(live("llama", **settings), replace(PACKED, fusion=fusion), LONG, world, 600)
    assert apart(found, padded_gradients(live("llama", **settings), examples(LONG))) < 2e-6


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite"])
def test_linear_layers_give_the_gradients_of_a_padded_batch(model_type: str, world: World) -> None:
    found = gradients(live(model_type), LINEARS, LENGTHS, world, 64)
    assert apart(found, padded_gradients(live(model_type), examples(LENGTHS))) < 2e-6


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_losses_are_those_of_a_padded_loop(model_type: str, tokens: int, world: World) -> None:
    losses = [result.loss for result in engine_steps(model_type, tokens, world, LAYERS)]
    assert losses == pytest.approx([step.loss for step in padded_steps(model_type)], rel=1e-6, abs=0)


def test_blocks_of_tokens_are_summed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(live("llama"), LAYERS, LENGTHS, world, 4096)
    monkeypatch.setattr(gated, "BLOCK", 10)
    assert apart(gradients(live("llama"), LAYERS, LENGTHS, world, 4096), whole) < 1e-6


@pytest.mark.parametrize("fusion", ["layers", "linears"])
def test_recomputed_layers_give_the_same_bits(fusion: Fusion, world: World) -> None:
    computation = replace(PACKED, fusion=fusion)
    plain = gradients(live("llama"), computation, LENGTHS, world, 64)
    model = live("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    found = gradients(model, computation, LENGTHS, world, 64)
    assert all(torch.equal(found[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("fusion", [None, "layers", "linears"])
def test_recomputed_layers_keep_little(fusion: Fusion | None, world: World) -> None:
    """Replacing a layer's forward once went around its checkpointing: the same bits, and all of the memory."""

    def kept_bytes(checkpointing: bool) -> int:
        model, total = live("llama"), 0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += 0 if isinstance(tensor, nn.Parameter) else tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients(model, replace(PACKED, fusion=fusion), LENGTHS, world, 4096)
        return total

    assert kept_bytes(True) < kept_bytes(False) / 2


def test_layers_hand_checkpointing_back() -> None:
    model = live("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    before = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    fuse(model, "layers")
    fuse(model, None)
    after = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert before == after and any(after)


@pytest.mark.parametrize("targets", [("v_proj",), ("q_proj", "down_proj"), ("o_proj", "up_proj")])
def test_some_of_the_linear_layers_adapted(targets: tuple[str, ...], world: World) -> None:
    adapter = AdapterConfig(r=4, target_modules=targets)
    found = gradients(live("qwen2", adapter), LAYERS, LENGTHS, world, 64)
    assert apart(found, padded_gradients(live("qwen2", adapter), examples(LENGTHS))) < 2e-6


def test_layers_below_the_first_adapted_one_keep_nothing(world: World) -> None:
    """Nothing there asks for a gradient, so no node of the backward pass is made."""
    adapter = AdapterConfig(r=4, target_modules=("q_proj", "up_proj"), layers_to_transform=(1,))
    model = live("llama", adapter)
    made: list[bool] = []
    for block in model.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(lambda module, args, out: made.append(out.grad_fn is not None))
    found = gradients(model, LAYERS, LENGTHS, world, 4096)
    assert made == [False, True]
    assert apart(found, padded_gradients(live("llama", adapter), examples(LENGTHS))) < 2e-6


@pytest.mark.parametrize(
    "adapter",
    [AdapterConfig(r=4, use_dora=True), AdapterConfig(r=4, lora_dropout=0.3), AdapterConfig(r=4, bias="lora_only")],
    ids=["dora", "dropout", "bias"],
)
def test_what_isnt_plain_lora_runs_its_own_code(adapter: AdapterConfig, world: World) -> None:
    settings = {"attention_bias": True, "mlp_bias": True}
    assert fuse(live("llama", adapter, **settings), "layers") == 0

    def run(computation: Computation) -> Gradients:
        model = live("llama", adapter, **settings)
        torch.manual_seed(1)
        return gradients(model, computation, LENGTHS, world, 4096)

    own = run(PACKED)
    assert all(torch.equal(grad, own[name]) for name, grad in run(LAYERS).items())


def test_quantized_layers_run_their_own_code() -> None:
    import bitsandbytes as bnb

    model = live("llama")
    for block in model.model.layers:  # type: ignore[union-attr]
        assert parts.layer_of(block) is not None
        lora = block.mlp.up_proj
        lora.base_layer = bnb.nn.Linear4bit(32, 48, bias=False, quant_type="nf4")
        assert parts.layer_of(block) is None
    assert fuse(model, "layers") == 0
    assert fuse(model, "linears") == 2 * 6


def test_a_document_longer_than_the_window_runs_the_layers_own_code(world: World) -> None:
    found = gradients(live("mistral"), LAYERS, LENGTHS, world, 64)
    assert apart(found, padded_gradients(live("mistral"), examples(LENGTHS))) < 2e-6


@pytest.mark.parametrize("fusion", ["layers", "linears"])
@pytest.mark.parametrize("state", ["eval", "no_grad", "disabled"])
def test_evaluation_and_a_disabled_adapter_run_their_own_code(fusion: Fusion, state: str, world: World) -> None:
    def logits(computation: Computation) -> Tensor:
        model = live("llama")
        computation.prepare(model)  # type: ignore[arg-type]
        if state == "disabled":
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(False)
        model.train(state != "eval")
        (batch,) = batches(examples(LENGTHS), computation, 4096, world)
        with torch.no_grad() if state == "no_grad" else nullcontext():
            return computation.token_losses(model, batch)  # type: ignore[arg-type]

    assert torch.equal(logits(replace(PACKED, fusion=fusion)), logits(PACKED))


def test_a_merged_adapter_runs_its_own_code(world: World) -> None:
    model = live("llama")
    before = gradients(model, LAYERS, LENGTHS, world, 4096)
    assert before
    for module in model.modules():
        if parts.plain_lora(module) is not None:
            module.merge()  # type: ignore[operator]
            assert parts.adapted(module) is None


def test_a_copied_model_calls_its_own_parts(world: World) -> None:
    model = live("llama")
    LAYERS.prepare(model)  # type: ignore[arg-type]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = gradients(copied, LAYERS, LENGTHS, world, 64)
    assert apart(found, padded_gradients(live("llama"), examples(LENGTHS))) < 2e-6


def test_own_code_comes_back(world: World) -> None:
    model = live("llama")
    assert fuse(model, "layers") == 2
    assert fuse(model, None) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_bfloat16_is_as_close_to_float32_as_the_layers_own_code(world: World) -> None:
    exact = gradients(live("llama"), PACKED, LONG[1:], world, 4096)

    def in_bfloat16(fusion: Fusion | None) -> float:
        model = live("llama", max_position_embeddings=512)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        leave_casting_to_autocast(model)
        computation = replace(PACKED, dtype=torch.bfloat16, fusion=fusion)
        return apart(gradients(model, computation, LONG[1:], world, 4096), exact)

    own = in_bfloat16(None)
    assert 1e-4 < own < 0.1
    assert in_bfloat16("layers") < 1.3 * own
    assert in_bfloat16("linears") < 1.3 * own


@pytest.mark.parametrize(
    ("model_type", "fusion"),
    [("llama", "layers"), ("qwen2", "layers"), ("gemma", "linears"), ("gemma3_text", "linears"), ("gpt2", None)],
)
def test_the_proof_finds_what_fits(model_type: str, fusion: Fusion | None) -> None:
    """Gemma's layers look like Llama's, but their norms add one to their weights."""
    targets = ("c_attn",) if model_type == "gpt2" else "all-linear"
    assert prove(tiny_config(model_type), AdapterConfig(r=4, target_modules=targets)).fusion == fusion


def test_nothing_is_fused_unasked() -> None:
    assert prove(tiny_config("llama"), AdapterConfig(r=4), fused=False).fusion is None
    assert prove(tiny_config("llama"), None).fusion is None
    config = make_config("unread")
    assert prove_run(config, tiny_config("llama")).fusion == "layers"


@pytest.mark.parametrize(
    ("target", "dtype", "nf4", "fits"),
    [
        (CPU, torch.float32, False, True),
        (CPU, torch.bfloat16, False, True),
        (CPU, torch.float16, False, False),
        (CPU, torch.float32, True, False),
        (Target("cuda", (8, 0)), torch.bfloat16, True, True),
        (Target("cuda", (9, 0)), torch.float16, False, True),
        (Target("cuda", (9, 0)), torch.float32, False, False),
        (Target("cuda", (7, 5)), torch.float16, False, False),
    ],
)
def test_where_it_runs(target: Target, dtype: torch.dtype, nf4: bool, fits: bool) -> None:
    quantization = QuantizationConfig(type="nf4") if nf4 else None
    proof = prove(tiny_config("llama"), AdapterConfig(r=4))
    assert proof.fusion_on(target, dtype, quantization) == ("layers" if fits else None)


def _wrong_scale(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: [t * 1.001 if isinstance(t, Tensor) else t for t in real(*args)]


@pytest.mark.parametrize("what", ["attend_back", "rotate"])
def test_wrong_arithmetic_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a thousandth in one place: whole layers aren't used, and the linear layers still are."""
    if what == "attend_back":
        monkeypatch.setattr(documents, what, _wrong_scale(documents.attend_back))
    else:
        real = layer.rotate
        monkeypatch.setattr(layer, what, lambda x, cos, sin, **way: real(x, cos * 1.001, sin, **way))
    assert prove(tiny_config("llama"), AdapterConfig(r=4)).fusion == "linears"


def test_a_failure_of_the_arithmetic_is_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(selftest, "fuse", lambda model, fusion: fails() if fusion else 0)
    proof = prove(tiny_config("llama"), AdapterConfig(r=4))
    assert (proof.fusion, proof.packing, proof.loss) == (None, "documents", "chunked")
