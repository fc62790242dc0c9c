from __future__ import annotations

import math

import pytest

from lora_cli.config import HalvingConfig
from lora_cli.errors import RunFolderError
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.state import State, decide, read_state


def halving(**settings):
    return HalvingConfig(every=5, **settings)


def test_the_best_half_goes_on_rounded_up():
    rung = decide(5, {"a": 3.0, "b": 1.0, "c": 2.0, "d": 5.0, "e": 4.0}, halving())
    assert list(rung.losses) == ["b", "c", "a", "e", "d"]
    assert rung.dropped == ("e", "d")


@pytest.mark.parametrize(
    ("keep", "at_least", "kept"), [(0.5, 1, 2), (0.25, 1, 1), (0.25, 3, 3), (0.75, 1, 3), (0.9, 1, 4)]
)
def test_how_many_go_on(keep, at_least, kept):
    losses = {name: float(place) for place, name in enumerate("abcd")}
    assert len(decide(5, losses, halving(keep=keep, at_least=at_least)).dropped) == 4 - kept


def test_a_loss_that_is_no_number_is_the_worst():
    assert decide(5, {"a": math.nan, "b": 9.0}, halving()).dropped == ("a",)


def test_decisions_outlive_the_process(tmp_path):
    folder, state = SweepFolder(tmp_path), State(("a", "b", "c"))
    state.rungs.append(decide(5, {"a": 3.0, "b": 1.0, "c": math.nan}, halving()))
    state.failed["c"] = "burst"
    state.write(folder)
    again = read_state(folder, ["a", "b", "c"])
    assert again.dropped("c") == "halving: number 3 of 3 by validation loss at step 5"
    assert again.dropped("b") is None and again.failed == {"c": "burst"}
    with pytest.raises(RunFolderError, match="another grid"):
        read_state(folder, ["a", "b"])
