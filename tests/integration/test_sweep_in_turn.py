"""`lora sweep` of a Llama, whose layers run fused: members go in turn, as `lora train` does, to the bit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lora_cli.config import load_grid
from lora_cli.engine import scoring
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.step import OutOfMemory
from lora_cli.errors import Interrupted
from lora_cli.report.events import Dropped, SweepPlanned, SweepStepped, Warned
from lora_cli.sweep import members, sweep
from lora_cli.train import loop as loop_module
from tests.integration.conftest import VOLATILE, adapter_bytes

GRID = ("adapter.r=[2, 6]", "train.learning_rate=[3e-3, 1e-2]")
FEW = ["train.max_steps=4", "train.logging_steps=1", "train.micro_batch_tokens=150"]


@pytest.fixture
def common(llama, rows):
    return [f"model.name_or_path={llama}", f"data.validation={rows / 'heldout.jsonl'}"]


@pytest.fixture
def swept(config_file, common, tmp_path):
    def run(*grid, overrides=(), folder="swept", resume=False, emit=lambda event: None):
        found = load_grid(config_file, [*common, f"output_dir={tmp_path / folder}", *overrides], grid)
        return sweep(found, resume=resume, emit=emit)

    return run


def stable(folder):
    found = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in found]


def settings(changes):
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


@pytest.mark.parametrize("kind", ["native", "layers"])
@pytest.mark.parametrize(
    ("grid", "more"),
    [
        (GRID, []),
        (("adapter.target_modules=[[q_proj], all-linear]",), ["train.gradient_checkpointing=true"]),
        # One order, then the other: what fits is looked at for each, whoever was attached last.
        (("adapter.lora_dropout=[0.0, 0.3]",), []),
        (("adapter.lora_dropout=[0.3, 0.0]",), []),
        (("train.seed=[1, 2]",), ["model.dtype=bfloat16"]),
    ],
    ids=["ranks", "checkpointing", "dropout last", "dropout first", "bfloat16"],
)
def test_members_are_the_runs_that_train_makes_to_the_bit(
    swept, trained, common, tmp_path, monkeypatch, kind, grid, more
):
    if kind == "layers":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("needs a C compiler")
    events = []
    board = swept(*grid, overrides=[*FEW, *more], emit=events.append)
    planned = next(event for event in events if isinstance(event, SweepPlanned))
    assert planned.in_turn and planned.plan.engine.micro_batch_tokens == 150
    assert not [event for event in events if isinstance(event, Warned) and "masks" in event.text]
    for number, member in enumerate(board.members):
        own = [f"output_dir={tmp_path / f'alone-{number}'}", *settings(member.changes)]
        alone = trained(*common, *FEW, *more, *own)
        assert stable(member.output_dir) == stable(alone.folder)
        assert adapter_bytes(Path(member.output_dir)) == adapter_bytes(alone.folder)
        one, two = (json.loads((Path(f) / "environment.json").read_text()) for f in (member.output_dir, alone.folder))
        assert one["engine"] == two["engine"]


def test_the_base_is_scored_once(swept, monkeypatch):
    scored = []
    monkeypatch.setattr(
        loop_module,
        "example_losses",
        lambda *given, **named: scored.append(1) or scoring.example_losses(*given, **named),
    )
    board = swept(*GRID, overrides=FEW)
    assert len(scored) == 1 + 4
    first, *others = (stable(member.output_dir)[0] for member in board.members)
    assert first["step"] == 0 and first["eval_loss"] > 0 and others == [first] * 3


def test_stopped_in_the_middle_of_a_round_it_ends_in_the_same_bits(swept, monkeypatch):
    whole = swept(*GRID, overrides=FEW, folder="whole")
    step, taken = loop_module.train_step, []

    def stopped_in_the_tenth(learner, batches, *others):
        taken.append(1)
        if len(taken) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(learner, batches, *others)

    monkeypatch.setattr(loop_module, "train_step", stopped_in_the_tenth)
    with pytest.raises(Interrupted, match="every member has a checkpoint"):
        swept(*GRID, overrides=FEW)
    assert len(taken) == 10  # and none of the other two members in that round
    events = []
    again = swept(*GRID, overrides=FEW, resume=True, emit=events.append)
    assert [event.step for event in events if isinstance(event, SweepStepped)] == [4, 4]
    assert [replace(m, output_dir="") for m in again.members] == [replace(m, output_dir="") for m in whole.members]
    for one, two in zip(again.members, whole.members, strict=True):
        assert adapter_bytes(Path(one.output_dir)) == adapter_bytes(Path(two.output_dir))
        assert stable(one.output_dir) == stable(two.output_dir)


def test_memory_that_runs_out_is_each_members_own_affair(swept, monkeypatch):
    step, scarce_for = loop_module.train_step, []

    def scarce_memory(learner, batches, *others):
        if not scarce_for:
            scarce_for.append(learner)
        if learner is scarce_for[0]:
            raise OutOfMemory
        return step(learner, batches, *others)

    monkeypatch.setattr(loop_module, "train_step", scarce_memory)
    events = []
    board = swept("train.seed=[1, 2]", overrides=FEW, emit=events.append)
    assert [(m.steps, m.failed) for m in board.members] == [(4, False), (0, True)]
    assert "out of memory" in next(event.why for event in events if isinstance(event, Dropped))


def test_dropout_alone_goes_side_by_side_and_says_so(swept):
    events = []
    swept("adapter.lora_dropout=[0.1, 0.3]", overrides=FEW, emit=events.append)
    assert not next(event for event in events if isinstance(event, SweepPlanned)).in_turn
    assert any("masks are others" in event.text for event in events if isinstance(event, Warned))


def test_in_turn_nothing_has_to_be_proven_of_rows(swept, monkeypatch):
    monkeypatch.setattr(members, "prove_sharing", None)
    assert len(swept("train.seed=[1, 2]", overrides=FEW).members) == 2
