"""`lora check --probe`: a few real steps, timed; nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_probe_says_how_long_the_run_will_be(config_file: Path, lora: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = lora("check", config_file, "--probe", "--json")
    assert code == 0
    printed = json.loads(out)
    found = printed["probe"]
    assert found["steps"] == min(3, printed["steps"] - 1)
    assert found["tokens_per_second"] == pytest.approx(found["num_tokens"] / found["seconds"])
    tokens = printed["num_tokens"] * printed["schedule"]["epochs"]
    assert found["run_seconds"] == pytest.approx(tokens / found["tokens_per_second"])
    assert found["tflops"] > 0
    assert not (config_file.parent / "run").exists()


def test_the_screen_shows_the_speed(config_file: Path, lora: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = lora("check", config_file, "--probe")
    assert code == 0
    assert "ok  speed" in out
    assert "for the run's steps" in out


def test_without_a_probe_nothing_is_timed(config_file: Path, lora: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = lora("check", config_file, "--json")
    assert "probe" not in json.loads(out)
