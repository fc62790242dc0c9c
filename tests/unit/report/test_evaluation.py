"""The screens of `eval` and `generate`."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from lora_cli.report.comparison import Comparison, Demand, Evaluation, Generations, Group, Measure, Output, RowChange
from lora_cli.report.evaluation import render_evaluation, render_outputs
from lora_cli.report.evaluation_page import Piece, Reading, render_evaluation_page
from lora_cli.report.tasks import TaskComparison, TaskEvaluation, TaskFigure, render_tasks
from lora_cli.report.tasks_page import render_tasks_page


def measure(name, base, adapter, low, high):
    return Measure(name, base, adapter, adapter - base, low, high)


COMPARISON = Comparison(
    adapter="runs/docs/adapter",
    precision="nf4, double quant",
    measures=(
        measure("loss", 1.3981, 1.0346, -0.3871, -0.3402),
        measure("perplexity", 4.0475, 2.8140, -1.3, -1.1),
        measure("row_loss", 1.4, 1.1, -0.4, -0.2),
        measure("token_accuracy", 0.6512, 0.7240, 0.0661, 0.0795),
    ),
    better=441,
    worse=59,
    sign_test_p=1e-60,
    outcome="better",
    verdict="better: loss -0.3635, 95 % interval -0.3871 to -0.3402, 441 of 500 rows improved",
    gained=(RowChange("test.jsonl:17", 3.0, 1.0),),
    lost=(RowChange("test.jsonl:212", 1.0, 2.41), RowChange("test.jsonl:87", 1.0, 1.96)),
)
EVALUATION = Evaluation(
    target="runs/docs",
    data="data/test.jsonl",
    rows=500,
    num_supervised_tokens=71_204,
    answers=0,
    comparison=COMPARISON,
    others=(),
    warnings=(),
    demand=Demand(),
    folder=Path("runs/docs/eval/test"),
)


def test_figures_stand_side_by_side():
    text = render_evaluation(EVALUATION, 100)
    rows = [line.split() for line in text.splitlines()]
    assert ["loss", "1.3981", "1.0346", "-0.3635", "-0.3871", "..", "-0.3402"] in rows
    assert "500 rows, 71,204 scored tokens" in text
    assert "test.jsonl:212 (+1.41), test.jsonl:87 (+0.96)" in text
    assert "441 better, 59 worse; sign test p below 0.0001" in text


def test_a_perplexity_is_compared_as_a_ratio():
    [line] = [line for line in render_evaluation(EVALUATION, 100).splitlines() if "perplexity" in line]
    assert line.split() == ["perplexity", "4.0475", "2.8140", "-30.5", "%", "-32.1", "..", "-28.8"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_nothing_is_wider_than_the_screen_or_cut(width):
    several = replace(EVALUATION, others=(COMPARISON,), demand=Demand(min_improvement=0.05))
    text = render_evaluation(several, width)
    assert max(map(cell_len, text.splitlines())) <= width
    for figure in ("1.3981", "-0.3635", "-0.3871 .. -0.3402", "+0.0661 .. +0.0795"):
        assert text.count(figure) >= 2


def test_few_rows_get_no_interval():
    text = render_evaluation(replace(EVALUATION, rows=4), 100)
    assert "-0.3871 .." not in text
    assert "too few rows" in text


def test_what_was_asked_is_answered():
    asked = replace(EVALUATION, demand=Demand(min_improvement=0.05))
    assert "0.05 nats of improvement were asked, which is met" in render_evaluation(asked, 100)
    more = replace(EVALUATION, demand=Demand(min_improvement=0.5))
    assert "which is not met" in render_evaluation(more, 100)


def test_numbers_that_json_lacks_become_null():
    broken = replace(COMPARISON, measures=(Measure("loss", 1.0, math.nan, math.nan, math.nan, math.inf),))
    found = json.loads(json.dumps(replace(EVALUATION, comparison=broken).as_json(), allow_nan=False))
    assert found["adapter"]["loss"] is None
    assert found["difference"]["intervals"]["loss"] == [None, None]
    assert "nan" in render_evaluation(replace(EVALUATION, comparison=broken), 100)


def test_answers_stand_under_their_prompt():
    outputs = [Output("when?", None, "no idea", "length"), Output("when?", "runs/a/adapter", "12 May", "stop")]
    text = render_outputs(Generations(tuple(outputs)), 80)
    assert text.splitlines() == [
        "  when?", "", "  base (cut at the limit)", "    no idea", "", "  runs/a/adapter", "    12 May",
    ]  # fmt: skip


ROWS = {
    "place": [f"test.jsonl:{number}" for number in range(1, 9)],
    "base_loss": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7],
    "adapter_loss": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0],
    "text": ["<script>alert(1)</script>"] * 8,
}


READINGS = [
    Reading(6, "<b>ask</b>", (Piece("<script>", -3.0), Piece(" yes", 0.7), Piece(" no", 0.01)), cut=False),
    Reading(5, "ask", (Piece("yes", -1.0),), cut=True),
    Reading(7, "", (Piece("lost", 2.0), Piece("<|end|>", None)), cut=False),
]


def test_the_page_shows_what_changed_most():
    page = render_evaluation_page(EVALUATION, ROWS, READINGS)
    gained, lost = page.split("Most gained")[1].split("Most lost")
    assert gained.index("test.jsonl:7") < gained.index("test.jsonl:6")
    assert "test.jsonl:8" in lost
    assert "test.jsonl:7" not in lost
    assert "2.7000 → 4.0000" in lost
    assert page.count("<svg") == 2


def test_tokens_are_tinted_by_how_much_likelier_they_became():
    page = render_evaluation_page(EVALUATION, ROWS, READINGS)
    assert '<span class="d3">&lt;script&gt;</span><span class="u2"> yes</span> no' in page
    assert '<span class="u3">lost</span>&lt;|end|&gt;' in page
    assert page.count(" ...</p>") == 1


def test_the_page_runs_nothing_from_the_rows():
    answered = {
        "prompt": ["<b>"] * 8,
        "reference": ["<i>"] * 8,
        "base_answer": ["<u>"] * 8,
        "adapter_answer": ["<s>"] * 8,
    }
    spoilt = replace(
        EVALUATION, target="<h1>", warnings=("<hr>",), comparison=replace(COMPARISON, groups=(group("<em>", 9),))
    )
    page = render_evaluation_page(spoilt, ROWS | answered, READINGS)
    for tag in ("<script", "<b>ask", "<i>", "<u>", "<s>", "<hr>", "<h1><", "<em>"):
        assert tag not in page
    for spelled in ("&lt;script&gt;", "&lt;u&gt;", "&lt;s&gt;", "&lt;em&gt;", "&lt;b&gt;ask"):
        assert spelled in page


def test_the_policy_lets_the_pages_own_style_in_and_nothing_else():
    page = render_evaluation_page(EVALUATION, ROWS, READINGS)
    style = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in page
    assert " style=" not in page  # which the policy would block


def group(name, rows, difference=-0.5):
    return Group(
        name, rows, (measure("loss", 2.0, 2.0 + difference, difference - 0.1, difference + 0.1),), rows, 0, "better"
    )


def test_nothing_at_all_is_no_small_number():
    nothing = replace(
        COMPARISON, measures=(measure("loss", 1.0, 1.0, 0.0, 0.0), measure("chrf", 0.5, 0.50001, -1e-5, 3e-5))
    )
    loss, chrf = (
        line for line in render_evaluation(replace(EVALUATION, comparison=nothing), 80).splitlines() if "0 .. " in line
    )
    assert loss.split()[3:] == ["0", "0", "..", "0"]
    assert chrf.split()[3:] == ["+0.0000", "-0.0000", "..", "+0.0000"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_groups_stand_below_the_figures(width):
    groups = (group("law and order, a long name of a group that goes on", 300), group("medicine", 4))
    several = tuple(group(f"g{number}", 9) for number in range(20))
    text = render_evaluation(replace(EVALUATION, comparison=replace(COMPARISON, groups=groups + several)), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "medicine" in text and "too few rows" in text
    assert "and 10 smaller groups" in text


def test_adapters_are_compared_with_each_other():
    other = replace(COMPARISON, versus=measure("loss", 1.0346, 1.0446, -0.002, 0.022))
    evaluation = replace(EVALUATION, others=(other,))
    assert "against the first adapter: loss +0.0100, 95 % interval -0.0020 to +0.0220" in render_evaluation(
        evaluation, 120
    )
    assert "gainst the first adapter: loss +0.0100" in render_evaluation_page(evaluation, ROWS)
    assert evaluation.as_json()["others"][0]["versus_first"]["high"] == 0.022


def tasks(*figures):
    comparison = TaskComparison("runs/docs/adapter", "float32", figures)
    return TaskEvaluation("runs/docs", ("mine.yaml",), comparison, (), None, None, False, True, None)


def test_tasks_are_judged_by_which_way_is_better():
    better = TaskFigure("t", measure("acc", 0.5, 0.7, 0.1, 0.3), 40, True)
    worse = TaskFigure("t", measure("ter", 0.5, 0.7, 0.1, 0.3), 40, False)
    few = TaskFigure("t", measure("acc", 0.5, 0.7, 0.1, 0.3), 4, True)
    whole = TaskFigure("t", Measure("ppl", 9.0, 8.0, -1.0, math.nan, math.nan), 40, False)
    assert [one.outcome for one in (better, worse, few, whole)] == ["better", "worse", "can't tell", "can't tell"]
    found = tasks(better, worse, few, whole)
    assert found.comparison.verdict == "of 4 figures: 1 better, 1 worse, 2 can't tell"
    assert not found.meets_demand
    assert tasks(better, few).meets_demand
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["difference"]["intervals"]["t ppl"] == [None, None]
    for width in (40, 80, 120):
        assert max(map(cell_len, render_tasks(found, width).splitlines())) <= width
    assert "<script" not in render_tasks_page(replace(found, target="<script>"))


def test_an_answer_cant_steer_the_terminal():
    text = render_outputs(Generations((Output("a\x1b[2J", None, "b\x1b[2J", "stop"),)), 80)
    assert "\x1b" not in text
