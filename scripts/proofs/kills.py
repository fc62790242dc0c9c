"""kill -9: at random moments, and before each system call that changes a file, saves included.

After every kill no checkpoint is unusable and none that was complete is lost; whatever came before, the run that is
resumed to its end has the bits, the metrics and the summary of the run that nothing happened to.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proofs import forks, syscalls, tiny
from proofs.bench import RUN_SECONDS, Tally, Workplace, difference, newest_step, unusable_checkpoints

_SETTINGS: dict[str, Any] = {"max_steps": 6, "save_steps": 1, "logging_steps": 2, "eval_steps": 2}
_CHAIN = 6
"""Kills in a row before a run may end."""


def killed_at_random(place: Workplace, kills: int) -> Tally:
    """Runs that are killed again and again, each after a random time, and then left to end."""
    tally = Tally("kill -9 at random moments")
    settings = _settings(place)
    expected, seconds = _reference(place, "whole", settings)
    ended = 0
    while tally.tried < kills:
        name = f"random-{ended}"
        config = place.config(name, **settings)
        arguments: tuple[str, ...] = ()
        for _ in range(_CHAIN):
            if tally.tried == kills:
                break
            child = place.start(config, *arguments)
            time.sleep(place.random.uniform(0.0, seconds))
            before = newest_step(place.run(name))
            child.send(signal.SIGKILL)
            if child.wait(RUN_SECONDS) == -signal.SIGKILL:
                tally.tried += 1
                _check_what_is_left(tally, place.run(name), before, f"{name}, kill {tally.tried}")
            arguments = ("--resume",)
        _check_end(tally, place, config, name, expected)
        ended += 1
    tally.facts = {"runs": ended}
    return tally


def killed_before_each_call(place: Workplace, every: int = 1) -> Tally:
    """A run for each of its calls that change a file, killed before it; then its resumption, before a random one."""
    tally = Tally("kill -9 before a system call")
    settings = _settings(place)
    settings["train"] = {**settings["train"], "max_steps": 3}
    expected, _ = _reference(place, "whole-calls", settings)
    config = place.config("calls", **settings)
    calls = _traced(place, config, None).calls
    for number in range(1, calls + 1, every):
        place.remove("calls")
        name = f"call {number}"
        traced = _traced(place, config, number)
        tally.check(traced.code == -signal.SIGKILL, f"{name}: ended with {traced.code} before it")
        tally.tried += 1
        before = newest_step(place.run("calls"))
        _check_what_is_left(tally, place.run("calls"), before, f"{name} ({traced.last})")
        again = _traced(place, config, place.random.randint(1, calls), "--resume")
        tally.tried += again.code == -signal.SIGKILL
        _check_what_is_left(
            tally, place.run("calls"), before, f"{name}, and {again.calls} ({again.last}) of its resumption"
        )
        _check_end(tally, place, config, "calls", expected)
    tally.facts = {"calls of a run": calls}
    return tally


def _settings(place: Workplace) -> dict[str, Any]:
    return {"train": _SETTINGS, "data": {"validation": str(place.folder / "heldout.jsonl")}}


def _reference(place: Workplace, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The outcome of the run that nothing happens to, and the seconds it takes."""
    child = place.finish(place.config(name, **settings))
    return tiny.outcome(place.run(name)), time.monotonic() - child.began


def _traced(place: Workplace, config: Path, number: int | None, *arguments: str) -> syscalls.Traced:
    child = place.start(config, *arguments, before=_stop_where_writing_begins)
    return syscalls.end_before_call(child.pid, number)


def _stop_where_writing_begins() -> None:
    """In the child: nothing in `output_dir` is touched before it is claimed."""
    from lora_cli.runs.folder import RunFolder

    def stop_first(claim: Callable[..., Any]) -> Callable[..., Any]:
        def stop_and_claim(*arguments: Any, **named: Any) -> Any:
            syscalls.stop_here()
            return claim(*arguments, **named)

        return stop_and_claim

    syscalls.be_traced()
    forks.wrap(RunFolder, "claim", stop_first)


def _check_what_is_left(tally: Tally, run: Path, newest_before: int, where: str) -> None:
    broken = unusable_checkpoints(run)
    tally.check(not broken, f"{where}: unusable checkpoints {broken}")
    tally.check(newest_step(run) >= newest_before, f"{where}: checkpoint {newest_before} is lost")


def _check_end(tally: Tally, place: Workplace, config: Path, name: str, expected: dict[str, Any]) -> None:
    """Resume to the end, compare, and leave nothing behind."""
    child: forks.Child = place.start(config, "--resume")
    if tally.check(child.wait(RUN_SECONDS) == 0, f"{name}: resuming ended with {child.code}: {child.said()[-1500:]}"):
        found = tiny.outcome(place.run(name))
        tally.check(found == expected, f"{name}: other {difference(found, expected)}")
        left = [path.name for path in place.run(name).rglob(".*") if path.name != ".lock"]
        tally.check(not left, f"{name}: leaves {left}")
    place.remove(name)
