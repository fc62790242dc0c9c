"""scripts/memory_pool.py: tasks side by side, within a card and a time, whatever becomes of each."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from memory_pool import Pool, Task


def run(pool, tasks, more=None):
    outcomes = {}

    def finished(task, outcome):
        outcomes[task.name] = outcome
        return (more or {}).get(task.name, ())

    return outcomes, pool.run(tasks, finished)


def pool(**settings):
    return Pool(**{"processes": 4, "card_bytes": 10, "task_seconds": 30, **settings})


def card_seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def span(seconds):
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def fail():
    raise RuntimeError("no room\nand much more")


def die():
    print("the last word", file=sys.stderr, flush=True)
    os._exit(3)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_outcome_is_a_value_or_a_line(method):
    tasks = [Task("good", pow, (2, 5)), Task("bad", fail), Task("dead", die)]
    outcomes, left_out = run(pool(method=method), tasks)
    assert outcomes["good"] == {"value": 32}
    assert outcomes["bad"]["error"].startswith("RuntimeError: no room (test_memory_pool.py:")
    assert outcomes["dead"]["error"] == "died with exit code 3 the last word"
    assert left_out == []


def test_what_hangs_is_ended_and_the_rest_goes_on():
    began = time.monotonic()
    outcomes, _ = run(pool(task_seconds=1), [Task("hangs", time.sleep, (60,)), Task("good", pow, (2, 5))])
    assert outcomes == {"hangs": {"error": "took more than 1 s"}, "good": {"value": 32}}
    assert time.monotonic() - began < 20


def test_nothing_begins_after_the_deadline():
    tasks = [Task(f"task {number}", span, (1.5,)) for number in range(6)]
    outcomes, left_out = run(pool(processes=2, deadline=time.monotonic() + 1), tasks)
    assert sorted([*outcomes, *left_out]) == [task.name for task in tasks]
    assert list(outcomes) and left_out
    assert all("value" in outcome for outcome in outcomes.values())


def test_what_runs_long_after_the_deadline_is_ended():
    outcomes, _ = run(pool(deadline=time.monotonic() + 0.5, grace_seconds=0.5), [Task("long", time.sleep, (60,))])
    assert outcomes["long"] == {"error": "was at work when the time ran out"}


def overlap(one, other):
    return one[0] < other[1] and other[0] < one[1]


def test_tasks_share_the_card_as_far_as_it_goes():
    claims = {"six": 6, "four": 4, "five": 5, "all": 20}
    outcomes, _ = run(pool(), [Task(name, span, (0.7,), card_bytes=claim) for name, claim in claims.items()])
    spans = {name: outcome["value"] for name, outcome in outcomes.items()}
    assert overlap(spans["six"], spans["four"])
    assert not overlap(spans["six"], spans["five"])
    assert not any(overlap(spans["all"], spans[name]) for name in ("six", "four", "five"))


def test_a_card_is_hidden_from_what_claims_none_of_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    outcomes, _ = run(pool(), [Task("blind", card_seen), Task("sees", card_seen, card_bytes=1)])
    assert outcomes == {"blind": {"value": ""}, "sees": {"value": "0"}}


def test_urgent_tasks_that_follow_go_first():
    following = [Task("late", span, (0.1,)), Task("soon", span, (0.1,), urgent=True)]
    tasks = [Task("first", span, (0.1,)), Task("waits", span, (0.1,))]
    outcomes, _ = run(pool(processes=1), tasks, {"first": following})
    assert list(outcomes) == ["first", "soon", "waits", "late"]
