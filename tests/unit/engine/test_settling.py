"""`auto` on a card that isn't there: the estimator is asked about its size alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lora_cli.config import Config
from lora_cli.engine.memory.settling import settle_memory
from lora_cli.engine.selftest import prove
from lora_cli.engine.target import Target
from lora_cli.model.architecture import read_architecture

MODEL = Path(__file__).parents[2] / "models" / "gpt2"
AMPERE = Target("cuda", (8, 0))
GIB = 2**30


def settle(card_gib: float, folder: Path = MODEL, max_length: int = 512, **train: object):
    config = Config.model_validate(
        {
            "model": {"name_or_path": str(folder), "dtype": "bfloat16"},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": max_length},
            "train": {"batch_size": 64, **train},
            "output_dir": "run",
        }
    )
    architecture = read_architecture(config.model)
    return settle_memory(config, architecture, prove(architecture, config.adapter), AMPERE, int(card_gib * GIB))


def test_a_roomy_card_gets_a_large_micro_batch_without_checkpointing():
    settled = settle(80)
    assert settled.config.train.gradient_checkpointing is False
    assert settled.config.train.micro_batch_tokens >= 16_384
    assert settled.memory is not None
    assert settled.memory.fits
    assert settled.warning is None


def test_a_small_card_gets_less_and_still_fits():
    small, large = settle(2), settle(80)
    assert small.config.train.micro_batch_tokens < large.config.train.micro_batch_tokens
    assert small.memory is not None
    assert small.memory.fits


def test_what_is_given_stays_and_a_card_too_small_is_said():
    settled = settle(0.7, micro_batch_tokens=4096)
    assert settled.config.train.micro_batch_tokens == 4096
    assert settled.config.train.gradient_checkpointing is True
    assert settled.memory is not None
    assert not settled.memory.fits
    assert "does not fit" in str(settled.warning)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_that_is_asked_for_is_kept(checkpointing: bool):
    assert settle(40, gradient_checkpointing=checkpointing).config.train.gradient_checkpointing is checkpointing


def test_layers_inputs_go_to_the_host_where_nothing_else_fits(tmp_path: Path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 32, "vocab_size": 512}
    LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, dtype="bfloat16").save_pretrained(tmp_path)

    def long(card_gib: float, **train: object):
        return settle(card_gib, folder=tmp_path, max_length=16_384, batch_size=1, **train)

    needed = long(80, gradient_checkpointing=True, activation_offloading=False).memory.process_bytes / GIB
    roomy, small = long(1.2 * needed), long(0.95 * needed)
    assert roomy.config.train.gradient_checkpointing is small.config.train.gradient_checkpointing is True
    assert roomy.config.train.activation_offloading is False
    assert small.config.train.activation_offloading is True
    assert small.memory is not None
    assert small.memory.fits
    assert needed - small.memory.process_bytes / GIB > 0.8 * 30 * 16_384 * 256 * 2 / GIB
    kept = long(0.95 * needed, activation_offloading=False)
    assert kept.memory is not None
    assert not kept.memory.fits
    assert kept.config.train.activation_offloading is False


def test_what_is_offloaded_is_checkpointed():
    settled = settle(80, activation_offloading=True)
    assert settled.config.train.gradient_checkpointing is True
    assert settled.config.train.activation_offloading is True
