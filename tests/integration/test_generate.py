"""`lora generate`: several adapters on one base, streaming, a chat on a terminal, prompts from files."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.engine import wearing
from lora_cli.engine.generation import Sampling
from lora_cli.errors import UserError
from lora_cli.evaluate import generate, voices
from lora_cli.evaluate.prompts import Prompt

Lora = Callable[..., tuple[int, str, str]]
SAMPLING = Sampling(max_new_tokens=12)
FLOAT32: dict[str, Any] = {"sampling": SAMPLING, "overrides": ["model.dtype=float32"]}
PROMPTS = ["noon", "the rent is due on", "when it rained"]


def save_adapter(folder: Path, base: Path, *, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"target_modules": ["c_attn", "c_fc"], "r": 4, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**options, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loud(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights: it says something else each time, and not one word over and over."""
    folder = tmp_path_factory.mktemp("models") / "loud"
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "wte" not in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def three(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [{}, {"use_rslora": True, "r": 2}, {"use_dora": True}]
    return [save_adapter(folder / f"a{i}", loud, seed=i, **kind) for i, kind in enumerate(kinds)]


def test_three_adapters_on_one_base_answer_as_each_does_alone(
    three: list[Path], loud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = 0
    real = voices.load_base

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal loads
        loads += 1
        return real(*arguments, **options)

    monkeypatch.setattr(voices, "load_base", counted)
    together = generate(three[0], prompts=PROMPTS, adapters=[str(one) for one in three[1:]], **FLOAT32)
    assert loads == 1
    found = {(one.prompt, one.adapter): one.text for one in together.outputs}
    assert len(found) == len(PROMPTS) * 4
    tokenizer = AutoTokenizer.from_pretrained(loud)
    for folder in three:
        alone = generate(folder, prompts=PROMPTS, **FLOAT32)
        assert {(one.prompt, one.adapter): one.text for one in alone.outputs}.items() <= found.items()
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(loud, dtype=torch.float32), str(folder))
        for prompt in PROMPTS:
            asked = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            output = plain.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert tokenizer.decode(output, skip_special_tokens=True) == found[prompt, str(folder)]
    assert len({tuple(found[prompt, name] for prompt in PROMPTS) for name in (None, *map(str, three))}) == 4


def test_a_stack_answers_as_its_merge_does(three: list[Path], tmp_path: Path) -> None:
    from lora_cli.merge import merge

    stack = f"{three[0]}:0.7+{three[1]}:0.5"
    stacked = generate(three[0], prompts=PROMPTS, adapters=[stack], sampling=SAMPLING)
    merge([f"{three[0]}:0.7", f"{three[1]}:0.5"], tmp_path / "merged", verify=False, dtype="float32")
    merged = generate(tmp_path / "merged", prompts=PROMPTS, sampling=SAMPLING, base=False)
    assert [one.text for one in merged.outputs] == [one.text for one in stacked.outputs if one.adapter == stack]


def test_the_base_can_be_left_out(three: list[Path], lora: Lora) -> None:
    code, out, _ = lora("generate", three[0], "--prompt", "noon", "--no-base", "--max-new-tokens", "3", "--json")
    assert code == 0
    assert [one["adapter"] for one in json.loads(out)["outputs"]] == [str(three[0])]


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[str | None, list[str]]] = []

    def begin(self, adapter: str | None) -> None:
        self.said.append((adapter, []))

    def say(self, text: str) -> None:
        self.said[-1][1].append(text)

    def end(self, stop_reason: str) -> None:
        assert stop_reason in ("stop", "length")


def test_what_is_heard_while_it_comes_is_the_answer(three: list[Path]) -> None:
    heard = Heard()
    prompts = ["the rent is due on"]
    result = generate(three[0], prompts=prompts, sampling=SAMPLING, listener=heard)
    assert [(adapter, "".join(pieces)) for adapter, pieces in heard.said] == [
        (one.adapter, one.text) for one in result.outputs
    ]
    assert any(len(pieces) > 1 for _, pieces in heard.said)
    assert result == generate(three[0], prompts=prompts, sampling=SAMPLING)


def test_prompts_of_a_jsonl_file_may_be_conversations(three: list[Path], tmp_path: Path, lora: Lora) -> None:
    said = [
        {"role": "user", "content": "noon"},
        {"role": "assistant", "content": "may"},
        {"role": "user", "content": "town"},
    ]
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "noon"}, {"messages": said}, {"messages": [*said, {"role": "assistant", "content": "x"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, "day"]))
    asked = ("generate", three[0], "--no-base", "--max-new-tokens", "8", "--json")
    code, out, err = lora(*asked, "--prompts-file", file)
    assert code == 0, err
    outputs = json.loads(out)["outputs"]
    assert [one["prompt"] for one in outputs] == ["noon", "town", "town", "day"]
    assert outputs[1]["text"] == outputs[2]["text"] != outputs[0]["text"]
    file.write_text('{"prompt": "noon"}\n\n{"question": "noon"}\n')
    code, out, err = lora(*asked, "--prompts-file", file)
    assert (code, out) == (2, "")
    assert f"{file}:3" in err


def test_sampling_goes_by_transformers_names(three: list[Path], lora: Lora) -> None:
    asked = ("generate", three[0], "--prompt", "noon", "--no-base", "--json", "--max-new-tokens", "12")

    def text(*options: str) -> str:
        code, out, err = lora(*asked, *options)
        assert code == 0, err
        return str(json.loads(out)["outputs"][0]["text"])

    greedy = text()
    assert text("--temperature", "2", "--top-k", "1") == greedy
    assert text("--temperature", "2", "--min-p", "1") == greedy
    assert text("--temperature", "2", "--seed", "1") != text("--temperature", "2", "--seed", "2")
    assert text("--repetition-penalty", "1000") != greedy


def test_an_answer_to_a_system_message_is_another(three: list[Path]) -> None:
    asked = [Prompt("noon")]
    plain = generate(three[0], prompts=asked, sampling=SAMPLING, base=False)
    with_system = generate(three[0], prompts=asked, sampling=SAMPLING, base=False, system="it rained all day")
    assert plain.outputs[0].text != with_system.outputs[0].text
    with pytest.raises(UserError, match="no chat template"):
        generate(three[0], prompts=asked, sampling=SAMPLING, raw=True, system="rain")


@pytest.mark.parametrize("adapter", ["nothing-here", "A:0.5+nothing-here"])
def test_an_adapter_that_is_not_there_is_named(three: list[Path], lora: Lora, adapter: str) -> None:
    named = adapter.replace("A", str(three[0]))
    code, out, err = lora("generate", three[0], "--prompt", "noon", "--adapter", named)
    assert (code, out) == (2, "")
    assert "nothing-here" in err and "Traceback" not in err


def chat(arguments: list[str], lines: list[str], columns: int) -> str:
    """What a terminal shows of a chat in which these lines are typed, each once the last is answered."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_cli", *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    shown, left = b"", [*lines]
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            shown += os.read(master, 65536)
        except OSError:
            break
        if shown.rstrip(b"\x1b[?2004h ").endswith(b"\n>") and left:
            os.write(master, f"{left.pop(0)}\n".encode())
    assert process.wait(10) == 0, shown.decode()
    os.close(master)
    assert not left, shown.decode()
    return shown.decode()


def test_a_chat_on_a_terminal(three: list[Path]) -> None:
    arguments = ["generate", str(three[0]), "--adapter", str(three[1]), "--max-new-tokens", "6"]
    shown = chat(arguments, ["noon", "/base", "noon", "/adapter 2", "/adapter 9", "/forget", "noon", "/quit"], 80)
    assert "base answers now" in shown
    assert f"{three[1]} answers now" in shown
    assert "there is no voice 9" in shown
    assert "forgotten" in shown
    for voice, adapters in ((str(three[0]), []), (str(three[1]), [])):
        (answer,) = generate(voice, prompts=["noon"], adapters=adapters, sampling=Sampling(6), base=False).outputs
        assert " ".join(answer.text.split()) in " ".join(shown.split())
    assert "Traceback" not in shown


def test_adapters_are_taken_off_again(three: list[Path]) -> None:
    """The base answers the same before and after; `worn` is what puts them on."""
    assert voices.worn is wearing.worn
    first = generate(three[0], prompts=PROMPTS, sampling=SAMPLING)
    backwards = generate(three[2], prompts=PROMPTS, adapters=[str(three[0])], sampling=SAMPLING)
    of_base = [[one.text for one in result.outputs if one.adapter is None] for result in (first, backwards)]
    assert of_base[0] == of_base[1]
