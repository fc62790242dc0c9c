"""SIGTERM, SIGINT and SIGUSR1 at random moments, on one process and on two.

Wherever the signal comes, the process that gets it begins no further micro-batch but the one at hand, and the run ends
(or goes on) with the exit code of the signal and a checkpoint of the last step that was taken; resumed, it ends in the
bits of the run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proofs import forks, tiny
from proofs.bench import RUN_SECONDS, Tally, Workplace, difference, newest_step, unusable_checkpoints

_MICRO_BATCH_SECONDS = 0.02
"""Micro-batches of the tiny model are over in a few milliseconds; real ones are not."""
_SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 6,
    "micro_batch_tokens": 64,
    "save_steps": 100,
    "logging_steps": 2,
    "eval_steps": 3,
}
_SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stopped_at_random(place: Workplace, signals: int, *, processes: int) -> Tally:
    """Runs that get a signal after their first micro-batch, on all processes or on one of them."""
    tally = Tally(f"SIGTERM at random moments, {processes} process{'es' * (processes > 1)}")
    settings = {"train": _SETTINGS, "data": {"validation": str(place.folder / "heldout.jsonl")}}
    whole = f"whole-{processes}"
    _finish(tally, _Run(place, place.config(whole, **settings), processes))
    expected = tiny.outcome(place.run(whole))
    counts = {number.name: 0 for number in _SIGNALS}
    slowest = 0.0
    while tally.tried < signals:
        name = f"stop-{processes}-{sum(counts.values())}"
        run = _Run(place, place.config(name, **settings), processes)
        number = place.random.choice(_SIGNALS)
        seconds = _signalled(tally, run, number, name)
        if seconds is not None:
            counts[number.name] += 1
            tally.tried += number == signal.SIGTERM
            slowest = max(slowest, seconds)
            found = tiny.outcome(place.run(name))
            tally.check(found == expected, f"{name}, {number.name}: other {difference(found, expected)}")
        place.remove(name)
    tally.facts = {**counts, "slowest stop in seconds": round(slowest, 2)}
    return tally


def _signalled(tally: Tally, run: _Run, number: signal.Signals, name: str) -> float | None:
    """Send a signal to a run and let it end, resumed if need be; the seconds that it took to stop.

    None where it was over before the signal came.
    """
    place, processes = run.place, run.processes
    children = run.start()
    run.wait_for_first_micro_batch()
    time.sleep(place.random.uniform(0, 20 * _MICRO_BATCH_SECONDS))
    everyone = processes == 1 or place.random.random() < 0.7
    ranks = list(range(processes)) if everyone else [place.random.randrange(processes)]
    sent = time.monotonic()
    for rank in ranks:
        children[rank].send(number)
    codes = [child.wait(RUN_SECONDS) for child in children]
    seconds = time.monotonic() - sent
    where = f"{name}, {number.name} to processes {ranks} of {processes}"
    if number == signal.SIGUSR1:
        tally.check(codes == [0] * processes, f"{where}: ended with {codes}: {run.said()}")
        return 0.0
    if all(code == 0 for code in codes):
        return None
    folder = place.run(name)
    tally.check(codes == [128 + number] * processes, f"{where}: ended with {codes}: {run.said()}")
    begun = [sum(at > sent for at in run.noted(rank, "micro-batch")) for rank in ranks]
    tally.check(max(begun) <= 1, f"{where}: {begun} more micro-batches were begun")
    taken = len(run.noted(0, "step"))
    tally.check(newest_step(folder) == taken, f"{where}: checkpoint {newest_step(folder)} after {taken} steps")
    tally.check(not unusable_checkpoints(folder), f"{where}: an unusable checkpoint")
    _finish(tally, run, "--resume")
    return seconds


def _finish(tally: Tally, run: _Run, *arguments: str) -> None:
    codes = [child.wait(RUN_SECONDS) for child in run.start(*arguments)]
    tally.check(codes == [0] * run.processes, f"{run.config.stem} {arguments}: ended with {codes}: {run.said()}")


class _Run:
    """A run on so many processes, as torchrun starts them: told by the environment which of them each is."""

    def __init__(self, place: Workplace, config: Path, processes: int) -> None:
        self.place, self.config, self.processes = place, config, processes
        self._children: list[forks.Child] = []

    def start(self, *arguments: str) -> list[forks.Child]:
        """Its processes."""
        port = _free_port()
        self._children = []
        for rank in range(self.processes):
            world = {"RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.processes}
            environment = {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if self.processes > 1 else {}
            self._notes(rank).write_text("", encoding="utf-8")
            before = _slow_and_noted(self._notes(rank), {key: str(value) for key, value in environment.items()})
            log = self.config.with_name(f"{self.config.stem}.{rank}.log")
            self._children.append(forks.start(["train", str(self.config), *arguments], log, before))
        return self._children

    def wait_for_first_micro_batch(self) -> None:
        """Until every process has begun one, or has ended."""
        for rank, child in enumerate(self._children):
            while not self.noted(rank, "micro-batch") and not child.is_over():
                time.sleep(0.005)

    def noted(self, rank: int, what: str) -> list[float]:
        """When a process did that."""
        lines = self._notes(rank).read_text(encoding="utf-8").splitlines()
        return [float(line.split()[1]) for line in lines if line.startswith(what)]

    def said(self) -> str:
        """The end of what its processes wrote."""
        return "".join(child.said()[-1000:] for child in self._children)

    def _notes(self, rank: int) -> Path:
        return self.config.with_name(f"{self.config.stem}.{rank}.notes")


def _slow_and_noted(notes: Path, environment: dict[str, str]) -> Callable[[], None]:
    """What makes a child take its time for each micro-batch, and note when it began one and when it took a step."""

    def before() -> None:
        from lora_cli.engine import step
        from lora_cli.train.record import Record

        os.environ.update(environment)

        def note(what: str) -> None:
            with notes.open("a", encoding="utf-8") as file:
                file.write(f"{what} {time.monotonic()}\n")

        def slowly(accumulate: Callable[..., Any]) -> Callable[..., Any]:
            def accumulated(*arguments: Any) -> Any:
                note("micro-batch")
                time.sleep(_MICRO_BATCH_SECONDS)
                return accumulate(*arguments)

            return accumulated

        def noted(record: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*arguments: Any) -> None:
                record(*arguments)
                note("step")

            return recorded

        forks.wrap(step, "accumulate", slowly)
        forks.wrap(Record, "step", noted)

    return before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
