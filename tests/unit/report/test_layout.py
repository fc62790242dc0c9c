from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lora_cli.report.layout import columns, command, labelled, printable, short_path, table, wrap

words = st.text(st.characters(categories=("L", "N", "P"), exclude_characters="/"), min_size=1, max_size=90)


@given(st.lists(words, max_size=30), st.integers(40, 140))
def test_nothing_is_wider_than_asked_and_nothing_is_lost(texts: list[str], width: int) -> None:
    lines = labelled("label", " ".join(texts), width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace("label", "", 1).replace(" ", "") == "".join(map(printable, texts))


def test_a_path_is_never_broken() -> None:
    path = "/data/" + "x" * 100 + "/train.jsonl"
    assert path in "\n".join(wrap(f"read from {path} today", 40))


@pytest.mark.parametrize("width", range(20, 60))
def test_a_number_stays_with_its_unit(width: int) -> None:
    text = "\n".join(wrap("11.5 of 23.6 GiB at 8,192 tokens, 34.5 % trained (0.52 %), 2,401 tok/s", width))
    for whole in ("23.6 GiB", "8,192 tokens", "34.5 %", "0.52 %", "2,401 tok/s"):
        assert whole in text


def test_control_characters_cannot_steer_the_terminal() -> None:
    assert wrap("a\x1b[2Jb\rc", 80) == [r"a\x1b[2Jb\rc"]


@given(st.lists(st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1), min_size=1, max_size=8))
def test_a_wrapped_command_is_the_same_command_to_a_shell(arguments: list[str]) -> None:
    text = "\n".join(command(arguments, 40))
    assert shlex.split(text.replace("\\\n", " ")) == arguments


def test_a_command_uses_the_width_it_has() -> None:
    words = ["lora", "merge", "runs/docs", "--output", "merged/docs"]
    assert command(words, 80) == ["  lora merge runs/docs --output merged/docs"]
    assert command(words, 40) == ["  lora merge runs/docs --output \\", "    merged/docs"]


ROWS = [("q_proj", "32", "4096 x 4096", "536,870,912"), ("embed_tokens", "1", "128256 x 4096", "525,336,576")]


@pytest.mark.parametrize("width", [40, 46, 50, 60, 80])
def test_a_table_never_cuts_a_number(width: int) -> None:
    lines = table(("module", "count", "shape", "base"), ROWS, width, dispensable=2)
    text = "\n".join(lines)
    assert all(cell_len(line) <= width for line in lines)
    assert "536,870,912" in text
    assert "525,336,576" in text


def test_a_table_that_is_too_wide_becomes_a_list() -> None:
    lines = table(("module", "count", "base"), [("a_module_with_a_name_of_some_length", "32", "536,870,912")], 40)
    assert lines == ["  a_module_with_a_name_of_some_length", "    count   32", "    base    536,870,912"]


def test_numbers_stand_below_each_other() -> None:
    header, first, second = table(("module", "count", "shape", "base"), ROWS, 80)
    assert len(header) == len(first) == len(second)


def test_columns_asks_the_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    assert columns() == 77
    monkeypatch.setenv("COLUMNS", "3")
    assert columns() == 40
    monkeypatch.setenv("COLUMNS", "wide")
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((93, 20)))
    assert columns() == 93


def test_only_paths_inside_the_working_directory_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "runs" / "a") == "runs/a"
    assert short_path("/elsewhere/a") == "/elsewhere/a"
