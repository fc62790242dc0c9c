"""What is said, and what isn't."""

from __future__ import annotations

import math

import pytest

from lora_cli.evaluate.verdict import decide, in_words
from lora_cli.report.comparison import Comparison, Demand, Measure


def loss(difference, low, high, base=1.0):
    return Measure("loss", base, base + difference, difference, low, high)


@pytest.mark.parametrize(
    ("measure", "rows", "better", "worse", "outcome"),
    [
        (loss(-0.4, -0.5, -0.3), 200, 188, 12, "better"),
        (loss(0.4, 0.3, 0.5), 200, 12, 188, "worse"),
        (loss(-0.1, -0.3, 0.1), 31, 20, 11, "can't tell"),
        (loss(0.0, 0.0, 0.0), 200, 0, 0, "no difference"),
        (loss(-0.4, -0.5, -0.3), 4, 4, 0, "can't tell"),
        (loss(math.nan, math.nan, math.nan), 200, 0, 0, "worse"),
        (loss(math.inf, math.nan, math.nan), 200, 0, 1, "worse"),
        (loss(math.nan, math.nan, math.nan, base=math.nan), 200, 0, 0, "can't tell"),
    ],
)
def test_outcome(measure, rows, better, worse, outcome):
    assert decide(measure, rows, better, worse) == outcome
    assert in_words(outcome, measure, rows, better, worse).startswith(outcome)


def test_words_carry_the_figures():
    words = in_words("better", loss(-0.41, -0.47, -0.35), 200, 188, 12)
    assert words == "better: loss -0.4100, 95 % interval -0.4700 to -0.3500, 188 of 200 rows improved"


def comparison(measure, outcome):
    return Comparison("adapter", "float32", (measure,), 0, 0, 1.0, outcome, "", (), ())


def test_what_was_asked_is_a_fall_of_the_loss():
    found = comparison(loss(-0.4, -0.5, -0.3), "better")
    assert Demand(min_improvement=0.4).is_met_by(found)
    assert not Demand(min_improvement=0.41).is_met_by(found)


def test_only_a_verdict_of_worse_fails():
    assert not Demand(fail_if_worse=True).is_met_by(comparison(loss(0.4, 0.3, 0.5), "worse"))
    assert Demand(fail_if_worse=True).is_met_by(comparison(loss(0.1, -0.3, 0.5), "can't tell"))


def test_a_loss_that_is_not_a_number_improves_nothing():
    assert not Demand(min_improvement=-100.0).is_met_by(comparison(loss(math.nan, math.nan, math.nan), "worse"))


def test_what_is_missing_is_said_in_words():
    fell, rose = comparison(loss(-0.4, -0.5, -0.3), "better"), comparison(loss(0.4, 0.3, 0.5), "worse")
    assert Demand(min_improvement=0.5).unmet_by(fell) == "0.5 nats of improvement were asked; the loss fell by 0.4000"
    assert Demand(min_improvement=0.0).unmet_by(rose) == "0 nats of improvement were asked; the loss rose by 0.4000"
    assert Demand(min_improvement=0.4, fail_if_worse=True).unmet_by(fell) is None
