"""Stopped at any instant, a run goes on to the bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

import lora_cli
from lora_cli.engine import selftest
from lora_cli.errors import Interrupted, RunFolderError
from lora_cli.report.events import Evaluated, Finished, Resumed, Saved, Stepped
from lora_cli.runs import atomic
from lora_cli.train import checkpoint as checkpoint_module

ROOT = Path(lora_cli.__file__).parents[1]
VOLATILE = ("tokens_per_second", "peak_memory_bytes")


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_same_run(one, other):
    assert adapter(one) == adapter(other)
    assert metrics(one) == metrics(other) != []
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    for timed in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "output_dir", "adapter_dir"):
        del ours[timed], theirs[timed]
    assert ours == theirs


def at_step(number, act):
    """An emitter that acts once, when that step has been taken."""

    def emit(event):
        if isinstance(event, Stepped) and event.step == number:
            act()

    return emit


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def whole(trained, tmp_path):
    """Train without a stop, in a folder of its own; the same overrides are for the run that is stopped."""
    return lambda *overrides: trained(*overrides, f"output_dir={tmp_path / 'whole'}").folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_from_there(trained, whole, settings, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        trained(emit=at_step(4, send(number)))
    assert stopped.value.exit_code == 128 + number
    assert "after step 4" in stopped.value.message
    assert signal.getsignal(number) is before
    folder = Path(settings().output_dir)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (folder / "summary.json").exists()
    run = trained(resume=True)
    assert [event.step for event in run.events if isinstance(event, Resumed)] == [4]
    assert [event.step for event in run.events if isinstance(event, Stepped)] == [5, 6, 7, 8]
    assert_same_run(run.folder, whole())
    assert "resumed after step 4" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.optim=adamw_8bit", "adapter.r=128"),
        ("train.optim=sgd", "train.learning_rate=0.5"),
        ("adapter.lora_dropout=0.3",),
        ("adapter=null",),
        ("model.quantization={type: nf4}",),
        ("train.micro_batch_tokens=100",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_run_goes_on_to_the_same_bits(trained, whole, overrides):
    with pytest.raises(Interrupted):
        trained(*overrides, emit=at_step(4, send(signal.SIGTERM)))
    run = trained(*overrides, resume=True)
    other = whole(*overrides)
    name = "model.safetensors" if overrides == ("adapter=null",) else "adapter_model.safetensors"
    assert (run.folder / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    assert metrics(run.folder) == metrics(other)


def test_eight_bit_states_are_really_eight_bit(trained):
    run = trained("train.optim=adamw_8bit", "adapter.r=128", "train.max_steps=1")
    states = load_file(run.folder / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in states.values())


def test_stopped_twice_with_evaluations_and_keep_best(trained, whole, rows):
    overrides = (
        f"data.validation={rows / 'heldout.jsonl'}",
        "train.learning_rate=5",  # wild: the loss rises, and the best state is an early one
        "train.eval_steps=1",
        "train.save_steps=3",
        "train.load_best_model_at_end=true",
        "train.early_stopping_patience=4",
    )
    with pytest.raises(Interrupted):
        trained(*overrides, emit=at_step(1, send(signal.SIGTERM)))
    with pytest.raises(Interrupted):
        trained(*overrides, resume=True, emit=at_step(4, send(signal.SIGTERM)))
    assert_same_run(trained(*overrides, resume=True).folder, whole(*overrides))


def test_stopped_at_the_very_step_that_ends_the_run_early(trained, whole, rows):
    overrides = (
        f"data.validation={rows / 'heldout.jsonl'}",
        "train.learning_rate=5",
        "train.lr_scheduler_type=constant",
        "train.eval_steps=1",
        "train.early_stopping_patience=1",
        "train.max_steps=30",
    )
    expected = whole(*overrides)
    last = json.loads((expected / "summary.json").read_text())["steps"]
    assert last < 30
    with pytest.raises(Interrupted):
        trained(*overrides, emit=at_step(last, send(signal.SIGTERM)))
    assert_same_run(trained(*overrides, resume=True).folder, expected)


def test_killed_at_any_instant(trained, settings, tmp_path, monkeypatch, rows):
    """A copy of the folder is what a kill leaves. One is taken at each event and at each write of a checkpoint."""
    folder, copies = Path(settings().output_dir), tmp_path / "copies"
    overrides = ("train.save_steps=2", "train.max_steps=5", "train.logging_steps=1")

    def copy():
        if folder.exists():
            shutil.copytree(folder, copies / f"{len(list(copies.iterdir())):02}")

    copies.mkdir()
    for module, name in ((checkpoint_module, "save_file"), (atomic, "sync"), (checkpoint_module, "sync")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, original=original: (original(*given), copy())[0])
    whole = trained(*overrides, emit=lambda event: copy())
    monkeypatch.undo()
    taken = sorted(copies.iterdir())
    assert len(taken) > 20
    expected = (metrics(folder), adapter(folder))
    states = {}
    for each in taken:  # copies with the same files stand at the same instant
        names = {str(path.relative_to(each)): path.stat().st_size for path in each.rglob("*") if path.is_file()}
        states.setdefault(json.dumps(names, sort_keys=True), each)
    chosen = list(states.values())
    half_written = [each for each in chosen if list(each.glob("checkpoints/.*"))]
    assert half_written and len(chosen) > 10
    for each in [*chosen[:: len(chosen) // 4], half_written[-1]]:
        if not (each / "adapter").exists():
            run = trained(*overrides, f"output_dir={each}", resume=True)
            assert (metrics(each), adapter(each)) == expected, each
            assert not list(each.glob("checkpoints/.*"))
            assert run.summary.num_tokens == whole.summary.num_tokens


def test_the_process_is_killed_and_the_printed_command_goes_on(config_file, trained, tmp_path):
    """A real process and a real signal: exit 130 within seconds, and at most four lines after it."""
    command = [sys.executable, "-m", "lora_cli", "train", "tiny.yaml", "--set", "train.max_steps=100000"]
    process = subprocess.Popen(
        [*command, "--set", "train.lr_scheduler_type=constant"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step=3/"):
            break
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - sent < 10
    assert out == "" and "Traceback" not in err
    said = [line for line in err.splitlines() if not line.startswith(("step=", "  time"))]
    assert 2 <= len(said) <= 4
    printed = shlex.split(next(line for line in said if "lora train" in line).partition("Go on with: ")[2])
    assert printed[:2] == ["lora", "train"] and printed[3:] == ["--resume"]
    assert Path(printed[2]) == tmp_path / "run" / "config.yaml"
    stopped_at = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    total = f"train.max_steps={stopped_at + 2}"
    constant = "train.lr_scheduler_type=constant"
    run = trained(total, constant, resume=True)
    assert [event.step for event in run.events if isinstance(event, Stepped)] == [stopped_at + 1, stopped_at + 2]


def damage_content(path):
    with (path / "trainable.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def drop_file(path):
    (path / "optimizer.safetensors").unlink()


def empty_manifest(path):
    (path / "manifest.json").write_text("{}")


def break_manifest(path):
    (path / "manifest.json").write_text('{"state.json"')


@pytest.mark.parametrize("damage", [damage_content, drop_file, empty_manifest, break_manifest])
def test_a_damaged_checkpoint_is_passed_over_and_replaced(trained, whole, settings, damage):
    with pytest.raises(Interrupted):
        trained("train.save_steps=2", emit=at_step(4, send(signal.SIGTERM)))
    checkpoints = Path(settings().output_dir) / "checkpoints"
    damage(checkpoints / "step-00000004")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / ".step-00000006.tmp")
    run = trained("train.save_steps=2", "train.save_total_limit=null", resume=True)
    assert [event.step for event in run.events if isinstance(event, Resumed)] == [2]
    assert_same_run(run.folder, whole("train.save_steps=2", "train.save_total_limit=null"))
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{n:08}" for n in (2, 4, 6, 8)]
    assert all(checkpoint_module.is_complete(path) for path in checkpoints.iterdir())


def test_without_a_complete_checkpoint_it_starts_at_step_0(trained, whole, settings):
    with pytest.raises(Interrupted):
        trained(emit=at_step(4, send(signal.SIGTERM)))
    drop_file(Path(settings().output_dir) / "checkpoints" / "step-00000004")
    run = trained(resume=True)
    assert [event.step for event in run.events if isinstance(event, Stepped)] == list(range(1, 9))
    assert_same_run(run.folder, whole())


def test_resume_in_an_empty_place_is_a_start(trained):
    assert trained("train.max_steps=1", resume=True).summary.steps == 1


@pytest.fixture
def stopped(trained, settings):
    """A run that was stopped after step 4; its folder."""
    with pytest.raises(Interrupted):
        trained(emit=at_step(4, send(signal.SIGTERM)))
    return Path(settings().output_dir)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate: 0.01 there, 0.001 now"),
        ("train.batch_size=4", "train.batch_size: 8 there, 4 now"),
        ("adapter.r=8", "adapter.r: 16 there, 8 now"),
        ("data.max_length=64", "data.max_length: 128 there, 64 now"),
        ("train.seed=1", "train.seed: 42 there, 1 now"),
    ],
)
def test_a_difference_that_matters_is_refused_by_name(trained, stopped, override, named):
    before = contents(stopped)
    with pytest.raises(RunFolderError) as error:
        trained(override, resume=True)
    assert named in (error.value.remedy or "") and "--output-dir" in (error.value.remedy or "")
    assert contents(stopped) == before


def test_other_rows_are_refused(trained, stopped, rows, tmp_path):
    moved = tmp_path / "train.jsonl"
    shutil.copy(rows / "train.jsonl", moved)
    config = stopped / "config.yaml"
    config.write_text(config.read_text().replace(str(rows / "train.jsonl"), str(moved)))
    lines = moved.read_text().splitlines(keepends=True)
    moved.write_text("".join([lines[1], lines[0], *lines[2:]]))
    before = contents(stopped)
    with pytest.raises(RunFolderError, match="training rows are not those"):
        trained(f"data.train={moved}", resume=True)
    assert contents(stopped) == before


def test_settings_that_change_no_step_may_change(trained, stopped, whole):
    run = trained("train.logging_steps=1", "train.save_steps=5", resume=True)
    assert adapter(run.folder) == adapter(whole())
    assert [line["step"] for line in metrics(run.folder)] == [3, 5, 6, 7, 8]
    assert [event.step for event in run.events if isinstance(event, Saved)] == [5, 8]


def test_smaller_micro_batches_are_taken_when_asked_for(trained, stopped):
    resumed = trained("train.micro_batch_tokens=64", resume=True)
    state = json.loads((resumed.folder / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["position"]["micro_batch_tokens"] == 64


def test_another_thread_count_is_named(trained, stopped):
    torch.set_num_threads(2)
    (warning,) = trained("train.max_steps=5", resume=True).warnings
    assert "2 threads instead of 1" in warning


def test_two_processes_go_on_with_the_run_of_one(trained, stopped, whole, config_file):
    """The same rows in the same steps; only sums are ordered otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += ["-m", "lora_cli", "train", str(config_file), "--resume", "--set", "train.logging_steps=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("2 processes instead of 1") == 1
    other = whole("train.logging_steps=1")
    ours, theirs = metrics(stopped)[-4:], metrics(other)[-4:]
    assert [line["step"] for line in ours] == [5, 6, 7, 8]
    for one, two in zip(ours, theirs, strict=True):
        assert one["num_supervised_tokens"] == two["num_supervised_tokens"] or one["step"] == 5  # since step 3
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-6) or one["step"] == 5
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (stopped, other)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=1e-3, atol=1e-5)


def test_a_run_that_fell_back_to_the_full_loss_can_be_resumed(trained, stopped, monkeypatch, settings, tmp_path):
    prove_loss = selftest._prove_loss
    monkeypatch.setattr(
        selftest, "_prove_loss", lambda model, adapter, proof, wanted: prove_loss(model, adapter, proof, "full")
    )
    elsewhere = f"output_dir={tmp_path / 'full'}"
    with pytest.raises(Interrupted):
        trained(elsewhere, emit=at_step(2, send(signal.SIGTERM)))
    assert trained(elsewhere, resume=True).summary.steps == 8


def test_a_finished_run_says_so_and_changes_nothing(trained, lora, config_file):
    run = trained("train.max_steps=2")
    before = contents(run.folder)
    again = trained("train.max_steps=2", resume=True)
    assert again.summary == run.summary
    (warning,) = again.warnings
    assert "is finished" in warning and isinstance(again.events[-1], Finished)
    code, out, err = lora("train", config_file, "--resume", "--json", "--set", "train.max_steps=2")
    assert code == 0 and json.loads(out)["steps"] == 2 and "is finished" in err
    assert contents(run.folder) == before


def test_more_steps_extend_a_finished_run(trained, whole):
    """With a constant rate, four steps and four more are eight to the bit."""
    constant = "train.lr_scheduler_type=constant"
    trained(constant, "train.max_steps=4", "train.logging_steps=2")
    run = trained(constant, "train.max_steps=8", "train.logging_steps=2", resume=True)
    assert_same_run(run.folder, whole(constant, "train.max_steps=8", "train.logging_steps=2"))


def test_the_first_step_of_an_extension_has_the_rate_of_the_longer_schedule(trained):
    trained("train.max_steps=4", "train.warmup_steps=0", "train.logging_steps=1")
    run = trained("train.max_steps=8", "train.warmup_steps=0", "train.logging_steps=1", resume=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    longer = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=8)
    expected = []
    for _ in range(8):
        expected.append(longer.get_last_lr()[0])
        optimizer.step()
        longer.step()
    assert [line["learning_rate"] for line in metrics(run.folder)][4:] == expected[4:]


def test_killed_between_the_old_adapter_and_the_new_one(trained, monkeypatch):
    """An extension that dies while it puts its adapter in the other's place: nothing claims to be finished."""
    constant = "train.lr_scheduler_type=constant"
    before = adapter(trained(constant, "train.max_steps=4").folder)
    replace = os.replace

    def dies(source, target):
        if Path(source).name == ".adapter.tmp":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Interrupted):
        trained(constant, resume=True)
    monkeypatch.undo()
    run = trained(constant, resume=True)
    assert run.summary.steps == 8 and adapter(run.folder) != before
    assert not list(run.folder.glob(".adapter*"))


def test_a_second_interrupt_does_not_wait_for_the_step(trained, settings):
    seen = []

    def twice(event):
        if isinstance(event, Stepped) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("went on")

    with pytest.raises(Interrupted, match="at once") as stopped:
        trained("train.save_steps=2", emit=twice)
    assert not seen and stopped.value.exit_code == 130
    folder = Path(settings().output_dir)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert "step-00000002" in (stopped.value.remedy or "")


def test_a_checkpoint_when_asked_for_and_on_it_goes(trained, whole, settings):
    run = trained(emit=at_step(3, send(signal.SIGUSR1)))
    assert [event.step for event in run.events if isinstance(event, Saved)] == [3, 8]
    assert_same_run(run.folder, whole())


def test_evaluations_are_not_repeated_on_resuming(trained, rows):
    heldout = f"data.validation={rows / 'heldout.jsonl'}"
    with pytest.raises(Interrupted):
        trained(heldout, emit=at_step(4, send(signal.SIGTERM)))
    run = trained(heldout, resume=True)
    assert [line["step"] for line in metrics(run.folder) if "eval_loss" in line] == [0, 8]
    assert [event.step for event in run.events if isinstance(event, Evaluated)] == [8]
