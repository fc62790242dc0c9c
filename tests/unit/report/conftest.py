from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.plan import (
    DataAccount,
    Engine,
    Memory,
    ModelFacts,
    ModuleKind,
    ParameterReport,
    Plan,
    Steps,
    Writes,
)
from lora_cli.report.events import Evaluated, Event, Logged, Saved, Stepped, Summary

GIB = 2**30


def llama_parameters(rank: int) -> ParameterReport:
    """Llama-3.1-8B with a LoRA of `rank` on all seven kinds of linear layer."""
    hidden, key_value, inner, layers, vocabulary = 4096, 1024, 14336, 32, 128256
    kinds = [ModuleKind("embed_tokens", 1, f"{vocabulary} x {hidden}", vocabulary * hidden, 0)]
    for name, rows, columns in (
        ("q_proj", hidden, hidden),
        ("k_proj", key_value, hidden),
        ("v_proj", key_value, hidden),
        ("o_proj", hidden, hidden),
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        trainable = layers * rank * (rows + columns)
        kinds.append(ModuleKind(name, layers, f"{rows} x {columns}", layers * rows * columns, trainable))
    for name, modules in (("input_layernorm", layers), ("post_attention_layernorm", layers), ("norm", 1)):
        kinds.append(ModuleKind(name, modules, str(hidden), modules * hidden, 0))
    kinds.append(ModuleKind("lm_head", 1, f"{vocabulary} x {hidden}", vocabulary * hidden, 0))
    trainable = sum(kind.trainable_parameters for kind in kinds)
    return ParameterReport(trainable, trainable + sum(kind.base_parameters for kind in kinds), tuple(kinds))


@pytest.fixture
def parameters() -> ParameterReport:
    return llama_parameters(16)


@pytest.fixture
def plan(parameters: ParameterReport) -> Plan:
    places = tuple(f"data/train.jsonl:{line}" for line in (88, 410, 1207, *range(2000, 2010)))
    return Plan(
        model=ModelFacts(
            name="meta-llama/Llama-3.1-8B-Instruct",
            revision="0e9e39f249a16976918f6564b8830bc894c89659",
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            quantization="nf4, double quant",
            adapter="r 16, alpha 32, 7 kinds of linear layer",
        ),
        parameters=parameters,
        data=DataAccount(12480, 12467, 41, 13, 5214880, 1799134, 2048, 3011, {"answer empty": places}),
        validation=DataAccount(500, 500, 0, 0, 208012, 71204, 1800, 1800),
        steps=Steps(2340, 780, 3.0, 16, 70, 2e-4, "cosine"),
        engine=Engine("NVIDIA GeForce RTX 4090", 1, 8192, "documents", "chunked", True, 0.0),
        memory=Memory(int(11.5 * GIB), int(11.0 * GIB), int(23.6 * GIB)),
        writes=Writes("runs/docs", 480 * 2**20, "every 200 steps", 214 * GIB),
        warnings=("41 rows lose their end at data.max_length 2048; 3072 keeps them all",),
    )


@pytest.fixture
def summary(parameters: ParameterReport) -> Summary:
    return Summary(
        steps=2340,
        num_tokens=15644640,
        num_supervised_tokens=5394630,
        train_seconds=6480.0,
        tokens_per_second=2401.3,
        first_loss=1.4127,
        final_loss=1.0219,
        loss_span=50,
        first_eval_loss=1.3981,
        final_eval_loss=1.0346,
        best_eval_loss=1.0341,
        best_step=2200,
        peak_memory_bytes=int(11.4 * GIB),
        output_dir="runs/docs",
        adapter_dir="runs/docs/adapter",
        adapter_bytes=160 * 2**20,
        stopped=None,
        parameters=parameters,
    )


def training_line(step: int, steps_per_epoch: int = 780) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / steps_per_epoch,
        "loss": 1.02 + 0.4 * math.exp(-step / 300),
        "learning_rate": 9.5e-05,
        "grad_norm": 0.41,
        "num_tokens": 67000,
        "num_supervised_tokens": 23000,
        "tokens_per_second": 2398.4,
        "peak_memory_bytes": int(11.4 * GIB),
    }


@pytest.fixture
def line() -> Callable[..., dict[str, Any]]:
    return training_line


@pytest.fixture
def stream() -> list[Event]:
    """Forty steps out of 2,340, logged every ten, evaluated and saved at the thirtieth."""
    events: list[Event] = []
    for step in range(1, 41):
        values = training_line(step)
        left = (2340 - step) * 2.79
        events.append(
            Stepped(
                step,
                2340,
                values["epoch"],
                9.9999,  # the step's own loss, which stands in no file
                values["learning_rate"],
                values["grad_norm"],
                6700,
                2300,
                values["tokens_per_second"],
                values["peak_memory_bytes"],
                step * 2.79,
                left,
            )
        )
        if step % 10 == 0:
            events.append(Logged(values, 2340, left))
        if step == 30:
            events.append(Evaluated(30, 1.3714, True))
            events.append(Saved(30, Path("runs/docs/checkpoints/step-00000030")))
    return events
