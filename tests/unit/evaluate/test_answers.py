"""Matching answers with references, and naming folders."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lora_cli.evaluate import matching
from lora_cli.evaluate.matching import exact, extract, mark, matching_fields, normalised
from lora_cli.evaluate.overlap import chrf, rouge_l
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
        ("data/a.jsonl, data/b.jsonl", "a+b"),
        ("a.jsonl, b.jsonl, c.jsonl, d.jsonl", "a+3"),
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
    plain = {one.name: one for one in mark(["a", "b"], ["a", "c"], [True, False])}
    assert not {"valid_json", "matching_fields", "pattern_match"} & plain.keys()
    assert [plain[name].values.tolist() for name in ("exact_match", "normalised_match", "ended_by_itself")] == [
        [1, 0]
    ] * 3
    mixed = {one.name: one for one in mark(['{"a": 1}', "{}"], ['{"a": 2}', "yes"], [True, True])}
    assert mixed["valid_json"].values.tolist() == [1, 0]
    assert mixed["valid_json"].counted.tolist() == [1, 0]
    assert mixed["matching_fields"].values.tolist() == [0, 0]


def test_a_pattern_compares_what_it_finds():
    number = re.compile(r"(\d+) (?:EUR|euros)")
    answers = ["it costs 12 euros", "it costs 13 EUR", "no idea", "5 EUR"]
    references = ["12 EUR", "12 EUR", "12 EUR", "free"]
    [found] = [one for one in mark(answers, references, [True] * 4, number) if one.name == "pattern_match"]
    assert found.values.tolist() == [1, 0, 0, 0]
    assert found.counted.tolist() == [1, 1, 1, 0]  # the last reference says nothing of it
    assert extract(re.compile("b+"), "abbc") == "bb"
    assert extract(re.compile("a(x)?"), "a") is None


PAIRS = [
    ("the cat sat", "the cat sat on the mat"),
    ("on the mat the cat sat", "the cat sat on the mat"),
    ("The Cat, sat!", "the cat sat"),
    ("dogs_and cats", "dogs and cats"),
    ("", "x"),
    ("nothing shared", "the cat"),
]


def test_rouge_l_is_the_librarys_on_english_text():
    theirs = RougeScorer(["rougeL"])
    expected = [theirs.score(reference, answer)["rougeL"].fmeasure for answer, reference in PAIRS]
    assert rouge_l(PAIRS).tolist() == pytest.approx(expected)
    # Longest common subsequence of 3 words, of 3 and 6: F = 2 * 1 * 0.5 / 1.5.
    assert expected[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("кот спит", "кот спит тут", 0.8),
        ("我喜欢猫", "我喜欢狗", 0.75),
        ("ねこ", "ねこ", 1.0),
        ("고양이 잔다", "고양이", 2 / 3),
    ],
)
def test_rouge_l_reads_every_script(answer, reference, score):
    assert rouge_l([(answer, reference)]).tolist() == pytest.approx([score])
    assert RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure == 0  # why ours differs


def test_chrf_by_hand():
    # "ab" against "abc": character n-grams. n=1: precision 1, recall 2/3; n=2: precision 1, recall 1/2; beta 2
    # weighs recall 4 times: F = 5 p r / (4 p + r), of the means over the orders that both have.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    [score] = chrf([("ab", "abc")]).tolist()
    assert score == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf([("abc", "abc"), ("xyz", "abc")]).tolist() == pytest.approx([1.0, 0.0])


def test_without_the_libraries_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(matching, "overlap_is_measured", lambda: False)
    names = [one.name for one in mark(["a"], ["a"], [True])]
    assert names == ["exact_match", "normalised_match", "ended_by_itself"]


@given(st.lists(st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=5))
def test_every_mark_is_a_share(pairs):
    answers, references = zip(*pairs, strict=True)
    for one in mark(answers, references, [True] * len(pairs), re.compile(".")):
        assert ((one.values >= 0) & (one.values <= 1 + 1e-9)).all(), one.name
        assert set(one.counted.tolist()) <= {0.0, 1.0}


def test_an_answer_that_is_the_reference_has_full_marks():
    for text in ("12 May", '{"a": [1, 2]}', "我喜欢猫"):
        assert {value for one in mark([text], [text], [True]) for value in one.values.tolist()} == {1.0}
