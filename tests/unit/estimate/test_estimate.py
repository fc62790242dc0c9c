"""Estimates of a tiny model: parts that add up, verdicts, and suggestions that hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.config import Config
from lora_cli.engine.memory.choice import choose, largest_micro_batch
from lora_cli.engine.memory.need import MARGIN, Rehearsals
from lora_cli.engine.selftest import prove
from lora_cli.engine.target import Target
from lora_cli.errors import ModelError, UserError
from lora_cli.estimate import Estimate, estimate_vram
from lora_cli.estimate.cards import CARDS, find_card
from lora_cli.report.estimate import render_estimate
from tests.unit.estimate.models import make_config, tiny_architecture

GIB, MIB = 2**30, 2**20
CONTEXT_GIB = 0.5


@pytest.fixture(scope="module")
def estimate(tiny_llama: Path) -> Estimate:
    return estimate_vram(make_config(tiny_llama))


def test_parts_add_up_to_what_the_process_takes(estimate: Estimate) -> None:
    assert sum(estimate.components.values()) == estimate.process_bytes
    assert estimate.peak_allocated_bytes <= estimate.peak_reserved_bytes < estimate.process_bytes


def test_json_holds_the_contract(estimate: Estimate) -> None:
    printed = json.loads(json.dumps(estimate.as_json()))
    assert printed.keys() >= {"peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "components", "cards"}
    assert printed["cards"].keys() == {card.name for card in CARDS}
    assert all(fits is True for fits in printed["cards"].values())


def test_adapter_gradients_and_optimizer_are_what_the_counts_say(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, tokens=2048, max_length=128)  # the peak is then in the backward pass
    found = estimate_vram(config)
    rank, layers, width, wide, keys = 16, 2, 64, 128, 32
    per_layer = rank * (2 * (width + width) + 2 * (width + keys) + 3 * (width + wide))
    assert found.components["adapters"] == 4 * layers * per_layer
    assert found.components["optimizer"] >= 2 * found.components["adapters"]


def test_more_tokens_need_more(tiny_llama: Path) -> None:
    needs = [estimate_vram(make_config(tiny_llama, tokens=n)).peak_allocated_bytes for n in (64, 128, 256)]
    assert needs == sorted(needs)
    assert len(set(needs)) == 3


def test_checkpointing_needs_less_than_keeping_everything(tiny_llama: Path) -> None:
    def saved(checkpointing: bool) -> int:
        train = {"gradient_checkpointing": checkpointing}
        return estimate_vram(make_config(tiny_llama, tokens=512, train=train)).components["saved activations"]

    assert saved(True) < 0.5 * saved(False)


def test_quantized_weights_are_half_a_byte_each(tiny_llama: Path) -> None:
    quantized = {"quantization": {"type": "nf4", "double_quant": False}}
    found = estimate_vram(make_config(tiny_llama, model=quantized))
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert found.components["quantized weights"] == weights // 2
    assert found.components["quantization state"] >= weights // 64 * 4


def test_full_fine_tuning_keeps_weights_gradients_and_two_moments(tiny_llama: Path) -> None:
    found = estimate_vram(make_config(tiny_llama, adapter=None))
    weights = found.components["trained weights"]
    parameters = 2 * 128 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert weights == 4 * parameters


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused", "sgd", "adafactor"])
def test_every_kind_of_optimizer_can_be_traced(tiny_llama: Path, optimizer: str) -> None:
    assert estimate_vram(make_config(tiny_llama, train={"optim": optimizer})).peak_allocated_bytes > 0


def test_a_card_that_is_too_small_is_refused_with_a_change_that_fits(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, tokens=8192, max_length=1024, train={"gradient_checkpointing": False})
    too_little = (estimate_vram(config).process_bytes - 4 * MIB) / GIB
    refused = estimate_vram(config, vram_gib=too_little)
    assert refused.verdict == "no"
    assert refused.fits is False
    last = refused.changes[-1]
    assert last.fits
    keys = dict(setting.split("=") for setting in last.settings)
    changed = config.model_copy(
        update={"train": config.train.model_copy(update={k.split(".")[1]: json.loads(v) for k, v in keys.items()})}
    )
    assert estimate_vram(changed, vram_gib=too_little).verdict == "yes"


def test_auto_takes_a_larger_micro_batch_on_a_larger_card(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, tokens="auto", max_length=512, train={"gradient_checkpointing": "auto"})
    architecture = tiny_architecture("llama")
    rehearsals = Rehearsals(architecture, prove(architecture, config.adapter))
    target = Target("cuda", (8, 0))
    small = choose(rehearsals, config, target, int(CONTEXT_GIB * GIB) + 60 * MIB)
    large = choose(rehearsals, config, target, 24 * GIB)
    assert small is not None
    assert large is not None
    assert large.config.train.gradient_checkpointing is False
    assert small.shape.num_tokens < large.shape.num_tokens == 512 * config.train.batch_size
    assert small.fits(int(CONTEXT_GIB * GIB) + 60 * MIB)
    assert choose(rehearsals, config, target, int(CONTEXT_GIB * GIB)) is None


class Kinked:
    """Rehearsals of a run that takes 1 MiB a token up to 2,048 tokens, and a tenth of it from there on."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def need(self, config: Config, target: Target) -> Any:
        tokens = config.train.micro_batch_tokens
        assert isinstance(tokens, int)
        self.asked.append(tokens)
        taken = (min(tokens, 2048) + max(0, tokens - 2048) // 10) * MIB
        shape = SimpleNamespace(num_tokens=tokens)
        return SimpleNamespace(process_bytes=taken, shape=shape, fits=lambda card: taken * (1 + MARGIN) <= card)


def test_the_largest_micro_batch_is_found_where_memory_grows_less_steeply_later() -> None:
    config = make_config(Path("nowhere"), max_length=1024, train={"batch_size": 64})
    rehearsals: Any = Kinked()
    found = largest_micro_batch(rehearsals, config, Target("cuda", (8, 0)), 4 * GIB)
    assert found is not None
    room = 4 * GIB / (1 + MARGIN) / MIB
    most = 2048 + 10 * (room - 2048)
    assert most / 1.1 - 1024 <= found.shape.num_tokens <= most
    assert len(rehearsals.asked) <= 6


def test_expandable_segments_are_named_where_they_make_it_fit(estimate: Estimate) -> None:
    tight = replace(estimate, card="a card", card_bytes=estimate.process_bytes - MIB, verdict="no")
    assert "fits with" not in render_estimate(tight, 100)
    smaller = replace(tight, expandable_fits=True, expandable_process_bytes=estimate.process_bytes - 200 * MIB)
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in render_estimate(smaller, 100)
    assert "fits with" not in render_estimate(replace(smaller, verdict="yes"), 100)


def test_hopper_pays_for_larger_workspaces(tiny_llama: Path) -> None:
    ampere, hopper = (estimate_vram(make_config(tiny_llama), gpu=name) for name in ("a100-80gb", "h100-80gb"))
    assert hopper.peak_allocated_bytes - ampere.peak_allocated_bytes == 2 * (32 * MIB - 8320 * 2**10)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_screen_keeps_to_its_width(estimate: Estimate, width: int) -> None:
    lines = render_estimate(estimate, width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("  needs")


@pytest.mark.parametrize(
    ("name", "card"), [("RTX 4090", "rtx-4090-24gb"), ("Tesla T4", "t4-16gb"), ("h200", "h200-141gb")]
)
def test_cards_are_found_by_the_names_people_use(name: str, card: str) -> None:
    assert find_card(name).name == card


def test_a_card_without_a_report_of_its_own_is_said(tiny_llama: Path) -> None:
    unnamed, named = (estimate_vram(make_config(tiny_llama), gpu=name).assumptions for name in ("rtx-4080", "rtx-4090"))
    assert any("15.57 GiB on rtx-4080-16gb" in line for line in unnamed)
    assert not any("no report" in line for line in named)


def test_cards_hold_less_than_their_names_promise_and_more_than_nine_tenths() -> None:
    for card in CARDS:
        promised = int(card.name.rpartition("-")[2].removesuffix("gb"))
        assert 0.9 * promised < card.gib < promised, card


@pytest.mark.parametrize(("name", "says"), [("rtx-4091", "rtx-4090"), ("a100", "a100-40gb, a100-80gb")])
def test_an_unknown_card_gets_near_matches(name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        find_card(name)
    assert says in str(caught.value)


def test_a_model_folder_without_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        estimate_vram(make_config(tmp_path))
