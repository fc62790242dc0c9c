"""The rounds of a sweep: in each, every member that is due takes one step, all of them in the same passes.

A member's lines, evaluations, checkpoints and early stopping are those of its own loop, as in `lora train`; what is
done together is the step and the scoring. Knows nothing of how members are made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_cli.config import HalvingConfig
from lora_cli.engine.step import Abandoned, OutOfMemory, StepResult
from lora_cli.engine.world import World
from lora_cli.errors import TrainingError
from lora_cli.report.events import Dropped, Emit, SweepStepped, Warned, Working
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.arrange import Wish
from lora_cli.sweep.shared import shared_losses, shared_step
from lora_cli.sweep.stack import Stack
from lora_cli.sweep.state import State, decide
from lora_cli.train.loop import Loop, StepRows
from lora_cli.train.memory import peak_memory_bytes
from lora_cli.train.signals import StopSignals


@dataclass
class Member:
    """One member at work."""

    number: int
    """In the stack."""
    name: str
    loop: Loop
    at_work: bool = True
    """Whether it still takes steps."""


@dataclass
class Rounds:
    """All members, from where each stands to its last step."""

    stack: Stack
    members: Sequence[Member]
    state: State
    folder: SweepFolder
    halving: HalvingConfig | None
    micro_batch_tokens: int
    world: World
    emit: Emit
    conclude: Callable[[Member], None]
    """Writes the result of a member that is over."""
    seconds: float = 0.0
    num_tokens: int = 0
    signals: StopSignals = field(default_factory=StopSignals, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> None:
        """Until every member is over.

        Raises:
            TrainingError: out of memory with one row of one member at a time.
            Abandoned: a signal came; every member has a checkpoint of its last step.
        """
        with self.signals.listening():
            try:
                self._evaluate_due()
                self._retire()
                while self._at_work:
                    self._round()
            except Abandoned:
                for member in self._at_work:
                    member.loop.save()
                raise

    @property
    def _at_work(self) -> list[Member]:
        return [member for member in self.members if member.at_work]

    def _round(self) -> None:
        rung = self._next_rung()
        due = [member for member in self._at_work if member.loop.position.step < rung]
        if not due:
            self._halve(int(rung))
            return
        rows = {member.number: member.loop.rows(member.loop.position.step + 1) for member in due}
        began = time.perf_counter()
        results = self._step(due, rows)
        self._note(due, rows, results, time.perf_counter() - began)
        self._evaluate_due()
        self._save_due()
        self._retire()
        if self.signals.received is not None:
            raise Abandoned

    def _step(self, due: Sequence[Member], rows: dict[int, StepRows]) -> dict[int, StepResult]:
        while True:
            try:
                return shared_step(
                    self.stack,
                    {member.number: member.loop.learner for member in due},
                    [_wish(member, [int(i) for i in rows[member.number].indices]) for member in due],
                    {member.number: member.loop.train for member in due},
                    {member.number: rows[member.number].num_supervised for member in due},
                    micro_batch_tokens=self.micro_batch_tokens,
                    world=self.world,
                    heed=self._heed,
                )
            except OutOfMemory:
                longest = max(int(m.loop.train.lengths[rows[m.number].indices].max()) for m in due)
                self._smaller(longest)

    def _note(
        self, due: Sequence[Member], rows: dict[int, StepRows], results: dict[int, StepResult], seconds: float
    ) -> None:
        """Each member's figures into its own record. Its time is its share of the tokens."""
        tokens = sum(each.num_tokens for each in rows.values())
        self.seconds += seconds
        self.num_tokens += tokens
        logged = False
        for member in due:
            own, loop = rows[member.number], member.loop
            try:
                loop.took(own, results[member.number], seconds * own.num_tokens / tokens)
            except TrainingError as error:
                self._fail(member, error)
                continue
            if loop.is_due(loop.config.train.logging_steps) or loop.is_over:
                loop.write_line()
                logged = True
        best = min(due, key=lambda member: _order(results[member.number].loss))
        losses = [result.loss for result in results.values()]
        step, total = max(m.loop.position.step for m in due), max(m.loop.plan.steps.total for m in self.members)
        self.emit(
            SweepStepped(
                step=step,
                total=total,
                active=len(due),
                members=len(self.members),
                best=best.name,
                best_loss=results[best.number].loss,
                worst_loss=max(losses, key=_order),
                num_tokens=tokens,
                tokens_per_second=tokens / max(seconds, 1e-9),
                peak_memory_bytes=peak_memory_bytes(self.world.device),
                seconds_gone=self.seconds,
                seconds_left=self._seconds_left(tokens, seconds),
                logged=logged,
            )
        )

    def _seconds_left(self, tokens: int, seconds: float) -> float:
        """By the tokens of the rounds so far, if nobody is dropped any more."""
        steps = sum(m.loop.plan.steps.total - m.loop.position.step for m in self._at_work)
        taken = max(1, sum(m.loop.position.steps_counted for m in self._at_work))
        seen = sum(m.loop.position.num_tokens for m in self._at_work)
        return self.seconds / max(self.num_tokens, 1) * seen / taken * steps

    # Evaluation and what follows from it

    def _evaluate_due(self) -> None:
        self._evaluate([member for member in self._at_work if member.loop.evaluation_is_due])

    def _evaluate(self, members: Sequence[Member]) -> None:
        """The validation loss of each, in the same passes."""
        if not members:
            return
        self.emit(Working("evaluating", len(members), len(self.members), "members"))
        data = {m.number: m.loop.validation for m in members if m.loop.validation is not None}
        wishes = [_wish(m, range(len(data[m.number])), validation=True) for m in members]
        computation = members[0].loop.learner.computation
        while True:
            try:
                found = shared_losses(
                    self.stack,
                    computation,
                    wishes,
                    data,
                    micro_batch_tokens=self.micro_batch_tokens,
                    world=self.world,
                    heed=self._heed,
                )
                break
            except OutOfMemory:
                self._smaller(max(max(wish.lengths) for wish in wishes))
        for member in members:
            loss = float(found[member.number].sum() / data[member.number].supervised.sum())
            member.loop.note_evaluation(loss)
            member.loop.stopped = member.loop.lost_patience()

    def _next_rung(self) -> float:
        """The step at which all wait for the next halving."""
        if self.halving is None or len(self._at_work) <= self.halving.at_least:
            return math.inf
        step = self.halving.every * (1 + (self.state.rungs[-1].step // self.halving.every if self.state.rungs else 0))
        return step if step < max(m.loop.plan.steps.total for m in self._at_work) else math.inf

    def _halve(self, step: int) -> None:
        """Drop the worst; the decision is on disk before anything follows from it."""
        assert self.halving is not None
        there = self._at_work
        self._evaluate([member for member in there if not member.loop.position.is_evaluated])
        for member in there:
            member.loop.save()
        rung = decide(step, {m.name: m.loop.position.eval_losses[-1][1] for m in there}, self.halving)
        self.state.rungs.append(rung)
        self.state.write(self.folder)
        for member in there:
            if member.name in rung.dropped:
                member.loop.stopped = rung.why(member.name)
        self._retire()

    def _retire(self) -> None:
        """Write the results of those that are over."""
        for member in self._at_work:
            if not member.loop.is_over:
                continue
            member.at_work = False
            member.loop.write_line()  # what there is since the last one
            member.loop.save()
            if member.loop.stopped is not None:
                self.emit(Dropped(member.name, member.loop.position.step, member.loop.stopped))
            self.conclude(member)

    def _fail(self, member: Member, error: TrainingError) -> None:
        """A member that can't go on leaves; the others don't notice."""
        member.at_work = False
        self.state.failed[member.name] = error.message
        self.state.write(self.folder)
        self.emit(Dropped(member.name, member.loop.position.step, error.message))

    # Memory, checkpoints, signals

    def _smaller(self, longest: int) -> None:
        if self.micro_batch_tokens <= longest:
            raise TrainingError(
                f"out of memory with one row of one member at a time ({longest:,} tokens)",
                remedy="Fewer members, shorter rows (data.max_length), train.gradient_checkpointing: true, or\n"
                "model.quantization: {type: nf4} need less.",
            )
        self.micro_batch_tokens = max(self.micro_batch_tokens // 2, 1)
        tokens = self.micro_batch_tokens
        self.emit(Warned(f"out of memory: micro-batches of {tokens:,} tokens from here on; the result is the same"))

    def _save_due(self) -> None:
        train = self.members[0].loop.config.train
        overdue = train.save_minutes is not None and time.monotonic() - self._saved_at >= 60 * train.save_minutes
        everyone = self.signals.save_asked() or overdue
        if everyone:
            self._saved_at = time.monotonic()
        for member in self._at_work:
            if everyone or member.loop.is_due(train.save_steps):
                member.loop.save()

    def _heed(self) -> None:
        """Between two micro-batches: whether to stop here."""
        if self.signals.received is not None:
            raise Abandoned


def _wish(member: Member, rows: Sequence[int], *, validation: bool = False) -> Wish:
    data = member.loop.validation if validation else member.loop.train
    assert data is not None
    return Wish(member.number, tuple(rows), tuple(int(data.lengths[i]) for i in rows), data.fingerprint)


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
