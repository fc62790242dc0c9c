"""`lora train` on CUDA: the same run as on a CPU, up to the arithmetic's precision."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lora_cli import load_config, train

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from make_tiny_gpt2 import build_tiny_gpt2

    folder = tmp_path_factory.mktemp("gpu")
    build_tiny_gpt2(folder / "tiny", pretrain_steps=0)
    demo = Path(__file__).parents[2] / "scripts" / "demo"
    (folder / "run.yaml").write_text(
        f"""
model: {{name_or_path: {folder / "tiny"}}}
data: {{train: {demo / "train.jsonl"}, validation: {demo / "heldout.jsonl"}, max_length: 128, cache: false}}
train: {{max_steps: 20, logging_steps: 1, learning_rate: 1.0e-3}}
output_dir: {folder / "run"}
"""
    )
    return folder


def run(world, name, *overrides):
    config = load_config(world / "run.yaml", [f"output_dir={world / name}", *overrides])
    summary = train(config)
    lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
    return summary, [line["loss"] for line in lines if "loss" in line]


def test_float32_losses_fall_as_the_plan_says(world):
    summary, losses = run(world, "fp32", "model.dtype=float32")
    assert summary.steps == len(losses) == 20
    assert losses[-1] < losses[0]
    assert summary.peak_memory_bytes > 0


@pytest.mark.parametrize("setting", ["model.dtype=bfloat16", "model.dtype=float16"])
def test_16_bits_stay_near_float32(world, setting):
    name = setting.partition("=")[2]
    _, exact = run(world, f"beside-{name}", "model.dtype=float32")
    _, losses = run(world, name, setting)
    assert losses == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantized(world, kind):
    quantization = f"model.quantization={{type: {kind}, allow_partial: true}}"
    _, losses = run(world, kind, "model.dtype=bfloat16", quantization)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers(world, optim):
    _, losses = run(world, optim, f"train.optim={optim}")
    assert losses[-1] < losses[0]


def test_checkpointing_and_micro_batches_change_nothing(world):
    _, plain = run(world, "plain", "model.dtype=float32", "train.gradient_checkpointing=false")
    _, small = run(
        world, "small", "model.dtype=float32", "train.gradient_checkpointing=true", "train.micro_batch_tokens=200"
    )
    assert small == pytest.approx(plain, rel=1e-4)


def test_offloading_changes_nothing(world):
    common = ("model.dtype=float32", "train.gradient_checkpointing=true", "train.micro_batch_tokens=200")
    _, plain = run(world, "kept", *common)
    _, away = run(world, "away", *common, "train.activation_offloading=true")
    assert away == pytest.approx(plain, rel=1e-5)
