"""The rounds of a sweep: in each, every member that is due takes one step.

A member's lines, evaluations, checkpoints and early stopping are those of its own loop, as in `lora train`. How steps
are taken is the `passes`' affair. Knows nothing of how members are made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_cli.config import HalvingConfig
from lora_cli.engine.step import Abandoned, StepResult
from lora_cli.engine.world import World
from lora_cli.errors import TrainingError
from lora_cli.report.events import Dropped, Emit, SweepStepped, Working
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.passes import Member, Passes
from lora_cli.sweep.state import State, decide
from lora_cli.train.memory import peak_memory_bytes
from lora_cli.train.setbacks import has_not_moved
from lora_cli.train.signals import StopSignals


@dataclass
class Rounds:
    """All members, from where each stands to its last step."""

    passes: Passes
    members: Sequence[Member]
    state: State
    folder: SweepFolder
    halving: HalvingConfig | None
    signals: StopSignals
    world: World
    emit: Emit
    conclude: Callable[[Member], None]
    """Writes the result of a member that is over."""
    seconds: float = 0.0
    num_tokens: int = 0
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
                _save(self._at_work)
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
        self._step(due)
        self._evaluate_due()
        self._save_due()
        self._retire()
        if self.signals.received is not None:
            raise Abandoned

    def _step(self, due: Sequence[Member]) -> None:
        """One step of each; each member's figures are in its own record as soon as it has taken it."""
        before = sum(member.loop.position.num_tokens for member in due)
        began = time.perf_counter()
        results: dict[str, StepResult] = {}
        failed: list[tuple[Member, TrainingError]] = []
        logged = False
        for member, result in self.passes.step(due):
            if isinstance(result, TrainingError):
                failed.append((member, result))
                continue
            results[member.name] = result
            if member.loop.is_due(member.loop.config.train.logging_steps) or member.loop.is_over:
                member.loop.write_line()
                logged = True
        self._fail(failed)
        tokens = sum(member.loop.position.num_tokens for member in due) - before
        if results:
            self._tell(due, results, tokens, time.perf_counter() - began, logged)

    def _tell(
        self, due: Sequence[Member], results: Mapping[str, StepResult], tokens: int, seconds: float, logged: bool
    ) -> None:
        self.seconds += seconds
        self.num_tokens += tokens
        best = min(results, key=lambda name: _order(results[name].loss))
        step, total = max(m.loop.position.step for m in due), max(m.loop.plan.steps.total for m in self.members)
        self.emit(
            SweepStepped(
                step=step,
                total=total,
                active=len(due),
                members=len(self.members),
                best=best,
                best_loss=results[best].loss,
                worst_loss=max((result.loss for result in results.values()), key=_order),
                num_tokens=tokens,
                tokens_per_second=tokens / max(seconds, 1e-9),
                peak_memory_bytes=peak_memory_bytes(self.world.device),
                seconds_gone=self.seconds,
                seconds_left=self._seconds_left(),
                logged=logged,
            )
        )

    def _seconds_left(self) -> float:
        """By the tokens of the rounds so far, if nobody is dropped any more."""
        steps = sum(m.loop.plan.steps.total - m.loop.position.step for m in self._at_work)
        taken = max(1, sum(m.loop.position.steps_counted for m in self._at_work))
        seen = sum(m.loop.position.num_tokens for m in self._at_work)
        return self.seconds / max(self.num_tokens, 1) * seen / taken * steps

    # Evaluation and what follows from it

    def _evaluate_due(self) -> None:
        self._evaluate([member for member in self._at_work if member.loop.evaluation_is_due])

    def _evaluate(self, members: Sequence[Member]) -> None:
        """The validation loss of each; those whose adapter hasn't moved yet are the base, which is scored once."""
        if not members:
            return
        like, scored = self._scored_once(members)
        failed: list[tuple[Member, TrainingError]] = []
        for number, (member, loss) in enumerate(self.passes.score(scored), start=1):
            self.emit(Working("evaluating", number, len(scored), "members"))
            for same in (member, *like.get(member.number, ())):
                if isinstance(loss, TrainingError):
                    failed.append((same, loss))
                else:
                    same.loop.note_evaluation(loss)
                    same.loop.stopped = same.loop.lost_patience()
        self._fail(failed)

    def _scored_once(self, members: Sequence[Member]) -> tuple[dict[int, list[Member]], list[Member]]:
        """Those whose loss is another's, by the other's number; and all others."""
        like: dict[int, list[Member]] = {}
        scored: list[Member] = []
        bases: dict[str, Member] = {}
        for member in members:
            validation = member.loop.validation
            is_base = validation is not None and has_not_moved(member.loop.learner.parameters)
            first = bases.setdefault(validation.fingerprint, member) if is_base and validation is not None else member
            if first is member:
                scored.append(member)
            else:
                like.setdefault(first.number, []).append(member)
        return like, scored

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
        _save(there)
        rung = decide(step, {m.name: m.loop.position.eval_losses[-1][1] for m in there}, self.halving)
        self.state.rungs.append(rung)
        self.state.write(self.folder)
        for member in there:
            if member.name in rung.dropped:
                member.loop.stopped = rung.why(member.name)
        self._retire()

    def _retire(self) -> None:
        """Write the results of those that are over. In lockstep all are saved first: gone on with, they aren't found
        behind a step that these took with them."""
        over = [member for member in self._at_work if member.loop.is_over]
        for member in over:
            member.loop.write_line()  # what there is since the last one
        if over:
            _save(self._at_work if self.passes.lockstep else over)
        for member in over:
            member.at_work = False
            if member.loop.stopped is not None:
                self.emit(Dropped(member.name, member.loop.position.step, member.loop.stopped))
            self.conclude(member)

    def _fail(self, failed: Sequence[tuple[Member, TrainingError]]) -> None:
        """Members that can't go on leave; the others don't notice."""
        for member, _ in failed:
            member.at_work = False
        if failed and self.passes.lockstep:
            _save(self._at_work)
        for member, error in failed:
            self.state.failed[member.name] = error.message
            self.state.write(self.folder)
            self.emit(Dropped(member.name, member.loop.position.step, error.message))

    # Checkpoints

    def _save_due(self) -> None:
        train = self.members[0].loop.config.train
        overdue = train.save_minutes is not None and time.monotonic() - self._saved_at >= 60 * train.save_minutes
        everyone = self.signals.save_asked() or overdue
        if everyone:
            self._saved_at = time.monotonic()
        _save([member for member in self._at_work if everyone or member.loop.is_due(train.save_steps)])


def _save(members: Sequence[Member]) -> None:
    for member in members:
        member.loop.save()


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
