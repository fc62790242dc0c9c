from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.report import numbers


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 KiB"),
        (312 * 2**10, "312 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (480 * 2**20, "480 MiB"),
        (1023.96 * 2**20, "1.0 GiB"),
        (15.2 * 2**30, "15.2 GiB"),
        (99.96 * 2**30, "100 GiB"),
        (3210 * 2**30, "3,210 GiB"),
    ],
)
def test_sizes_take_the_unit_that_suits(size_bytes: float, text: str) -> None:
    assert numbers.size(size_bytes) == text


@given(st.integers(0, 2**52))
def test_no_size_is_written_as_1024_of_the_smaller_unit(size_bytes: int) -> None:
    number, unit = numbers.size(size_bytes).replace(",", "").split(" ")
    assert unit == "GiB" or float(number) < 1024


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.97, "10 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (6480, "1 h 48 min"),
        (86_399, "1 d"),
        (97_200, "1 d 3 h"),
    ],
)
def test_durations_carry_over_when_rounded(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


@given(st.floats(0, 1e7))
def test_a_clock_never_shows_sixty(seconds: float) -> None:
    assert re.fullmatch(r"(\d+:)?[0-5]?\d:[0-5]\d", numbers.clock(seconds))


@pytest.mark.parametrize(("seconds", "text"), [(3067, "51:07"), (3753, "1:02:33"), (float("inf"), "-:--")])
def test_clock(seconds: float, text: str) -> None:
    assert numbers.clock(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(2e-4, "2e-04"), (9.5e-5, "9.5e-05"), (1.943e-4, "1.94e-04"), (0, "0")])
def test_learning_rates_are_scientific_without_idle_zeros(value: float, text: str) -> None:
    assert numbers.learning_rate(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.41, "0.41"), (12.34, "12.3"), (3.1e-4, "3.1e-04"), (0.0, "0.00")])
def test_small_gradient_norms_do_not_become_zero(value: float, text: str) -> None:
    assert numbers.gradient_norm(value) == text


def test_trainable_share_as_it_is_quoted() -> None:
    assert numbers.trainable_share(100 * 294_912 / 124_734_720) == "0.2364 %"
