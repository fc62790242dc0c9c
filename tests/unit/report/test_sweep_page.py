"""The page of a sweep: places, curves and settings agree, and nothing of it can run."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from typing import Any

import pytest

from lora_cli.report.events import Standing, SweepSummary
from lora_cli.report.sweep_assets import SCRIPT
from lora_cli.report.sweep_page import SweepReport, render_sweep_page

HOSTILE = '</style><script>alert("1")</script><img src=x onerror=alert(1)>&amp;'
RATES = (1e-4, 3e-4, 1e-3)


def standing(number: int, rate: float, **changes: Any) -> Standing:
    plain = Standing(
        name=f"{number:02}-lr{rate:g}",
        changes={"train.learning_rate": rate, "adapter.r": 8},
        steps=40,
        train_loss=2.0 - number / 10,
        eval_loss=2.1 - number / 10,
        trainable=1000,
        stopped=None,
        failed=False,
        output_dir=f"runs/grid/{number:02}-lr{rate:g}",
    )
    return replace(plain, **changes)


def course(last: float, steps: int = 40) -> list[dict[str, Any]]:
    losses = [{"step": step, "loss": 3.0 + (last - 3.0) * step / 40} for step in range(4, steps + 1, 4)]
    return [{"step": 0, "eval_loss": 3.1}, *losses, {"step": steps, "eval_loss": losses[-1]["loss"] + 0.1}]


@pytest.fixture
def report() -> SweepReport:
    members = (
        standing(3, 1e-3),
        standing(2, 3e-4),
        standing(1, 1e-4, steps=20, stopped="halving: number 3 of 3 by validation loss at step 20"),
        standing(4, 1e30, steps=0, train_loss=None, eval_loss=None, stopped="not finite", failed=True),
    )
    summary = SweepSummary(
        ranked_by="eval_loss",
        members=members,
        rungs=({"step": 20, "losses": {}, "dropped": [members[2].name]},),
        num_tokens=9000,
        train_seconds=3.0,
        tokens_per_second=3000.0,
        peak_memory_bytes=2**30,
        output_dir="runs/grid",
    )
    metrics = {
        members[0].name: course(1.7),
        members[1].name: course(1.8),
        members[2].name: course(1.9, 20),
        members[3].name: [{"step": 0, "eval_loss": 3.1}, {"step": 1, "skipped": True}],
    }
    return SweepReport("grid", summary, metrics, "sweep: {}\n", {"device": "cpu"}, "in turn", "lora sweep sweep.yaml")


def drawn(page: str, name: str) -> list[str]:
    """The members whose curves a chart has, in the order in which they are drawn."""
    chart = page.split(f'aria-label="{name}"')[1].split("</svg>")[0]
    return re.findall(r'<path class="member[^"]*" data-member="(\d+)"', chart)


def test_places_curves_and_settings_agree(report: SweepReport) -> None:
    page = render_sweep_page(report)
    rows = re.findall(r'<tr data-member="(\d+)" class="(\w*)">.*?<td>(?:<a href="([^"]*)">)?([\d]+-[\w.+-]+)', page)
    assert [(place, css, name) for place, css, _, name in rows] == [
        ("1", "best", "03-lr0.001"),
        ("2", "", "02-lr0.0003"),
        ("3", "gone", "01-lr0.0001"),
        ("4", "gone", "04-lr1e+30"),
    ]
    assert [link for _, _, link, _ in rows] == [*(f"{s.name}/report.html" for s in report.summary.members[:3]), ""]
    for name in ("validation", "training"):
        assert drawn(page, name) == ["3", "2", "1"]  # the best on top, and nothing of one that has no curve
        assert 'class="epoch" d="M' in page.split(f'aria-label="{name}"')[1].split("</svg>")[0]
    assert "<title>halving at step 20</title>" in page
    strip = page.split('aria-label="train.learning_rate"')[1].split("</svg>")[0]
    spots = re.findall(r'<circle class="([\w ]+)" data-member="(\d)" cx="([\d.]+)"', strip)
    assert [(css, place) for css, place, _ in spots] == [("spot early", "3"), ("spot", "2"), ("spot best", "1")]
    assert [float(x) for *_, x in spots] == sorted(float(x) for *_, x in spots)  # by value, from left to right
    assert 'aria-label="adapter.r"' not in page  # all have the same
    assert "3.1000 → 1.8000" in page and "+0.1000" in page


def test_why_a_member_left_stands_below_it(report: SweepReport) -> None:
    page = render_sweep_page(report)
    below = re.search(r'<tr data-member="3".*?</tr><tr class="why">.*?<td colspan="\d+">([^<]*)</td>', page)
    assert below is not None and below[1] == report.summary.members[2].stopped
    assert page.count('class="why"') == 2 and "<dd>2<small>of 4 members" in page


def test_a_best_value_at_the_edge_of_the_grid_is_said(report: SweepReport) -> None:
    def said(summary: SweepSummary) -> list[str]:
        return re.findall(r"<b>!</b> (The best has[^<]*)", render_sweep_page(replace(report, summary=summary)))

    kept = replace(report.summary, members=report.summary.members[:3])
    assert said(kept) == ["The best has the largest train.learning_rate that was tried, 1e-03: try larger ones."]
    assert said(report.summary) == []  # a larger one was tried
    first, second, third = kept.members
    middle = replace(second, changes={**second.changes, "train.learning_rate": 2e-3})
    assert said(replace(kept, members=(first, middle, third))) == []
    assert said(replace(kept, members=(first, second))) == []  # two values have nothing but edges


def test_a_loss_that_bursts_leaves_the_others_readable(report: SweepReport) -> None:
    name = report.summary.members[1].name
    burst = {**report.metrics, name: [*course(1.8)[:6], {"step": 36, "loss": 1e6}, {"step": 40, "loss": 1e6}]}
    page = render_sweep_page(replace(report, metrics=burst))
    labels = page.split('aria-label="training"')[1].split("</svg>")[0]
    assert 2 < max(float(t) for t in re.findall(r'text-anchor="end">([^<]*)<', labels)) < 4
    assert "Losses above 3" in page


def test_nothing_of_it_runs_but_its_script(report: SweepReport) -> None:
    best = replace(report.summary.members[0], name=HOSTILE, stopped=HOSTILE, changes={"train.learning_rate": HOSTILE})
    others = tuple(replace(one, changes={"train.learning_rate": 1}) for one in report.summary.members[1:])
    summary = replace(report.summary, members=(best, *others))
    metrics = {HOSTILE: course(1.7), others[0].name: course(1.8)}
    hostile = replace(report, name=HOSTILE, summary=summary, metrics=metrics, config_text=HOSTILE, how=HOSTILE)
    page = render_sweep_page(replace(hostile, command=HOSTILE, warnings=[HOSTILE], environment={HOSTILE: HOSTILE}))
    assert page.count("<script") == 1 and page.count("<style") == 1 and "<img" not in page
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert page == render_sweep_page(
        replace(hostile, command=HOSTILE, warnings=[HOSTILE], environment={HOSTILE: HOSTILE})
    )


def test_without_validation_or_more_than_a_line(report: SweepReport) -> None:
    members = tuple(replace(one, eval_loss=None) for one in report.summary.members)
    summary = replace(report.summary, ranked_by="train_loss", members=members, rungs=())
    short = {name: [{"step": 1, "loss": 2.0}] for name in report.metrics}
    page = render_sweep_page(replace(report, summary=summary, metrics=short))
    assert "<h2>Losses</h2>" not in page and "<th>valid</th>" not in page and "training loss, the best" in page
    failed = tuple(replace(one, failed=True, train_loss=None) for one in members)
    assert "<h2>Settings</h2>" not in render_sweep_page(replace(report, summary=replace(summary, members=failed)))
