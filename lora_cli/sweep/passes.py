"""How members take their steps and are scored: in turn, each by the passes of a run of its own, or side by side in rows
of several.

A member's loss and gradients are the same either way; in turn they are those of `lora train` to the bit. Knows nothing
of when a step is due, or of what becomes of its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from lora_cli.engine.step import OutOfMemory, StepResult
from lora_cli.engine.world import World
from lora_cli.errors import TrainingError
from lora_cli.report.events import Emit, Warned
from lora_cli.sweep.arrange import Wish
from lora_cli.sweep.row import Row
from lora_cli.sweep.shared import shared_losses, shared_step
from lora_cli.sweep.stack import Stack
from lora_cli.train.loop import Loop, StepRows

Found = TypeVar("Found")


@dataclass
class Member:
    """One member at work."""

    number: int
    """In the stack."""
    name: str
    loop: Loop
    at_work: bool = True
    """Whether it still takes steps."""


class Passes(Protocol):
    """A way for members to go through the base. Either may raise `Abandoned`, which the loops' `heed` has raised."""

    lockstep: ClassVar[bool]
    """Whether the last digits of a member's step depend on who else takes one with it."""

    def step(self, due: Sequence[Member]) -> Iterator[tuple[Member, StepResult | TrainingError]]:
        """One step of each: what it did, or why the member can't go on. A member's step is noted before it is given."""

    def score(self, members: Sequence[Member]) -> Iterator[tuple[Member, float | TrainingError]]:
        """The validation loss of each, in nats per supervised token, or why the member can't go on."""


@dataclass(frozen=True)
class InTurn:
    """One member after the other, each seated on the base as if it were alone."""

    stack: Stack
    lockstep: ClassVar[bool] = False

    def step(self, due: Sequence[Member]) -> Iterator[tuple[Member, StepResult | TrainingError]]:
        for member in due:
            yield member, self._seated(member, lambda loop: loop.take_step(loop.position.step + 1))

    def score(self, members: Sequence[Member]) -> Iterator[tuple[Member, float | TrainingError]]:
        for member in members:
            yield member, self._seated(member, Loop.validation_loss)

    def _seated(self, member: Member, work: Callable[[Loop], Found]) -> Found | TrainingError:
        with self.stack.seated(member.number):
            try:
                return work(member.loop)
            except TrainingError as error:
                return error


@dataclass
class SideBySide:
    """All members in the same rows."""

    row: Row
    micro_batch_tokens: int
    """Of a row, over all members in it; halved when memory runs out."""
    world: World
    emit: Emit
    heed: Callable[[], None]
    lockstep: ClassVar[bool] = True

    def step(self, due: Sequence[Member]) -> Iterator[tuple[Member, StepResult | TrainingError]]:
        rows = {member.number: member.loop.rows(member.loop.position.step + 1) for member in due}
        tokens = sum(each.num_tokens for each in rows.values())
        began = time.perf_counter()
        results = self._step(due, rows)
        seconds = time.perf_counter() - began
        for member in due:
            own, result = rows[member.number], results[member.number]
            try:
                member.loop.took(own, result, seconds * own.num_tokens / tokens)  # its share of the time
            except TrainingError as error:
                yield member, error
            else:
                yield member, result

    def score(self, members: Sequence[Member]) -> Iterator[tuple[Member, float | TrainingError]]:
        data = {m.number: m.loop.validation for m in members if m.loop.validation is not None}
        wishes = [_wish(m, range(len(data[m.number])), validation=True) for m in members]
        computation = members[0].loop.learner.computation
        while True:
            try:
                found = shared_losses(
                    self.row,
                    computation,
                    wishes,
                    data,
                    micro_batch_tokens=self.micro_batch_tokens,
                    world=self.world,
                    heed=self.heed,
                )
                break
            except OutOfMemory:
                self._smaller(max(max(wish.lengths) for wish in wishes))
        for member in members:
            yield member, float(found[member.number].sum() / data[member.number].supervised.sum())

    def _step(self, due: Sequence[Member], rows: Mapping[int, StepRows]) -> dict[int, StepResult]:
        while True:
            try:
                return shared_step(
                    self.row,
                    {member.number: member.loop.learner for member in due},
                    [_wish(member, [int(i) for i in rows[member.number].indices]) for member in due],
                    {member.number: member.loop.train for member in due},
                    {member.number: rows[member.number].num_supervised for member in due},
                    micro_batch_tokens=self.micro_batch_tokens,
                    world=self.world,
                    heed=self.heed,
                )
            except OutOfMemory:
                self._smaller(max(int(m.loop.train.lengths[rows[m.number].indices].max()) for m in due))

    def _smaller(self, longest: int) -> None:
        if self.micro_batch_tokens <= longest:
            raise TrainingError(
                f"out of memory with one row of one member at a time ({longest:,} tokens)",
                remedy="Fewer members, shorter rows (data.max_length), train.activation_offloading: true, or\n"
                "model.quantization: {type: nf4} need less.",
            )
        self.micro_batch_tokens = max(self.micro_batch_tokens // 2, 1)
        tokens = self.micro_batch_tokens
        self.emit(Warned(f"out of memory: micro-batches of {tokens:,} tokens from here on; the result is the same"))


def _wish(member: Member, rows: Sequence[int], *, validation: bool = False) -> Wish:
    data = member.loop.validation if validation else member.loop.train
    assert data is not None
    return Wish(member.number, tuple(rows), tuple(int(data.lengths[i]) for i in rows), data.fingerprint)
