"""`auto` on a card that isn't there: the estimator is asked about its size alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from lora_cli.config import Config
from lora_cli.engine.memory.need import Rehearsals
from lora_cli.engine.memory.rehearsal import rehearse
from lora_cli.engine.memory.settling import settle_memory
from lora_cli.engine.selftest import prove
from lora_cli.engine.target import Target
from lora_cli.model.architecture import read_architecture

MODEL = Path(__file__).parents[2] / "models" / "gpt2"
AMPERE = Target("cuda", (8, 0))
GIB = 2**30


def settle(
    card_gib: float,
    beside: Rehearsals | None = None,
    folder: Path = MODEL,
    max_length: int = 512,
    **train: object,
):
    config = Config.model_validate(
        {
            "model": {"name_or_path": str(folder), "dtype": "bfloat16"},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": max_length},
            "train": {"batch_size": 64, **train},
            "output_dir": "run",
        }
    )
    architecture = read_architecture(config.model)
    proof = prove(architecture, config.adapter)
    return settle_memory(config, architecture, proof, AMPERE, int(card_gib * GIB), beside)


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


def test_a_run_beside_another_is_rehearsed_only_where_its_tensors_are_others(monkeypatch: pytest.MonkeyPatch):
    """A sweep's members: those that differ in numbers alone keep their own numbers, and cost no rehearsal."""
    rehearsed: list[int] = []

    def counted(config: Config, *others: object):
        rehearsed.append(config.adapter.r)
        return rehearse(config, *others)

    monkeypatch.setattr("lora_cli.engine.memory.need.rehearse", counted)
    first = settle(80)
    own = len(rehearsed)
    assert own > 0
    like = settle(80, first.rehearsals, learning_rate=1e-3, weight_decay=0.1)
    assert len(rehearsed) == own
    assert (like.config.train.learning_rate, like.config.train.weight_decay) == (1e-3, 0.1)
    assert first.config.train.learning_rate != 1e-3
    assert like.memory == first.memory and like.config.train.micro_batch_tokens == first.config.train.micro_batch_tokens
    other = settle(80, first.rehearsals, optim="sgd")
    assert len(rehearsed) == 2 * own and other.memory != first.memory
    assert other.memory == settle(80, optim="sgd").memory


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
