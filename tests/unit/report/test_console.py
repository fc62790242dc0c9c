from __future__ import annotations

import io
import re
import sys

import pyte
import pytest

from lora_cli.plan import Plan
from lora_cli.report.console import Console, show
from lora_cli.report.events import (
    Event,
    Finished,
    Logged,
    Measured,
    Planned,
    Resumed,
    Saved,
    Stopped,
    Summary,
    Warned,
    Working,
)

PLAIN = "step=40/2340 epoch=0.05 loss=1.3701 lr=9.5e-05 grad=0.41 tok/s=2398 peak=11.4GiB left=1:46:57"


class Terminal(io.TextIOWrapper):
    """A stream that says it's a terminal, and a screen that shows what one would."""

    def __init__(self, columns: int, lines: int = 60) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self._screen = pyte.Screen(columns, lines)
        self._screen.set_mode(pyte.modes.LNM)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()

    def shown(self) -> list[str]:
        pyte.Stream(self._screen).feed(self.text())
        return [line.rstrip() for line in self._screen.display if line.strip()]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def events(plan: Plan, stream: list[Event], summary: Summary) -> list[Event]:
    before: list[Event] = [Working("loading weights", done, 3, "shards") for done in range(3)]
    return [
        *before,
        Planned(plan),
        Measured(6480.0),
        *stream,
        Warned("out of memory [q_proj]"),
        Finished(summary),
    ]


def run(events: list[Event], *, quiet_stdout: bool = False) -> None:
    with Console(quiet_stdout=quiet_stdout) as console:
        for event in events:
            console.emit(event)


def on_terminal(
    events: list[Event], monkeypatch: pytest.MonkeyPatch, columns: int, *, finish: bool = False
) -> Terminal:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal(columns)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    run(events if finish else events[:-1])
    return terminal


@pytest.mark.parametrize("github", ["", "1"])
def test_a_log_holds_one_line_per_logged_event_and_no_escapes(
    events: list[Event], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, github: str
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", github)
    run(events)
    log = capsys.readouterr().err
    assert not re.search(r"[\r\x1b]", log)
    lines = log.splitlines()
    assert sum(line.startswith("step=") for line in lines) == sum(isinstance(event, Logged) for event in events)
    assert PLAIN in lines
    assert "valid=1.3714 step=30 best" in lines
    assert "saved=runs/docs/checkpoints/step-00000030 step=30" in lines
    assert lines.count("  loading weights") == 1
    assert "  !  out of memory [q_proj]" in lines


def test_stdout_gets_the_closing_summary_alone(events: list[Event], capsys: pytest.CaptureFixture[str]) -> None:
    run(events)
    answer = capsys.readouterr().out
    assert answer.strip().startswith("done ")
    assert "lora eval runs/docs" in answer
    assert "step=" not in answer


def test_a_run_that_fails_leaves_stdout_empty(events: list[Event], capsys: pytest.CaptureFixture[str]) -> None:
    run(events[:-1])
    assert capsys.readouterr().out == ""


def test_stdout_is_left_to_json(events: list[Event], capsys: pytest.CaptureFixture[str]) -> None:
    run(events, quiet_stdout=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "lora eval runs/docs" in captured.err


def test_a_log_is_as_narrow_as_asked_and_still_one_line_an_event(
    events: list[Event], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run(events)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 60
    progress = [line for line in lines if line.startswith("step=")]
    assert len(progress) == 4
    assert progress[-1] == "step=40/2340 epoch=0.05 loss=1.3701 lr=9.5e-05 left=1:46:57"


def test_a_dumb_terminal_gets_a_log(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = on_terminal(events, monkeypatch, 100)
    assert "\x1b" not in terminal.text()
    assert PLAIN in terminal.text().splitlines()


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_live_region_is_two_lines_that_fit(
    events: list[Event], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal = on_terminal(events, monkeypatch, columns)
    shown = terminal.shown()
    assert sum("█" in line and "/2,340" in line for line in shown) <= 1
    position, figures = shown[-2:]
    assert "40/2,340" in position
    assert "left" in position
    assert "10-step loss 1.3701" in figures
    assert "valid 1.3714 @30" in figures
    assert not any("step=" in line for line in shown)
    assert not any("loading weights" in line for line in shown)
    assert "  !  out of memory [q_proj]" in shown
    if columns == 140:
        for part in ("lr 9.5e-05", "grad 0.41", "2,398 tok/s", "11.4 GiB", "saved @30"):
            assert part in figures


def test_a_loss_on_the_screen_is_one_of_metrics_jsonl(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it is the last step's own, and then it names its step."""
    assert "9.9999" not in on_terminal(events, monkeypatch, 140).shown()[-1]
    first_steps: list[Event] = [event for event in events[:10] if not isinstance(event, Planned)]
    assert "loss 9.9999 @" in on_terminal(first_steps, monkeypatch, 140).shown()[-1]


def test_the_first_line_after_a_resume_spans_the_steps_since(
    stream: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = next(event for event in stream if isinstance(event, Saved))
    resumed = [Resumed(35, saved.path), *stream[-2:], Stopped(40, "interrupted")]
    shown = on_terminal(resumed, monkeypatch, 140, finish=True).shown()
    assert "  resumed  after step 35, from runs/docs/checkpoints/step-00000030" in shown
    assert "5-step loss 1.3701" in shown[-1]
    assert "  stopped  at step 40: interrupted" in shown


def test_no_color_means_no_colour_codes(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    def styles(text: str) -> list[str]:
        return re.findall(r"\x1b\[[\d;]*m", text)

    assert styles(on_terminal(events, monkeypatch, 80, finish=True).text())
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = on_terminal(events, monkeypatch, 80, finish=True)
    assert styles(terminal.text()) == []
    assert any(line.startswith("  !  ") for line in terminal.shown())


def test_the_cursor_comes_back_when_a_run_fails(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80)
    monkeypatch.setattr(sys, "stderr", terminal)

    def interrupted() -> None:
        with Console() as console:
            console.emit(Working("loading weights"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.text().rindex("\x1b[?25h") > terminal.text().rindex("\x1b[?25l")
    assert sys.stderr is terminal
    assert terminal.shown() == []


def test_a_stream_without_blocks_gets_text_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show("  ▌ conv", ascii_only)
    ascii_only.seek(0)
    assert ascii_only.read() == "  \\u258c conv\n"
