"""What a person sees, and what a program reads: acceptance points of the commands before and during a run."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lora_cli

ROOT = Path(lora_cli.__file__).parents[1]
ESCAPE = re.compile(r"[\r\x1b]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def config(write_config, tmp_path, rows, monkeypatch):
    """tiny.yaml, with validation rows, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, data={"validation": str(rows / "heldout.jsonl")}, train={"max_steps": 4, "logging_steps": 2})
    return "tiny.yaml"


def as_of_a_stranger():
    """The environment without what the tests themselves tell the libraries, which would hide their noise."""
    told = ("HF_", "TRANSFORMERS_", "DATASETS_", "BITSANDBYTES_", "TOKENIZERS_", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_a_log_file_holds_plain_lines_and_no_noise(config, tmp_path):
    """A real process, so that what libraries print by themselves would be in it."""
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "lora_cli", "train", config],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**as_of_a_stranger(), "GITHUB_ACTIONS": "1", "TERM": "dumb"},
        )
    text = (tmp_path / "log").read_bytes().decode()
    assert done.returncode == 0, text
    assert not ESCAPE.search(text)
    assert not re.search(r"FutureWarning|UserWarning|it/s|WARNING|Loading weights|kernels", text), text
    assert max(map(len, text.splitlines())) <= 100
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    shown = [line for line in text.splitlines() if line.startswith("step=")]
    assert len(shown) == len(training) == 2
    for line, metrics in zip(shown, training, strict=True):
        fields = dict(field.split("=") for field in line.split())
        assert fields["step"] == f"{metrics['step']}/4"
        assert fields["loss"] == f"{metrics['loss']:.4f}"
        assert float(fields["lr"]) == pytest.approx(metrics["learning_rate"], rel=5e-3)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [f"valid={line['eval_loss']:.4f} step={line['step']}" for line in evaluations] == [
        line.removesuffix(" best") for line in text.splitlines() if line.startswith("valid=")
    ]


def test_json_is_one_document_on_stdout(lora, config):
    code, out, err = lora("train", config, "--json")
    assert code == 0 and "steps" in err
    assert json.loads(out) == json.loads(Path("run/summary.json").read_text())
    for command in (["check"], ["params"], ["params", "--ranks", "4,8"], ["preview", "-n", "2"]):
        code, out, _ = lora(*command, config, "--json")
        assert code == 0 and json.loads(out)


def test_nothing_is_on_stdout_when_it_is_refused(lora, config):
    for command in ("train", "check", "params", "preview"):
        code, out, err = lora(command, config, "--json", "--set", "model.name_or_path=/no/such/model")
        assert (code, out) == (2, "") and "/no/such/model" in err
    code, out, err = lora("train", config, "--json", "--set", "train.learning_rate=0")
    assert (code, out) == (2, "") and err


def test_without_data_no_steps_or_times_are_printed(lora, config):
    for command in ("check", "train"):
        code, out, err = lora(command, config, "--set", "data.train=none.jsonl")
        assert (code, out) == (2, "")
        assert not re.search(r"\bsteps?\b|\btime\b", err), err


def test_check_params_and_the_plan_agree_digit_for_digit(lora, config):
    _, plan_json, _ = lora("check", config, "--json")
    plan = json.loads(plan_json)
    _, parameters_json, _ = lora("params", config, "--json")
    parameters = json.loads(parameters_json)
    assert plan["parameters"] == parameters
    _, check, _ = lora("check", config)
    _, params, _ = lora("params", config)
    code, _, train = lora("train", config)
    assert code == 0
    trainable, share = f"{parameters['trainable']:,}", f"{parameters['trainable_percent']:.4f} %"
    for screen in (check, params, train):
        assert trainable in screen and share in screen
    tokens = f"{plan['num_tokens']:,} tokens, {100 * plan['num_supervised_tokens'] / plan['num_tokens']:.1f} % trained"
    for screen in (check, train):
        text = " ".join(screen.split())
        assert f"{plan['rows']} rows" in text and tokens in text
        assert re.search(rf"\b{plan['steps']} steps|steps {plan['steps']}\b", text)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["parameters"] == parameters and summary["steps"] == plan["steps"]


def test_check_counts_what_train_trains_on(lora, config, trained, settings):
    """One epoch sees every row once: the counts of the run are those of `check`."""
    _, out, _ = lora("check", config, "--json", "--set", "train.max_steps=null", "--set", "train.num_train_epochs=1")
    plan = json.loads(out)
    assert plan["steps"] == 6 and plan["rows"] == plan["used"] + plan["dropped"] == 41
    run = trained("train.max_steps=null", "train.num_train_epochs=1")
    for key in ("num_tokens", "num_supervised_tokens", "steps"):
        assert getattr(run.summary, key) == plan[key]


def test_check_and_params_write_nothing(lora, config, tmp_path):
    before = sorted(tmp_path.iterdir())
    for command in ("check", "params", "preview"):
        assert lora(command, config)[0] == 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_no_screen_is_wider_than_the_terminal(lora, config, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("GITHUB_ACTIONS", "1")
    monkeypatch.setenv("TERM", "dumb")
    for command in (["check"], ["params"], ["params", "--ranks", "4,8,16"], ["preview"], ["train"]):
        code, out, err = lora(*command, config)
        assert code == 0, err
        screen = out + err
        assert not ESCAPE.search(screen) and "…" not in screen
        for line in screen.splitlines():
            assert len(line) <= columns or any("/" in word for word in line.split()), (command, line)


def on_a_terminal(lora, *arguments, monkeypatch):
    """What a command writes to a terminal of its own."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        code, _, _ = lora(*arguments)
        terminal.flush()
        os.set_blocking(master, False)
        text = b""
        while True:
            try:
                text += os.read(master, 65536)
            except BlockingIOError:
                break
    os.close(master)
    monkeypatch.undo()
    return code, text.decode()


@pytest.mark.parametrize("no_color", ["1", ""])
def test_colour_repeats_meaning_and_no_color_has_none(lora, config, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    with monkeypatch.context() as patch:
        code, check = on_a_terminal(lora, "check", config, monkeypatch=patch)
    assert code == 0
    with monkeypatch.context() as patch:
        code, preview = on_a_terminal(lora, "preview", config, "-n", "1", monkeypatch=patch)
    assert code == 0
    assert "ok" in check and "▌" in preview
    assert bool(COLOUR.search(check)) == bool(COLOUR.search(preview)) == (not no_color)


def test_preview_marks_what_its_json_calls_trained(lora, config):
    """The mark survives a pipe, and stands at exactly the lines that hold trained tokens."""
    _, out, _ = lora("preview", config, "-n", "3", "--json")
    examples = json.loads(out)["examples"]
    _, screen, _ = lora("preview", config, "-n", "3")
    assert len(examples) == 3
    marked = "".join(line.removeprefix("  ▌ ") for line in screen.splitlines() if line.startswith("  ▌ "))
    marked = marked.removesuffix(next(line for line in screen.splitlines() if "token edge" in line)[4:])
    trained = "".join(
        token for one in examples for token, flag in zip(one["tokens"], one["trained"], strict=True) if flag
    )
    plain = re.sub(r"[|·⏎\s]", "", marked)
    assert plain == re.sub(r"[Ġ|·⏎\s]", "", trained)
    for one in examples:
        assert len(one["input_ids"]) == len(one["tokens"]) == len(one["trained"])


def test_every_printed_loss_is_recomputable_from_metrics(lora, config):
    code, out, _ = lora("train", config, "--set", "train.logging_steps=1")
    assert code == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]

    def mean(part):
        weights = [line["num_supervised_tokens"] for line in part]
        return sum(line["loss"] * weight for line, weight in zip(part, weights, strict=True)) / sum(weights)

    assert f"train {mean(steps[:2]):.4f} -> {mean(steps[2:]):.4f} (means of first and last 2 steps)" in out
    assert f"valid {evaluations[0]:.4f} -> {evaluations[-1]:.4f}" in out


def test_sizes_are_binary_and_say_so(lora, config):
    for command in ("check", "params", "train"):
        _, out, err = lora(command, config)
        assert not re.search(r"\d\s?[GMK]B\b", out + err)
        if command != "params":
            assert re.search(r"\d [GMK]iB", out + err)


def test_the_printed_next_commands_parse(lora, config):
    """Each command under `next` is one of ours with arguments that it takes; the run it names is there."""
    _, out, _ = lora("train", config)
    block = out[out.index("  next") :].replace("\\\n", " ")
    commands = [shlex.split(line[line.index("lora ") :]) for line in block.splitlines() if "lora " in line]
    assert [words[1] for words in commands] == ["eval", "merge"]
    assert all(Path(words[2], "summary.json").is_file() for words in commands)
    assert commands[1][3] == "--output"
