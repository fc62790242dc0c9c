"""Tasks in processes of their own, several at once, within a card's memory and within a time.

A process is a fork of one that has imported what all need, so that imports are paid once; the parent must not have
touched CUDA. Where a fork can't use the card, `method="spawn"` starts each anew. A task that dies, hangs or raises is
an outcome like any other. Knows nothing of what the tasks do.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    card_bytes: int = 0
    """What it may take of the card; 0 is a task that doesn't see the card."""
    urgent: bool = False
    """Goes before what waits already."""


Outcome = dict[str, Any]
"""`value`, or `error`: one line."""


@dataclass
class _Running:
    task: Task
    process: Any
    answers: Connection
    log: Path
    began: float
    outcome: Outcome | None = None
    """Known before the process has ended, which takes a while where it lets go of a card."""


@dataclass
class Pool:
    """Args:
    processes: at once.
    card_bytes: that the tasks at work may claim together; one that claims more runs alone on the card.
    task_seconds: after which a task is ended.
    deadline: on `time.monotonic`'s clock: nothing begins after it, and what runs is ended `grace_seconds` later.
    """

    processes: int
    card_bytes: int
    task_seconds: float
    deadline: float = float("inf")
    grace_seconds: float = 10
    method: str = "fork"
    _waiting: list[Task] = field(default_factory=list)
    _running: list[_Running] = field(default_factory=list)

    def run(self, tasks: Iterable[Task], finished: Callable[[Task, Outcome], Iterable[Task]]) -> list[str]:
        """Run tasks and those that `finished` asks for; the names of those that weren't begun in time."""
        self._waiting = list(tasks)
        with tempfile.TemporaryDirectory() as folder:
            try:
                while self._waiting or self._running:
                    self._begin_what_can(Path(folder))
                    for done in self._ended():
                        self._running.remove(done)
                        assert done.outcome is not None
                        more = list(finished(done.task, done.outcome))
                        self._waiting = [*(t for t in more if t.urgent), *self._waiting]
                        self._waiting += [t for t in more if not t.urgent]
                    if time.monotonic() > self.deadline and not self._running:
                        break
            finally:
                for running in self._running:
                    running.process.kill()
        return [task.name for task in self._waiting]

    def _begin_what_can(self, folder: Path) -> None:
        for task in list(self._waiting):
            if len(self._running) >= self.processes or time.monotonic() > self.deadline:
                return
            claimed = sum(running.task.card_bytes for running in self._running)
            if task.card_bytes == 0 or claimed == 0 or claimed + task.card_bytes <= self.card_bytes:
                self._waiting.remove(task)
                self._running.append(self._begin(task, folder))

    def _begin(self, task: Task, folder: Path) -> _Running:
        context: Any = multiprocessing.get_context(self.method)
        answers, answer = context.Pipe(duplex=False)
        log = folder / f"{time.monotonic_ns()}.log"
        process = context.Process(target=_work, args=(task, answer, log), daemon=True)
        process.start()
        answer.close()
        return _Running(task, process, answers, log, time.monotonic())

    def _ended(self) -> list[_Running]:
        """Those whose process is gone, waited for half a second at most."""
        unheard: list[Any] = [running.answers for running in self._running if running.outcome is None]
        wait(unheard + [running.process.sentinel for running in self._running], timeout=0.5)
        now = time.monotonic()
        for running in self._running:
            running.outcome = running.outcome or _answer(running)
            overdue = None
            if now - running.began > self.task_seconds:
                overdue = f"took more than {self.task_seconds:g} s"
            elif now > self.deadline + self.grace_seconds:
                overdue = "was at work when the time ran out"
            if overdue is not None and running.process.is_alive():
                running.outcome = running.outcome or {"error": overdue}
                running.process.kill()
                running.process.join()
        return [running for running in self._running if running.outcome and not running.process.is_alive()]


def _answer(running: _Running) -> Outcome | None:
    dead = not running.process.is_alive()  # asked before its answer, which it may give in between
    if running.answers.poll():
        try:
            outcome: Outcome = running.answers.recv()
            return outcome
        except EOFError:
            running.process.join()
            dead = True
    if not dead:
        return None
    last = (running.log.read_text(errors="replace").strip().splitlines() if running.log.exists() else []) or [""]
    return {"error": f"died with exit code {running.process.exitcode} {last[-1]}".strip()}


def _work(task: Task, answer: Connection, log: Path) -> None:
    """In the task's own process: what it prints goes to `log`."""
    if task.card_bytes == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(sink, stream)
    sys.stdout = sys.stderr = open(sink, "w", buffering=1)  # noqa: SIM115 - as long as the process
    try:
        answer.send({"value": task.work(*task.arguments)})
    except BaseException as error:  # whatever it was, it belongs in a row
        traceback.print_exc()
        words = str(error).strip().splitlines()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        answer.send({"error": f"{type(error).__name__}: {words[0] if words else ''} ({where})"})
