"""What `lora eval` refuses: one clear message, exit code 2, nothing on stdout, and not a file changed or left."""

from __future__ import annotations

import errno
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.evaluate import harness


@pytest.fixture
def run(judged_copy):
    return judged_copy


@pytest.fixture
def refused(lora, tmp_path):
    """Run `lora eval` with what must be refused; the message."""

    def evaluate(*arguments):
        before = contents(tmp_path)
        code, out, err = lora("eval", *arguments)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err and "bug in lora" not in err
        assert contents(tmp_path) == before
        return err[err.lower().index("error:") :]

    return evaluate


def contents(folder):
    """Every file in it and what it holds; the cache of tokenized rows is no output."""
    files = (path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts)
    return {path: path.read_bytes() if path.is_file() else None for path in files}


def edit_json(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def edit_tensors(path, change):
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


# What is to be judged


def gone(run):
    shutil.rmtree(run)


def hollow(run):
    shutil.rmtree(run)
    run.mkdir()


def without_config(run):
    (run / "config.yaml").unlink()


def unfinished(run):
    shutil.rmtree(run / "adapter")


def broken_yaml(run):
    (run / "config.yaml").write_text("model: {name_or_path: [\n")


def unknown_key(run):
    edit_json(run / "config.yaml", trian={"seed": 1})


def base_gone(run):
    config = json.loads((run / "config.yaml").read_text())
    edit_json(run / "config.yaml", model={**config["model"], "name_or_path": str(run / "nowhere")})


def pickled(run):
    (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter_model.bin")


def weightless(run):
    (run / "adapter" / "adapter_model.safetensors").unlink()


def cut_short(run):
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_names(run):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(".h.1.", ".h.9."): tensor for name, tensor in load_file(path).items()}, path)


def other_shapes(run):
    edit_tensors(run / "adapter" / "adapter_model.safetensors", lambda name, tensor: torch.cat([tensor, tensor], 1))


def not_numbers(run):
    def spoil(name, tensor):
        tensor.view(-1)[3] = math.nan if "h.1.mlp.c_fc.lora_B" in name else tensor.view(-1)[3]
        return tensor

    edit_tensors(run / "adapter" / "adapter_model.safetensors", spoil)


def scrambled(run):
    (run / "adapter" / "adapter_config.json").write_text("{r: 4")


def unknown_method(run):
    edit_json(run / "adapter" / "adapter_config.json", peft_type="LORAX")


SPOILT: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nothing there": (gone, ["nothing at", "copied"]),
    "an empty folder": (hollow, ["copied", "neither config.yaml nor adapter_config.json"]),
    "no config": (without_config, ["copied", "neither config.yaml nor adapter_config.json"]),
    "no result yet": (unfinished, ["no result at", "--resume"]),
    "a config that is no YAML": (broken_yaml, ["config.yaml:2:1"]),
    "a config with an unknown key": (unknown_key, ["trian", "`train`"]),
    "a base that is gone": (base_gone, ["nowhere"]),
    "a pickled adapter": (pickled, ["adapter_model.bin", "pickle"]),
    "an adapter without weights": (weightless, ["adapter_model.safetensors"]),
    "an adapter that was cut short": (cut_short, ["adapter_model.safetensors"]),
    "an adapter with other layers": (other_names, ["adapter", "doesn't fit its base", "h.1"]),
    "an adapter with other shapes": (other_shapes, ["adapter", "doesn't fit its base", "size mismatch"]),
    "an adapter with NaN": (not_numbers, ["h.1.mlp.c_fc.lora_B", "not finite"]),
    "an adapter_config.json that is no JSON": (scrambled, ["adapter_config.json"]),
    "an adapter of an unknown kind": (unknown_method, ["adapter_config.json", "LORAX"]),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILT.values(), ids=SPOILT)
def test_a_target_that_cant_be_judged(refused, run, spoil, named):
    spoil(run)
    message = refused(run, "--json")
    assert all(part in message for part in named), message


def test_a_base_with_nan(refused, run, tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    model.save_pretrained(base)
    message = refused(run, "--set", f"model.name_or_path={base}")
    assert str(base) in message and "not finite" in message


def test_an_adapter_alone(refused, run, rows, tmp_path):
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    message = refused(alone)
    assert "--data" in message
    edit_json(alone / "adapter_config.json", base_model_name_or_path="")
    message = refused(alone, "--data", rows / "heldout.jsonl")
    assert "base_model_name_or_path" in message
    edit_json(alone / "adapter_config.json", base_model_name_or_path=str(tmp_path / "nowhere"))
    message = refused(alone, "--data", rows / "heldout.jsonl")
    assert str(tmp_path / "nowhere") in message


def test_a_config_that_was_never_trained(refused, write_config, tmp_path):
    message = refused(write_config(tmp_path))
    assert "no result at" in message and "lora train" in message


FURTHER = {
    "nowhere": (lambda folder, tiny: None, ["no adapter folder", "other"]),
    "an empty folder": (lambda folder, tiny: folder.mkdir(), ["other"]),
    "a file": (lambda folder, tiny: folder.write_text("x"), ["other"]),
}


@pytest.mark.parametrize(("make", "named"), FURTHER.values(), ids=FURTHER)
def test_a_further_adapter_that_isnt_there(refused, run, tiny, tmp_path, make, named):
    make(tmp_path / "other", tiny)
    message = refused(run, "--adapter", tmp_path / "other")
    assert all(part in message for part in named), message


# Rows

BAD_ROWS = {
    "an empty file": ("", ["rows.jsonl"]),
    "no JSON": ('{"prompt": "a"', ["rows.jsonl:1"]),
    "no object": ("[1, 2]\n", ["rows.jsonl:1"]),
    "unknown columns": ('{"question": "a", "solution": "b"}\n', ["rows.jsonl", "question", "solution"]),
    "a number for a text": ('{"prompt": 3, "completion": "b"}\n', ["rows.jsonl:1", "prompt"]),
    "only empty answers": ('{"prompt": "a", "completion": ""}\n', ["--data", "rows.jsonl: none of the 1 rows"]),
    "no UTF-8": (b'{"text": "\xff\xfe"}\n', ["rows.jsonl:1"]),
}


@pytest.mark.parametrize(("text", "named"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cant_be_read(refused, run, tmp_path, text, named):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(run, "--data", path, "--json")
    assert all(part in message for part in named), message


SOURCES = {
    "missing": ("nowhere.jsonl", ["nowhere.jsonl"]),
    "a folder": (".", []),
    "an unknown key": ("{path: a.jsonl, splt: x}", ["--data {path", "unknown key splt", "split"]),
    "no YAML": ("{path", ["{path"]),
    "nothing": ("", ["--data ''", "empty"]),
    "an empty list": ("[]", ["--data []", "empty"]),
}


@pytest.mark.parametrize(("data", "named"), SOURCES.values(), ids=SOURCES)
def test_a_source_that_isnt_one(refused, run, data, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(run, "--data", data)
    assert all(part in message for part in named), message


def test_an_unknown_split(refused, run, rows):
    message = refused(run, "--data", f"{{path: {rows / 'heldout.jsonl'}, split: dev}}")
    assert "dev" in message


# What is asked of them

ASKED = {
    "an unknown option": (["--measure", "bleu"], ["--measure"]),
    "an unknown base": (["--base", "int8"], ["int8", "'trained', 'original'"]),
    "a base that wasn't quantized": (["--base", "both"], ["not quantized"]),
    "no rows": (["--limit", "0"], ["--limit", "equal to 1"]),
    "half a row": (["-n", "1.5"], ["--limit", "integer"]),
    "no tokens": (["--generate", "--max-new-tokens", "0"], ["--max-new-tokens", "equal to 1"]),
    "an improvement that is no number": (["--min-improvement", "much"], ["--min-improvement", "valid number"]),
    "an improvement of NaN": (["--min-improvement", "nan"], ["--min-improvement", "nan"]),
    "a column that isn't there": (["--group-by", "topic"], ["topic", "messages"]),
    "no regular expression": (["--pattern", "("], ["--pattern ("]),
    "a pattern of nothing": (["--pattern", "zebra"], ["zebra"]),
    "a single choice": (["--choices", "yes"], ["two or more"]),
    "choices that no row has": (["--choices", "yes,nope"], ["no row's answer", "yes, nope"]),
    "shots without tasks": (["--num-fewshot", "2"], ["--num-fewshot", "--tasks"]),
    "a template without tasks": (["--apply-chat-template"], ["--apply-chat-template", "--tasks"]),
    "an unknown setting": (["--set", "train.sed=1"], ["train.sed", "`seed`"]),
    "a setting out of range": (["--set", "data.max_length=0"], ["data.max_length", "0"]),
    "a template that isn't there": (["--set", "data.chat_template=no.jinja"], ["no.jinja"]),
}


@pytest.mark.parametrize(("arguments", "named"), ASKED.values(), ids=ASKED)
def test_a_question_that_cant_be_put(refused, run, arguments, named):
    message = refused(run, *arguments)
    assert all(part in message for part in named), message


def test_answers_to_texts(refused, run, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "it rained all over town"}\n' * 6)
    message = refused(run, "--data", path, "--generate")
    assert "no row has a prompt" in message


@pytest.mark.parametrize(
    "option", [("--data", "x.jsonl"), ("--generate",), ("--choices", "a,b"), ("--base", "both"), ("--group-by", "x")]
)
def test_questions_of_rows_are_no_questions_of_tasks(refused, run, option):
    assert option[0] in refused(run, "--tasks", "mine.yaml", *option)


def test_without_the_harness_its_extra_is_named(refused, run, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert "pip install 'lora-cli[harness]'" in refused(run, "--tasks", "mine.yaml")


# Where it goes


def occupied(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def a_file(folder):
    folder.write_text("mine")


def below_a_file(folder):
    folder.parent.write_text("mine")


OUTPUTS = {
    "holds something else": ("kept", occupied, ["kept", "something else"]),
    "is a file": ("kept", a_file, ["kept", "something else"]),
    "is below a file": ("file/kept", below_a_file, ["file/kept"]),
    "can't be made": ("/proc/kept", lambda folder: None, ["/proc/kept"]),
}


@pytest.mark.parametrize(("place", "make", "named"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cant_be_written(refused, run, tmp_path, place, make, named):
    make(tmp_path / place)
    message = refused(run, "--output", tmp_path / place)
    assert all(part in message for part in named), message
    assert "scoring" not in message


def test_a_failure_while_writing_leaves_the_evaluation_before(refused, lora, run, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    assert lora("eval", run, "--output", kept)[0] == 0

    def full(table, file):
        file.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    assert "No space left on device" in refused(run, "--output", kept, "--limit", "5")
    assert json.loads((kept / "summary.json").read_text())["rows"] == 6


def test_what_isnt_there_is_refused_without_torch(tmp_path):
    """Torch and transformers take seconds to import: a typing error in a path shouldn't."""
    code = (
        "import sys; sys.argv = ['lora', 'eval', 'nowhere']\n"
        "from lora_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'peft', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
