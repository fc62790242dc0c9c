"""A sweep from grid to leaderboard: prepare, load one base, train all members on it, leave a run folder for each.

grid -> candidates (data, plans, proof) -> stack (one base, all adapters) -> rounds -> run folders, leaderboard
"""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lora_cli.config import Grid, dump_config
from lora_cli.engine.freed import keep_freed_memory
from lora_cli.engine.step import Abandoned, Learner
from lora_cli.engine.world import World, join_world
from lora_cli.errors import Interrupted, UserError
from lora_cli.report.events import Emit, SweepFinished, SweepPlanned, SweepSummary, ignore
from lora_cli.runs.atomic import write_json, write_text
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.leaderboard import leaderboard
from lora_cli.sweep.members import Candidate, assemble, go_in_turn, prepare_members, warnings_of
from lora_cli.sweep.page import write_page
from lora_cli.sweep.passes import InTurn, Member, Passes, SideBySide
from lora_cli.sweep.rounds import Rounds
from lora_cli.sweep.row import Row
from lora_cli.sweep.stack import Stack
from lora_cli.sweep.starting import configs_as_before, last_common_step, member_voice, start_members
from lora_cli.sweep.state import State, read_state
from lora_cli.train.disk import failing_writes, require_room_for_run
from lora_cli.train.results import base_samples
from lora_cli.train.run import conclude
from lora_cli.train.signals import StopSignals, without_save_requests

MICRO_BATCHES_AT_ONCE = 4
"""Rows of several members through the model at once, in micro-batches of one run."""


def sweep(grid: Grid, *, resume: bool = False, emit: Emit = ignore) -> SweepSummary:
    """Train every member of `grid` at the same time and leave a run folder for each in the config's `output_dir`.

    Losses and adapters are those of a `lora train` of each: to the bit where members go in turn; side by side up to the
    order of summation, and dropout draws other masks.

    Args:
        resume: go on with the sweep in `output_dir`: each member from its newest complete checkpoint.

    Raises:
        UserError: anything that the user can mend; before training starts, nothing has been written.
        Interrupted: SIGINT or SIGTERM came; every member has a checkpoint.
    """
    with without_save_requests():
        return _sweep(grid, resume, emit)


def _sweep(grid: Grid, resume: bool, emit: Emit) -> SweepSummary:
    folder = SweepFolder(Path(grid.config.output_dir))
    world = join_world()
    if world.distributed:
        raise UserError(
            f"a sweep runs in one process, not in {world.size}",
            remedy="Start it without torchrun, or divide the grid by hand.",
        )
    folder.refuse_occupied(resume=resume)
    for member in grid.members:
        folder.member(member.name).refuse_occupied(resume=resume and folder.holds_sweep)
    configs = configs_as_before(folder, grid) if resume else grid.members
    state = read_state(folder, [member.name for member in grid.members])
    candidates = prepare_members(grid, configs, world, emit)
    emit(_planned(grid, candidates, folder, world))
    for candidate in candidates:
        require_room_for_run(candidate.prepared.plan.writes, folder.member(candidate.name))
    if world.device.type == "cpu":
        keep_freed_memory()
    stack, learners = assemble(candidates, world, emit)
    with ExitStack() as claims:
        claims.enter_context(failing_writes(folder.member("."), lambda: None, _resume_command(folder)))
        claims.enter_context(folder.claim(resume=resume))
        for candidate in candidates:
            claims.enter_context(folder.member(candidate.name).claim(resume=resume))
        # Defaults stay out of it: some, such as lora_alpha, follow from what the grid varies.
        write_text(folder.config_file, dump_config(grid.config, given_only=True))
        state.write(folder)
        try:
            return _run(grid, folder, candidates, stack, learners, state, world, resume, emit)
        except KeyboardInterrupt:
            remedy = f"Go on with: {_resume_command(folder)}"
            raise Interrupted(signal.SIGINT, "stopped by SIGINT at once", remedy=remedy) from None


def _run(
    grid: Grid,
    folder: SweepFolder,
    candidates: Sequence[Candidate],
    stack: Stack,
    learners: Sequence[Learner],
    state: State,
    world: World,
    resume: bool,
    emit: Emit,
) -> SweepSummary:
    signals = StopSignals()

    def heed() -> None:
        if signals.received is not None:
            raise Abandoned

    in_turn, begin = go_in_turn(candidates), None
    if resume:
        begin = math.inf if in_turn else last_common_step(candidates, folder, state)
    members, summaries = start_members(candidates, learners, folder, state, world, begin, heed, emit)
    base_texts: dict[str | None, list[str]] = {}
    """By held-out rows: what the base makes of them is the same for every member."""

    def write_result(member: Member) -> None:
        prepared, voice = candidates[member.number].prepared, member_voice(member.name, emit)
        rows = None if prepared.validation is None else prepared.validation.fingerprint
        with stack.seated(member.number) as model:
            if rows not in base_texts:
                base_texts[rows] = base_samples(model, prepared, member.loop)
            summaries[member.name] = conclude(model, prepared, member.loop, voice, base_texts[rows])

    passes: Passes = InTurn(stack)
    if not in_turn:
        own = min(member.loop.position.micro_batch_tokens for member in members)
        passes = SideBySide(Row(stack), _tokens_at_once(grid, own, world), world, emit, heed)
    assert grid.config.sweep is not None
    rounds = Rounds(
        passes=passes,
        members=members,
        state=state,
        folder=folder,
        halving=grid.config.sweep.halving,
        signals=signals,
        world=world,
        emit=emit,
        conclude=write_result,
    )
    try:
        rounds.run()
    except Abandoned:
        number = signal.SIGINT if signals.received == signal.SIGINT else signal.SIGTERM
        raise Interrupted(
            number,
            f"stopped by {number.name}; every member has a checkpoint",
            remedy=f"Go on with: {_resume_command(folder)}",
        ) from None
    summary = leaderboard(candidates, summaries, state, folder, world)
    write_page(folder, summary, in_turn=in_turn, warnings=warnings_of(candidates))
    write_json(folder.leaderboard_file, summary.as_json())
    emit(SweepFinished(summary))
    return summary


def _tokens_at_once(grid: Grid, own: int, world: World) -> int:
    """What was asked for; else what one run would take on a card, and on a CPU a few times that: it is faster."""
    asked = grid.config.train.micro_batch_tokens
    return own * MICRO_BATCHES_AT_ONCE if asked == "auto" and world.device.type == "cpu" else own


def _planned(grid: Grid, candidates: Sequence[Candidate], folder: SweepFolder, world: World) -> SweepPlanned:
    assert grid.config.sweep is not None
    halving, plans = grid.config.sweep.halving, [candidate.prepared.plan for candidate in candidates]
    engine, in_turn = plans[0].engine, go_in_turn(candidates)
    if not in_turn:
        engine = replace(engine, micro_batch_tokens=_tokens_at_once(grid, engine.micro_batch_tokens, world))
    return SweepPlanned(
        plan=replace(plans[0], engine=engine),
        members=tuple(candidate.name for candidate in candidates),
        grid={key: tuple(values) for key, values in grid.config.sweep.grid.items()},
        trainable=tuple(plan.parameters.trainable for plan in plans),
        steps=tuple(plan.steps.total for plan in plans),
        in_turn=in_turn,
        output_dir=str(folder.path),
        halving=None
        if halving is None
        else f"every {halving.every:,} steps the best {halving.keep:.0%} by validation loss go on, "
        f"at least {halving.at_least}",
    )


def _resume_command(folder: SweepFolder) -> str:
    return f"lora sweep {shlex.quote(str(folder.config_file))} --resume"
