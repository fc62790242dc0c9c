"""`lora sweep` from a grid to run folders: the losses of separate runs, resumed to the same bits, the worst dropped."""

from __future__ import annotations

import json
import os
import signal

import pytest
from safetensors.torch import load_file

from lora_cli.config import load_config, load_grid
from lora_cli.errors import Interrupted
from lora_cli.report.events import Dropped, SweepStepped, Warned
from lora_cli.sweep import rounds, sweep
from lora_cli.train import train

GRID = ("adapter.r=[2, 8]", "train.learning_rate=[1e-3, 1e-2]", "train.seed=[1, 2]")


def metrics(folder, key="loss"):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


def tensors(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def grid_of(config_file, rows, *overrides, grid=GRID):
    return load_grid(config_file, [f"data.validation={rows / 'heldout.jsonl'}", *overrides], grid)


def test_every_member_is_the_run_of_its_own(config_file, rows, lora, tmp_path):
    targets = "adapter.target_modules=[all-linear, [c_attn]]"
    grid = ("adapter.r=[2, 8]", "train.learning_rate=[1e-3, 1e-2]", targets, "train.seed=[1, 2]")
    options = [part for each in grid for part in ("--grid", each)]
    code, out, _ = lora("sweep", config_file, *options, "--set", f"data.validation={rows / 'heldout.jsonl'}", "--json")
    assert code == 0
    board = json.loads(out)
    members = grid_of(config_file, rows, grid=grid).members
    assert len(members) == len(board["members"]) == 16 and board["ranked_by"] == "eval_loss"
    losses = [member["eval_loss"] for member in board["members"]]
    assert losses == sorted(losses)
    for member in members[::3]:
        together = tmp_path / "run" / member.name
        # What the member's own folder says is what makes it again.
        config = load_config(together / "config.yaml", [f"output_dir={tmp_path / 'alone' / member.name}"])
        train(config)
        alone = tmp_path / "alone" / member.name
        for key in ("loss", "eval_loss"):
            ours, theirs = metrics(together, key), metrics(alone, key)
            assert [step for step, _ in ours] == [step for step, _ in theirs]
            assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], rel=1e-6)
        ours, theirs = tensors(together), tensors(alone)
        assert ours.keys() == theirs.keys()
        # Adam divides a gradient by its own size: rounding of 1e-7 may grow.
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-5
    best = tmp_path / "run" / board["members"][0]["name"]
    assert (best / "report.html").is_file() and (best / "environment.json").is_file()
    code, out, _ = lora("eval", best, "--json")
    assert code == 0
    assert json.loads(out)["adapter"]["loss"] == pytest.approx(board["members"][0]["eval_loss"], rel=1e-5)


def test_a_stopped_sweep_goes_on_to_the_same_bits(config_file, rows, tmp_path):
    halving = "sweep.halving={every: 3, at_least: 2}"
    whole = grid_of(config_file, rows, halving, f"output_dir={tmp_path / 'whole'}")
    sweep(whole)
    parts = grid_of(config_file, rows, halving, f"output_dir={tmp_path / 'parts'}")

    def stop(event):
        if isinstance(event, SweepStepped) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as error:
        sweep(parts, emit=stop)
    assert error.value.exit_code == 143 and "lora sweep" in error.value.remedy
    resumed = sweep(load_grid(tmp_path / "parts" / "sweep.yaml"), resume=True)
    assert [member.name for member in resumed.members]
    for member in whole.members:
        one, other = (tmp_path / name / member.name for name in ("whole", "parts"))
        assert (one / "adapter" / "adapter_model.safetensors").read_bytes() == (
            other / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
        assert metrics(one) == metrics(other)
    again = sweep(load_grid(tmp_path / "parts" / "sweep.yaml"), resume=True)
    assert again.members == resumed.members


def test_the_worst_are_dropped_and_leave_whole_folders(config_file, rows, tmp_path):
    halving = "sweep.halving={every: 2}"
    events = []
    board = sweep(grid_of(config_file, rows, halving), emit=events.append)
    dropped = [event for event in events if isinstance(event, Dropped)]
    assert [event.step for event in dropped] == [2, 2, 2, 2, 4, 4, 6]
    assert [len(rung["losses"]) for rung in board.rungs] == [8, 4, 2]
    for rung in board.rungs:
        kept = [loss for name, loss in rung["losses"].items() if name not in rung["dropped"]]
        assert max(kept) <= min(rung["losses"][name] for name in rung["dropped"])
    assert [member.steps for member in board.members] == [8, 6, 4, 4, 2, 2, 2, 2]
    for member in board.members:
        assert (tmp_path / "run" / member.name / "adapter" / "adapter_model.safetensors").is_file()
    # The one that is left is what it is without the others.
    best = board.members[0].name
    config = load_config(tmp_path / "run" / best / "config.yaml", [f"output_dir={tmp_path / 'alone'}"])
    train(config)
    ours, theirs = metrics(tmp_path / "run" / best), metrics(tmp_path / "alone")
    assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], rel=1e-6)


def test_a_member_that_bursts_leaves_alone(config_file, rows, tmp_path):
    grid = grid_of(config_file, rows, "train.max_grad_norm=null", grid=["train.learning_rate=[1e-2, 1e30]"])
    events = []
    board = sweep(grid, emit=events.append)
    assert [(member.steps, member.failed) for member in board.members] == [(8, False), (0, True)]
    assert "not finite" in board.members[1].stopped
    assert any(isinstance(event, Warned) and event.text.startswith("02-lr") for event in events)


def test_memory_that_runs_out_halves_the_rows_of_all(config_file, rows, tmp_path, monkeypatch):
    plain = sweep(grid_of(config_file, rows, f"output_dir={tmp_path / 'plain'}"))
    step, tokens = rounds.shared_step, []

    def scarce(*arguments, micro_batch_tokens, **others):
        tokens.append(micro_batch_tokens)
        if micro_batch_tokens > 2000:
            raise rounds.OutOfMemory
        return step(*arguments, micro_batch_tokens=micro_batch_tokens, **others)

    monkeypatch.setattr(rounds, "shared_step", scarce)
    less = sweep(grid_of(config_file, rows, f"output_dir={tmp_path / 'less'}"))
    assert tokens[:4] == [16384, 8192, 4096, 2048] and tokens[-1] == 1024
    assert [m.train_loss for m in less.members] == pytest.approx([m.train_loss for m in plain.members], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "sweep.grid  missing"),
        (("--grid", "model.dtype=[float32, bfloat16]"), "all members train on one base"),
        (("--grid", "adapter.r=[2, 2]"), "given twice"),
        (("--grid", "adapter.target_modules=[[nowhere]]"), "nowhere"),
        (("--grid", "adapter.target_modules=[[lm_head]]"), "the head"),
    ],
)
def test_what_is_refused_leaves_nothing(config_file, lora, tmp_path, options, words):
    code, out, err = lora("sweep", config_file, *options)
    assert code == 2 and out == "" and words in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused(config_file, lora, rows, tmp_path):
    assert lora("sweep", config_file, "--grid", "adapter.r=[2]")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = lora("sweep", config_file, "--grid", "adapter.r=[2]")
    assert code == 2 and "holds another sweep" in err
    code, _, err = lora("sweep", config_file, "--grid", "adapter.r=[4]", "--resume")
    assert code == 2 and ("another grid" in err or "matter" in err)
    code, _, err = lora("train", config_file)
    assert code == 2 and "sweep" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
