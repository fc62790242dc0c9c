"""Matching answers with references, and naming folders."""

from __future__ import annotations

import numpy as np
import pytest

from lora_cli.evaluate.matching import exact, mark, matching_fields, normalised
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


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', 1.0),
        ('{"a": 1, "b": "y"}', '{"a": 1, "b": "x"}', 0.5),
        ('{"a": 1, "c": 2}', '{"a": 1, "b": 2}', 1 / 3),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": null}', '{"b": 1}', 0.0),
        ("{}", "{}", 1.0),
        ("[1, 2]", "[1, 2]", 1.0),
        ("[2, 1]", "[1, 2]", 0.0),
        ("no", '{"a": 1}', 0.0),
        ("[" * 100_000, "[]", 0.0),
    ],
)
def test_fields(answer, reference, share):
    assert matching_fields(answer, reference) == pytest.approx(share)


def test_json_is_measured_where_the_reference_is_json():
    plain = mark(["a", "b"], ["a", "c"], [True, False])
    assert [one.name for one in plain] == ["exact_match", "normalised_match", "ended_by_itself"]
    assert [one.values.tolist() for one in plain] == [[1, 0], [1, 0], [1, 0]]
    mixed = {one.name: one for one in mark(['{"a": 1}', "{}"], ['{"a": 2}', "yes"], [True, True])}
    assert mixed["valid_json"].values.tolist() == [1, 0]
    assert mixed["valid_json"].counted.tolist() == [1, 0]
    assert mixed["matching_fields"].values.tolist() == [0, 0]
