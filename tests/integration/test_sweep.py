"""`lora sweep`: each member is the run that `lora train` makes of its settings, and they don't disturb each other."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.config import load_grid
from lora_cli.errors import Interrupted, RunFolderError
from lora_cli.report.events import Dropped, SweepStepped, Warned
from lora_cli.sweep import passes, sweep
from lora_cli.train import loop as loop_module
from tests.integration.conftest import VOLATILE

GRID = (
    "adapter.r=[2, 6]",
    "adapter.target_modules=[[c_attn], all-linear]",
    "train.learning_rate=[3e-3, 1e-2]",
)


@pytest.fixture
def swept(write_config, rows, tmp_path):
    """Sweep over a grid; the summary."""

    def run(*grid, overrides=(), folder="swept", resume=False, emit=lambda event: None, **sections):
        path = write_config(tmp_path, data={"validation": str(rows / "heldout.jsonl")}, **sections)
        found = load_grid(path, [f"output_dir={tmp_path / folder}", *overrides], grid)
        return sweep(found, resume=resume, emit=emit)

    return run


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def adapter(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def assert_same_run(member, alone, *, loss=1e-6):
    """Losses to rounding; adapters to what rounding makes of them through AdamW's division."""
    for one, two in zip(lines(member), lines(alone), strict=True):
        assert one["step"] == two["step"]
        for key in ("loss", "eval_loss"):
            assert one.get(key) == (pytest.approx(two[key], rel=loss) if key in two else None)
        assert one.get("num_tokens") == two.get("num_tokens")
    ours, theirs = adapter(member), adapter(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)


def settings(changes):
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


@pytest.mark.parametrize("quantization", ["null", "{type: nf4}"], ids=["float32", "nf4"])
def test_members_are_the_runs_that_train_makes(swept, trained, rows, tmp_path, quantization):
    grid = GRID if quantization == "null" else ("adapter.r=[2, 6]", "train.seed=[1, 2]")
    model = f"model.quantization={quantization}"
    summary = swept(*grid, overrides=[model, "train.max_steps=5", "train.logging_steps=1"])
    assert len(summary.members) == (8 if quantization == "null" else 4)
    assert [m.eval_loss for m in summary.members] == sorted(m.eval_loss for m in summary.members)
    for number, member in enumerate(summary.members[:: 3 if quantization == "null" else 2]):
        alone = trained(
            model,
            "train.max_steps=5",
            "train.logging_steps=1",
            f"data.validation={rows / 'heldout.jsonl'}",
            f"output_dir={tmp_path / f'alone-{number}'}",
            *settings(member.changes),
        )
        assert_same_run(member.output_dir, alone.folder)
        assert alone.summary.final_eval_loss == pytest.approx(member.eval_loss, rel=1e-6)


def test_members_with_rows_of_their_own_in_small_micro_batches(swept, trained, rows, tmp_path):
    overrides = ["train.max_steps=4", "train.logging_steps=1", "train.micro_batch_tokens=150"]
    summary = swept("train.seed=[1, 2, 3]", overrides=overrides)
    member = summary.members[0]
    validation = f"data.validation={rows / 'heldout.jsonl'}"
    alone = trained(*overrides, validation, f"output_dir={tmp_path / 'alone'}", *settings(member.changes))
    assert_same_run(member.output_dir, alone.folder)


def test_halving_drops_the_worst_and_the_others_do_not_notice(swept, trained, rows, tmp_path):
    events = []
    halved = swept(
        "train.learning_rate=[1e-5, 1e-4, 1e-3, 1e-2]",
        overrides=["train.max_steps=6", "train.logging_steps=1"],
        sweep={"grid": {"train.seed": [42]}, "halving": {"every": 2}},
        emit=events.append,
    )
    assert [m.steps for m in halved.members] == [6, 4, 2, 2]
    assert [m.changes["train.learning_rate"] for m in halved.members][:2] == [1e-2, 1e-3]
    assert [event.step for event in events if isinstance(event, Dropped)] == [2, 2, 4]
    assert all((Path(m.output_dir) / "adapter" / "adapter_model.safetensors").is_file() for m in halved.members)
    validation = f"data.validation={rows / 'heldout.jsonl'}"
    best = halved.members[0]
    alone = trained(
        "train.max_steps=6",
        "train.logging_steps=1",
        "train.eval_steps=2",
        validation,
        f"output_dir={tmp_path / 'alone'}",
        *settings(best.changes),
    )
    ours, theirs = ([line["loss"] for line in lines(f) if "loss" in line] for f in (best.output_dir, alone.folder))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_stopped_and_resumed_it_ends_in_the_same_bits(swept):
    grid, overrides = ("adapter.r=[2, 6]", "train.seed=[1, 2]"), ["train.max_steps=6"]
    whole = swept(*grid, overrides=overrides, folder="whole")

    def stop(event):
        if isinstance(event, SweepStepped) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="every member has a checkpoint") as stopped:
        swept(*grid, overrides=overrides, emit=stop)
    assert stopped.value.exit_code == 143
    events = []
    again = swept(*grid, overrides=overrides, resume=True, emit=events.append)
    assert [event.step for event in events if isinstance(event, SweepStepped)] == [4, 5, 6]
    assert [m.name for m in again.members] == [m.name for m in whole.members]
    for one, two in zip(again.members, whole.members, strict=True):
        for name, tensor in adapter(one.output_dir).items():
            assert torch.equal(tensor, adapter(two.output_dir)[name])
        assert one.eval_loss == two.eval_loss
    with pytest.raises(RunFolderError):
        swept(*grid, overrides=overrides)
    # The folder's own file is enough, though it has no rank of its own for lora_alpha to follow.
    finished = sweep(load_grid(Path(again.output_dir) / "sweep.yaml"), resume=True)
    assert [m.eval_loss for m in finished.members] == [m.eval_loss for m in whole.members]


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("save", [1, 2, 6, 11], ids=["before any", "after one", "between two", "before the last"])
def test_ended_between_checkpoints_it_goes_on_to_the_same_bits(swept, monkeypatch, save):
    """Side by side the last digits depend on who is there: nobody may go on from a step that others haven't reached."""
    grid = ("adapter.r=[2, 6]", "train.seed=[1, 2]")
    overrides = ["train.max_steps=3", "train.logging_steps=1", "train.save_steps=1"]
    whole = swept(*grid, overrides=overrides, folder="whole")
    write, saves = loop_module.save_checkpoint, []

    def killed(*given):
        saves.append(given)
        if len(saves) == save:
            raise Killed
        return write(*given)

    monkeypatch.setattr(loop_module, "save_checkpoint", killed)
    with pytest.raises(Killed):
        swept(*grid, overrides=overrides)
    events = []
    again = swept(*grid, overrides=overrides, resume=True, emit=events.append)
    assert all(event.active == 4 for event in events if isinstance(event, SweepStepped))
    for one, two in zip(again.members, whole.members, strict=True):
        assert [stable(line) for line in lines(one.output_dir)] == [stable(line) for line in lines(two.output_dir)]
        for name, tensor in adapter(one.output_dir).items():
            assert torch.equal(tensor, adapter(two.output_dir)[name])


def stable(line):
    return {key: value for key, value in line.items() if key not in VOLATILE}


def test_the_command(lora, config_file, tmp_path):
    out_dir = tmp_path / "by-command"
    common = ("--set", "train.max_steps=2", "--output-dir", str(out_dir))
    code, out, err = lora("sweep", config_file, "--grid", "adapter.r=[2, 4]", *common, "--json")
    assert code == 0, err
    board = json.loads(out)
    assert [m["steps"] for m in board["members"]] == [2, 2] and board["ranked_by"] == "train_loss"
    assert json.loads((out_dir / "leaderboard.json").read_text()) == board
    links = re.findall(r'<a href="([^"]*)"', (out_dir / "report.html").read_text())
    assert len(links) == 2 and all((out_dir / link).is_file() for link in links)
    code, out, err = lora("sweep", config_file, "--grid", "adapter.r=[2, 4]", *common)
    assert code == 2 and "Traceback" not in err
    code, out, err = lora("generate", out_dir / "01-r2", "--prompt", "noon", "--max-new-tokens", "2")
    assert code == 0, err
    code, out, err = lora("sweep", config_file, "--grid", "model.dtype=[float32, bfloat16]")
    assert code == 2 and "all members train on one base" in err and "Nothing was loaded or written" in err


def test_a_member_that_bursts_leaves_alone(swept):
    events = []
    board = swept("train.learning_rate=[1e-2, 1e30]", overrides=["train.max_grad_norm=null"], emit=events.append)
    assert [(member.steps, member.failed) for member in board.members] == [(8, False), (0, True)]
    assert "not finite" in board.members[1].stopped
    assert any(isinstance(event, Warned) and event.text.startswith("02-lr") for event in events)


def test_memory_that_runs_out_halves_the_rows_of_all(swept, monkeypatch):
    plain = swept("train.seed=[1, 2]", folder="plain")
    step, tokens = passes.shared_step, []

    def scarce(*arguments, micro_batch_tokens, **others):
        tokens.append(micro_batch_tokens)
        if micro_batch_tokens > 2000:
            raise passes.OutOfMemory
        return step(*arguments, micro_batch_tokens=micro_batch_tokens, **others)

    monkeypatch.setattr(passes, "shared_step", scarce)
    less = swept("train.seed=[1, 2]", folder="less")
    assert tokens[0] > 2000 and tokens[-1] <= 2000 and len(tokens) > 8
    assert [m.train_loss for m in less.members] == pytest.approx([m.train_loss for m in plain.members], rel=1e-6)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("adapter.target_modules=[[nowhere]]", "nowhere"),
        ("adapter.target_modules=[[lm_head]]", "the head"),
        ("adapter.r=[2, 2]", "given twice"),
    ],
)
def test_what_is_refused_leaves_nothing(config_file, lora, tmp_path, grid, words):
    code, out, err = lora("sweep", config_file, "--grid", grid)
    assert code == 2 and out == "" and words in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused(config_file, lora, tmp_path):
    short = ("--set", "train.max_steps=2")
    assert lora("sweep", config_file, "--grid", "adapter.r=[2]", *short)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = lora("sweep", config_file, "--grid", "adapter.r=[2]", *short)
    assert code == 2 and "holds another sweep" in err
    code, _, err = lora("sweep", config_file, "--grid", "adapter.r=[4]", *short, "--resume")
    assert code == 2 and ("another grid" in err or "matter" in err)
    code, _, err = lora("train", config_file, *short)
    assert code == 2 and "holds a sweep" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
