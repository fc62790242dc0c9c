"""The tracer's proof: on `meta` a step lives through the very storages that it lives through on a CPU, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lora_cli.config import Config
from lora_cli.engine.assembly import attach, leave_out_side_outputs
from lora_cli.engine.computation import Computation
from lora_cli.engine.memory.rehearsal import MicroBatches, learner_of, rehearse, take_steps
from lora_cli.engine.memory.trace import Trace
from lora_cli.engine.memory.tracer import Tracer
from lora_cli.engine.target import CPU, Target
from lora_cli.model.weights import load_base
from tests.unit.estimate.models import SPECIALS, make_config, tiny_architecture

EAGER = ("gemma2", "gpt_oss")
"""Their attention has soft caps or sinks, which SDPA doesn't know."""

ALONE = ("falcon",)
"""Their attention doesn't hear of documents: one example at a time."""

SHAPE = MicroBatches((32, 20), per_step=2)


@pytest.mark.parametrize("name", SPECIALS)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
def test_meta_agrees_with_the_cpu(name: str, checkpointing: bool) -> None:
    config = make_config("unread", train={"gradient_checkpointing": checkpointing})
    _assert_same(tiny_architecture(name), config, _computation(name))


@pytest.mark.parametrize("name", SPECIALS)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
def test_meta_agrees_with_the_cpu_in_full_fine_tuning(name: str, checkpointing: bool) -> None:
    config = make_config("unread", adapter=None, train={"gradient_checkpointing": checkpointing})
    _assert_same(tiny_architecture(name), config, _computation(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_meta_agrees_with_the_cpu_for_transformers_own_loss(name: str) -> None:
    computation = Computation("documents", "full", torch.float32, "sdpa")
    _assert_same(tiny_architecture(name), make_config("unread", adapter=None), computation)


@pytest.mark.parametrize("name", SPECIALS)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
def test_meta_agrees_with_the_cpu_on_nf4(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """bitsandbytes' own packed weights, loaded from a file as `lora train` loads them."""
    architecture, computation = tiny_architecture(name), _computation(name)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path)
    double = name in ("llama", "qwen2")
    quantization = {"type": "nf4", "double_quant": double, "allow_partial": True}
    train = {"gradient_checkpointing": checkpointing}
    config = make_config(tmp_path, model={"quantization": quantization}, train=train)
    base = load_base(
        config.model,
        architecture,
        device=torch.device("cpu"),
        dtype=computation.dtype,
        attention=computation.attention,
    )
    real = _steps_on_cpu(base, architecture, config, computation)
    rehearsed = rehearse(config, architecture, computation, CPU, _shape(computation))
    assert _steps(real), "nothing was recorded"
    assert _steps(rehearsed) == _steps(real)


def test_meta_agrees_with_the_cpu_in_bfloat16() -> None:
    computation = Computation("documents", "chunked", torch.bfloat16, "sdpa")
    architecture, config = tiny_architecture("llama"), make_config("unread")
    rehearsed = rehearse(config, architecture, computation, CPU, _shape(computation))
    assert _peaks(rehearsed) == _peaks(_on_cpu(architecture, config, computation))


@pytest.mark.parametrize("fusion", ["layers", "linears"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "plain"])
def test_meta_agrees_with_the_cpu_in_fused_arithmetic(fusion: Any, checkpointing: bool) -> None:
    config = make_config("unread", train={"gradient_checkpointing": checkpointing})
    _assert_same(tiny_architecture("llama"), config, replace(_computation("llama"), fusion=fusion))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_meta_agrees_with_the_cpu_for_other_optimizers(optimizer: str) -> None:
    _assert_same(tiny_architecture("llama"), make_config("unread", train={"optim": optimizer}), _computation("llama"))


@pytest.mark.parametrize("name", SPECIALS)
def test_every_architecture_can_be_traced_for_cuda(name: str) -> None:
    computation = _computation(name, torch.bfloat16)
    target = Target("cuda", (8, 0))
    trace = rehearse(make_config("unread"), tiny_architecture(name), computation, target, _shape(computation))
    assert {birth.kind for birth in trace.births} >= {"adapters", "gradients", "optimizer", "logits and loss"}


def _computation(name: str, dtype: torch.dtype = torch.float32) -> Computation:
    packing = "single" if name in ALONE else "documents"
    return Computation(packing, "chunked", dtype, "eager" if name in EAGER else "sdpa")


def _shape(computation: Computation) -> MicroBatches:
    return MicroBatches((32,), per_step=2) if computation.packing == "single" else SHAPE


def _assert_same(architecture: PretrainedConfig, config: Config, computation: Computation) -> None:
    real = _on_cpu(architecture, config, computation)
    rehearsed = rehearse(config, architecture, computation, CPU, _shape(computation))
    assert _steps(real), "nothing was recorded"
    assert _steps(rehearsed) == _steps(real)
    assert _peaks(rehearsed) == _peaks(real)


def _on_cpu(architecture: PretrainedConfig, config: Config, computation: Computation) -> Trace:
    """The same two steps on real tensors."""
    dtype = torch.float32 if config.adapter is None else computation.dtype
    base = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=computation.attention)
    return _steps_on_cpu(base.requires_grad_(False), architecture, config, computation)


def _steps_on_cpu(
    base: PreTrainedModel, architecture: PretrainedConfig, config: Config, computation: Computation
) -> Trace:
    tracer = Tracer("cpu", CPU, architecture.vocab_size)
    leave_out_side_outputs(base)
    model = attach(base, config, computation)
    with tracer:
        tracer.trace.mark("load")
        tracer.register(model.parameters(), "weights")
        tracer.register(model.buffers(), "weights")
        take_steps(learner_of(model, config, computation, CPU, tracer), CPU, _shape(computation), tracer)
    return tracer.trace


def _steps(trace: Trace) -> list[int]:
    """Sizes in the order of births (positive) and deaths (negative), in the second step."""
    start = next(position for position, name in trace.marks if name == "step 2")
    end = next(position for position, name in trace.marks if name == "end")
    events = trace.events[start:end]
    return [trace.births[abs(e) - 1].size_bytes * (1 if e > 0 else -1) for e in events]


def _peaks(trace: Trace) -> tuple[int, int]:
    """The most bytes alive at once, and those alive at the end."""
    end = next(position for position, name in trace.marks if name == "end")
    alive = peak = 0
    for event in trace.events[:end]:
        alive += trace.births[abs(event) - 1].size_bytes * (1 if event > 0 else -1)
        peak = max(peak, alive)
    return peak, alive
