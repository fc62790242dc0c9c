"""Matching answers, and naming folders."""

from __future__ import annotations

import numpy as np
import pytest

from lora_cli.evaluate.answers import exact, normalised
from lora_cli.evaluate.rows import rows_name, supervised_runs


@pytest.mark.parametrize(
    ("answer", "reference", "is_exact", "is_normalised"),
    [
        ("12 May", "12 May", True, True),
        (" 12 May\n", "12 May", True, True),
        ("12 may.", "12 May", False, True),
        ("12  May", "12 May", False, True),
        ("１２ May", "12 May", False, True),
        ("12 June", "12 May", False, False),
        ("", "12 May", False, False),
        ("1,2", "1.2", False, True),
        ("12", "1 2", False, False),
    ],
)
def test_matches(answer, reference, is_exact, is_normalised):
    assert exact(answer, reference) == is_exact
    assert (normalised(answer) == normalised(reference)) == is_normalised


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("validation", "validation"),
        ("data/test.jsonl", "test"),
        ("/a/b/held out.jsonl.gz", "held-out"),
        ("org/some-data", "some-data"),
        ("data/.hidden", "rows"),
        ("..", "rows"),
    ],
)
def test_rows_are_named_after_their_source(source, name):
    assert rows_name(source) == name


@pytest.mark.parametrize(
    ("flags", "runs"), [("", []), ("0110", [(1, 3)]), ("1", [(0, 1)]), ("00", []), ("10011", [(0, 1), (3, 5)])]
)
def test_supervised_runs(flags, runs):
    assert supervised_runs(np.array([flag == "1" for flag in flags], dtype=bool)) == runs
