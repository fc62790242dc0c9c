"""Where each member begins: before its first step, or where it stood when a sweep that is gone on with was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_cli.config import Grid, MemberConfig
from lora_cli.engine.step import Learner
from lora_cli.engine.world import World
from lora_cli.report.events import Emit, Event, Summary, Warned, Working
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.members import Candidate
from lora_cli.sweep.passes import Member
from lora_cli.sweep.state import State
from lora_cli.train.checkpoint import newest_checkpoint
from lora_cli.train.loop import Loop
from lora_cli.train.results import read_summary
from lora_cli.train.resuming import config_as_before, refuse_other_base, start_position
from lora_cli.train.run import base_fingerprint, write_origin
from lora_cli.train.trackers import Trackers


def start_members(
    candidates: Sequence[Candidate],
    learners: Sequence[Learner],
    folder: SweepFolder,
    state: State,
    world: World,
    begin: float | None,
    heed: Callable[[], None],
    emit: Emit,
) -> tuple[list[Member], dict[str, Summary]]:
    """All members, each at its newest checkpoint up to the step `begin`, and the summaries of those that are over."""
    members: list[Member] = []
    summaries: dict[str, Summary] = {}
    base = base_fingerprint(candidates[0].prepared.config)
    for number, (candidate, learner) in enumerate(zip(candidates, learners, strict=True)):
        finished = _finished(folder.member(candidate.name), candidate)
        at_work = finished is None and candidate.name not in state.failed
        loop = _loop(candidate, folder, learner, world, begin if at_work else None, heed, emit)
        if finished is not None:
            summaries[candidate.name] = finished
        if at_work:
            write_origin(loop.folder, candidate.prepared, base)
            loop.stopped = state.dropped(candidate.name) or loop.lost_patience()
        members.append(Member(number, candidate.name, loop, at_work))
    return members, summaries


def _loop(
    candidate: Candidate,
    folder: SweepFolder,
    learner: Learner,
    world: World,
    begin: float | None,
    heed: Callable[[], None],
    emit: Emit,
) -> Loop:
    """A member's loop: fresh, or at its newest checkpoint up to the step `begin`, what came after it removed."""
    prepared, own = candidate.prepared, folder.member(candidate.name)
    voice = member_voice(candidate.name, emit)
    again = begin is not None
    position = start_position(own, learner, prepared, world, again, voice, math.inf if begin is None else begin)
    return Loop(
        prepared.config,
        prepared.plan,
        learner,
        prepared.train,
        prepared.validation,
        world,
        own,
        position,
        voice,
        Trackers(),
        heed=heed,
    )


def last_common_step(candidates: Sequence[Candidate], folder: SweepFolder, state: State) -> int:
    """The last step at which every member that isn't over has a checkpoint: a kill may come between two of them."""
    found = []
    for candidate in candidates:
        own = folder.member(candidate.name)
        if _finished(own, candidate) is None and candidate.name not in state.failed:
            newest = newest_checkpoint(own)
            found.append(0 if newest is None else own.step_of(newest))
    return min(found, default=0)


def _finished(folder: RunFolder, candidate: Candidate) -> Summary | None:
    """The summary of a member that is over."""
    found = read_summary(folder)
    over = found is not None and (found.stopped or found.steps >= candidate.prepared.plan.steps.total)
    return found if over else None


def configs_as_before(folder: SweepFolder, grid: Grid) -> tuple[MemberConfig, ...]:
    """The members' configs of the sweep in `folder`; those given may differ in what can't change the result."""
    found = []
    for member in grid.members:
        own = folder.member(member.name)
        config = config_as_before(own, member.config)
        refuse_other_base(own, config)
        found.append(replace(member, config=config))
    return tuple(found)


def member_voice(name: str, emit: Emit) -> Emit:
    """What a member says, with its name; its steps are told together with those of the others."""

    def say(event: Event) -> None:
        if isinstance(event, Warned):
            emit(Warned(f"{name}: {event.text}"))
        elif isinstance(event, Working) and not event.total:
            emit(Working(f"{event.what} of {name}"))

    return say
