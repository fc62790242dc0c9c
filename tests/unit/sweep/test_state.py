"""Halving: who goes on, and what is remembered of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.config import HalvingConfig
from lora_cli.errors import RunFolderError
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.state import State, decide, read_state


@pytest.mark.parametrize(
    ("keep", "at_least", "dropped"),
    [(0.5, 1, ("b", "d")), (0.6, 1, ("d",)), (0.01, 1, ("a", "b", "d")), (0.01, 3, ("d",)), (0.99, 1, ())],
)
def test_the_best_share_goes_on_rounded_up(keep, at_least, dropped):
    rung = decide(
        4, {"a": 2.0, "b": 2.5, "c": 1.0, "d": math.nan}, HalvingConfig(every=4, keep=keep, at_least=at_least)
    )
    assert rung.dropped == dropped
    assert list(rung.losses) == ["c", "a", "b", "d"]


LOSSES = st.dictionaries(st.text(max_size=3), st.floats(min_value=0, allow_infinity=False), min_size=1)


@given(LOSSES, st.floats(0.01, 0.99), st.integers(1, 4))
def test_nobody_better_is_dropped_for_somebody_worse(losses, keep, at_least):
    rung = decide(1, losses, HalvingConfig(every=1, keep=keep, at_least=at_least))
    stay = [loss for name, loss in losses.items() if name not in rung.dropped]
    assert len(stay) >= min(len(losses), at_least)
    for name in rung.dropped:
        assert not any(losses[name] < loss for loss in stay)
        assert f"number {list(rung.losses).index(name) + 1} of {len(losses)}" in rung.why(name)


def test_decisions_are_read_back(tmp_path):
    state = State(("a", "b", "c"), [decide(2, {"a": 1.0, "b": math.inf, "c": 3.0}, HalvingConfig(every=2))], {"b": "x"})
    state.write(SweepFolder(tmp_path))
    again = read_state(SweepFolder(tmp_path), ["a", "b", "c"])
    assert again.dropped("b") == state.dropped("b") is not None and again.failed == {"b": "x"}
    assert again.dropped("a") is None
    with pytest.raises(RunFolderError, match="another grid"):
        read_state(SweepFolder(tmp_path), ["a", "b"])
