"""The demo's data and its tiny GPT-2: the shipped rows are current and right, and what reads them reads them well."""

from __future__ import annotations

import importlib
import json
import re
import sys
from datetime import datetime
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[2] / "scripts"
FILES = ("train.jsonl", "heldout.jsonl")


def script(name: str) -> ModuleType:
    """A module of scripts/, which is a folder of programs and no package."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


def rows(name: str) -> list[tuple[str, str]]:
    """Question and answer of every row; that they are the roles in each is asserted on the way."""
    found = []
    for line in (SCRIPTS / "demo" / name).read_text(encoding="utf-8").splitlines():
        question, answer = json.loads(line)["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        found.append((question["content"], answer["content"]))
    return found


def parsed(sentence: str) -> str:
    """The sentence's date in ISO, read by strptime and so by nothing that wrote it."""
    text = re.sub(r"\b(\d+)(st|nd|rd|th)\b", r"\1", sentence)
    text = re.sub(r"[,!]|\b(?:the|of)\b", " ", text)
    word = r"(?:\d+|[A-Z][a-z]+)"
    formats = {
        rf"{word} {word} \d{{4}}": ("%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y"),
        r"\d{4} [A-Z][a-z]+ \d+": ("%Y %B %d",),
        r"\d+\.\d+\.\d{4}": ("%d.%m.%Y",),
        r"\d{4}/\d+/\d+": ("%Y/%m/%d",),
    }
    text = " ".join(text.split())
    readings = set()
    for pattern, styles in formats.items():
        for candidate in re.findall(rf"(?<![\d/.]){pattern}(?!\d)", text):
            for style in styles:
                try:
                    readings.add(datetime.strptime(candidate, style).date().isoformat())
                except ValueError:
                    continue
    assert len(readings) == 1, (sentence, readings)
    return readings.pop()


def test_the_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    script("make_demo_data").write_demo_data(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SCRIPTS / "demo" / name).read_bytes(), "run scripts/make_demo_data.py"
        assert (tmp_path / name).stat().st_size < 500_000


@pytest.mark.parametrize("name", FILES)
def test_every_answer_is_the_only_reading_of_its_question(name: str) -> None:
    assert len(rows(name)) >= 200
    for question, answer in rows(name):
        assert parsed(question) == answer


def test_no_heldout_date_or_question_was_trained_on() -> None:
    train, heldout = rows("train.jsonl"), rows("heldout.jsonl")
    assert not {answer for _, answer in train} & {answer for _, answer in heldout}
    assert not {question for question, _ in train} & {question for question, _ in heldout}
    assert len(set(heldout)) == len(heldout) == 200


def test_the_base_is_never_shown_the_task() -> None:
    small_talk, random = script("make_demo_data").small_talk, Random(5)
    for _ in range(2_000):
        asked, answered = small_talk(random)
        assert asked["content"] == answered["content"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    script("make_tiny_gpt2").build_tiny_gpt2(folder, n_embd=64, n_layer=1, pretrain_steps=2)
    return folder


def test_the_same_bytes_every_time(tiny: Path, tmp_path: Path) -> None:
    script("make_tiny_gpt2").build_tiny_gpt2(tmp_path, n_embd=64, n_layer=1, pretrain_steps=2)
    names = sorted(path.name for path in tiny.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes(), name


def test_pretraining_changes_the_weights_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    script("make_tiny_gpt2").build_tiny_gpt2(tmp_path, n_embd=64, n_layer=1)
    differing = {path.name for path in tiny.iterdir() if path.read_bytes() != (tmp_path / path.name).read_bytes()}
    assert differing == {"model.safetensors"}


def test_a_turn_ends_with_the_token_that_stops_generation(tiny: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    opening = tokenizer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=True)
    assert text == opening + "Hello<|im_end|>\n"
    stop = GenerationConfig.from_pretrained(tiny).eos_token_id
    assert tokenizer(text)["input_ids"][-2] == stop == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != stop


def test_every_digit_is_a_token_in_both_classes_that_may_load_it(tiny: Path) -> None:
    from transformers import AutoTokenizer, GPT2TokenizerFast

    for tokenizer in (AutoTokenizer.from_pretrained(tiny), GPT2TokenizerFast.from_pretrained(tiny)):
        for question, answer in rows("heldout.jsonl"):
            tokens = tokenizer.tokenize(f"{question} {answer}")
            assert max(sum(character.isdigit() for character in token) for token in tokens) == 1


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tiny: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
