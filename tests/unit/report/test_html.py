from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from lora_cli.plan import Plan
from lora_cli.report.events import Summary
from lora_cli.report.html import ReportInput, render_report
from lora_cli.report.sections import MaskedExample, Sample, render_config
from lora_cli.report.svg import Mark

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(1)>&amp;'
Line = Callable[..., dict[str, Any]]


@pytest.fixture
def report(plan: Plan, summary: Summary, line: Line) -> ReportInput:
    evaluation = [{"step": step, "eval_loss": 1.4 - step / 10_000} for step in (200, 400, 600)]
    return ReportInput(
        name="docs",
        config_text="model:\n  name_or_path: gpt2\ndata:\n  train:\n  - path: a.jsonl\ntrain:\n  seed: 42\n",
        environment={
            "started": "2026-03-01T09:30:00+00:00",
            "device": "a GPU",
            "packages": {"torch": "2.13.0"},
            "git": {"commit": "ccd0a1ebbbbbb", "dirty": False},
        },
        metrics=[*(line(step) for step in range(10, 2341, 10)), *evaluation],
        summary=summary.as_json(),
        samples=[Sample("When?", "noon", "at night", "at noon")],
        command="lora train runs/docs/config.yaml",
        warnings=["41 rows lose their end"],
        marks=[
            Mark(200, "checkpoint", "checkpoint at step 200"),
            Mark(250, "resume", "resumed after step 249"),
        ],
        data={**asdict(plan.data), "lengths": ((512, 9000), (1024, 3000), (2048, 467))},
        max_length=2048,
        example=MaskedExample("train.jsonl:1", (("<user>When?", False), ("At <noon>.", True), ("\n", False))),
        non_defaults=frozenset({"data.train"}),
        max_grad_norm=1.0,
        estimated_bytes=int(11.5 * 2**30),
    )


class Page(html.parser.HTMLParser):
    """What a browser would find: balanced tags, their attributes, and the text of scripts and styles."""

    VOID = ("meta", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append((self.tags[-1][1], data))


def test_same_input_same_bytes(report: ReportInput) -> None:
    assert render_report(report) == render_report(replace(report, metrics=list(report.metrics)))


def test_the_page_loads_nothing_and_its_policy_names_its_own_hashes(report: ReportInput) -> None:
    text = render_report(report)
    page = Page(text)
    assert page.open == []
    for _, attributes in page.tags:
        assert not {"src", "href", "style", "onclick", "onload"} & attributes.keys()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    executed = [text for attributes, text in page.raw if "type" not in attributes]
    assert len(executed) == 2
    for code in executed:
        assert base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in policy


def test_text_from_data_and_models_is_text(report: ReportInput) -> None:
    hostile = replace(
        report,
        name=HOSTILE,
        config_text=f"model: {HOSTILE}",
        environment={"device": HOSTILE, "packages": {HOSTILE: HOSTILE}},
        samples=[Sample(HOSTILE, HOSTILE, HOSTILE, "x" + HOSTILE)],
        command=HOSTILE,
        warnings=[HOSTILE],
        marks=[Mark(5, "resume", HOSTILE)],
        data={**(report.data or {}), "reasons": {HOSTILE: [HOSTILE]}},
        example=MaskedExample(HOSTILE, ((HOSTILE, True), (HOSTILE, False))),
    )
    page = Page(render_report(hostile))
    assert page.open == []
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any(tag == "img" for tag, _ in page.tags)


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="metrics">(.*?)</script>', text)
    assert found
    return dict(json.loads(found[1]))


def test_the_metrics_are_on_the_page(report: ReportInput) -> None:
    metrics = embedded(render_report(report))
    training = [line for line in report.metrics if "loss" in line]
    assert metrics["training"]["step"] == [line["step"] for line in training]
    assert metrics["training"]["loss"] == pytest.approx([line["loss"] for line in training], rel=1e-5)
    assert [line["step"] for line in metrics["evaluation"]] == [200, 400, 600]


def test_a_long_run_stays_small_and_keeps_its_spike(report: ReportInput, line: Line) -> None:
    metrics = [line(step) for step in range(1, 50_001)]
    metrics[33_333]["loss"] = 17.25
    text = render_report(replace(report, metrics=metrics, samples=[Sample(*["&" * 10**6] * 4)] * 5))
    assert len(text.encode()) < 500_000
    assert max(embedded(text)["training"]["loss"]) == 17.25
    for path in re.findall(r' d="(M[^"]+)"', text):
        assert path.count("L") < 1000


def test_values_that_are_not_numbers_leave_a_gap(report: ReportInput, line: Line) -> None:
    metrics = [line(step) for step in range(10, 100, 10)]
    metrics[3]["loss"] = None
    metrics[4]["grad_norm"] = float("nan")
    text = render_report(replace(report, metrics=metrics))
    assert "nan" not in re.sub(r"<script>.*", "", text, flags=re.DOTALL).lower()
    assert embedded(text)["training"]["loss"][3] is None


def test_sections_without_data_do_not_appear(report: ReportInput) -> None:
    bare = ReportInput("docs", "model: gpt2\n", {}, [])
    text = render_report(bare)
    for heading in ("Loss", "Samples", "Data"):
        assert f"<h2>{heading}</h2>" in render_report(report)
        assert f"<h2>{heading}</h2>" not in text
    assert "<svg" not in text
    assert "not finished, 0 steps so far" in text


def test_a_single_line_can_be_drawn(report: ReportInput, line: Line) -> None:
    text = render_report(replace(report, metrics=[line(1)], marks=()))
    assert "nan" not in text[: text.index("<script")].lower()
    assert text.count("<svg") == 6


def test_the_head_answers_first(report: ReportInput) -> None:
    text = render_report(report)
    head = text[: text.index("<h2>")]
    for figure in ("1.3800 → 1.3400 → 1.3400", "5,394,630", "1 h 48 min", "2,401", "11.4 GiB"):
        assert figure in head
    assert "finished, 2,340 steps · resumed once · 2026-03-01 · a GPU · commit ccd0a1e" in head
    assert "0.9 % under the estimate" in head
    assert "41 rows lose their end" in head


def test_epochs_stand_where_they_end(report: ReportInput) -> None:
    text = render_report(report)
    assert text.count('class="epoch"') == 2  # of three; the last ends with the run
    assert "<title>epoch 1 ends</title>" in text


def test_changed_words_are_marked_and_right_answers_named(report: ReportInput) -> None:
    text = render_report(replace(report, samples=[Sample("When?", "at noon", "at night", "at noon")]))
    assert "at <mark>noon</mark>" in text
    assert text.count("as the reference") == 1


def test_settings_that_are_not_defaults_are_bold() -> None:
    text = "model:\n  dtype: auto\ndata:\n  train:\n  - path: a\n    split: null\n  cache: true\n"
    assert render_config(text, frozenset({"data.train"})).split("\n") == [
        "model:",
        "  dtype: auto",
        "data:",
        "<b>  train:</b>",
        "<b>  - path: a</b>",
        "<b>    split: null</b>",
        "  cache: true",
    ]


def test_the_base_evaluated_at_step_0_stands_inside_the_plot(report: ReportInput) -> None:
    page = render_report(replace(report, metrics=[{"step": 0, "eval_loss": 1.5}, *report.metrics]))
    lefts = {float(x) for x in re.findall(r'data-left="([\d.]+)"', page)}
    dots = [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', page)]
    assert dots
    assert min(dots) >= min(lefts)


def test_bars_are_as_long_as_their_counts(report: ReportInput) -> None:
    text = render_report(report)
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', text)]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 1 / 3, 467 / 9000], abs=1e-3)
    assert "data.max_length is 2,048." in text
    assert ">to 512<" in text and ">9,000<" in text


def test_one_example_shows_what_is_trained(report: ReportInput) -> None:
    text = render_report(report)
    assert "&lt;user&gt;When?<ins>At &lt;noon&gt;.</ins>\n</p>" in text
    assert "train.jsonl:1; underlined" in text


def test_a_long_example_is_cut(report: ReportInput) -> None:
    example = MaskedExample("a:1", [("x" * 10_000, False), ("answer", True)])
    text = render_report(replace(report, example=example))
    assert "xxx ...</p>" in text
    assert "<ins>" not in text[text.index("One example") :]


@pytest.mark.parametrize("highest", [4e-3, 1.9e-4, 5e-5, 1.0, 3.03, 2400.0])
def test_every_curve_can_be_read_off_its_axis(report: ReportInput, line: Line, highest: float) -> None:
    metrics = [{**line(step), "learning_rate": highest * (100 - step) / 100} for step in range(10, 100, 10)]
    text = render_report(replace(report, metrics=metrics))
    chart = text[text.index('aria-label="learning rate"') :]
    levels = re.findall(r'class="grid"[^>]*/><text[^>]*>([^<]+)<', chart[: chart.index("</svg>")])
    assert len(levels) >= 2
    assert len(set(levels)) == len(levels)
