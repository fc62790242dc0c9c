from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_cli.runs.atomic import write_json, write_text


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_text(file, "old\n")
    write_text(file, "neü\r\n")
    assert file.read_bytes() == "neü\r\n".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "summary.json"
    write_text(file, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_written_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_valid_even_for_numbers_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"loss": float("nan"), "list": [1.5, float("-inf")], "name": "ä"})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "list": [1.5, None],
        "name": "ä",
    }
