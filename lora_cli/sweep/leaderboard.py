"""The members of a sweep in order: those that took all their steps by loss, then the dropped ones, then the failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lora_cli.engine.world import World
from lora_cli.report.events import Standing, Summary, SweepSummary
from lora_cli.runs.sweep import SweepFolder
from lora_cli.sweep.members import Candidate
from lora_cli.sweep.state import State
from lora_cli.train.memory import peak_memory_bytes


def leaderboard(
    candidates: Sequence[Candidate],
    summaries: Mapping[str, Summary],
    state: State,
    folder: SweepFolder,
    world: World,
) -> SweepSummary:
    """The leaderboard.

    Args:
        summaries: of the members that have a result.
    """
    standings = [_standing(candidate, summaries.get(candidate.name), state, folder) for candidate in candidates]
    evaluated = candidates[0].prepared.validation is not None
    ordered = sorted(standings, key=lambda standing: _order(standing, evaluated))
    seconds = sum(summary.train_seconds for summary in summaries.values())
    tokens = sum(summary.num_tokens for summary in summaries.values())
    return SweepSummary(
        ranked_by="eval_loss" if evaluated else "train_loss",
        members=tuple(ordered),
        rungs=tuple(asdict(rung) for rung in state.rungs),
        num_tokens=tokens,
        train_seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(world.device),
        output_dir=str(folder.path),
    )


def _standing(candidate: Candidate, summary: Summary | None, state: State, folder: SweepFolder) -> Standing:
    best = candidate.prepared.config.train.load_best_model_at_end
    eval_loss = None
    if summary is not None:
        eval_loss = summary.best_eval_loss if best and summary.best_eval_loss is not None else summary.final_eval_loss
    return Standing(
        name=candidate.name,
        changes=dict(candidate.changes),
        steps=0 if summary is None else summary.steps,
        train_loss=None if summary is None else summary.final_loss,
        eval_loss=eval_loss,
        trainable=candidate.prepared.plan.parameters.trainable,
        stopped=state.failed.get(candidate.name) if summary is None else summary.stopped,
        failed=summary is None,
        output_dir=str(folder.member(candidate.name).path),
    )


def _order(standing: Standing, evaluated: bool) -> tuple[bool, bool, int, float]:
    """Halving's dropped members by how far they came; early stopping by patience is an end like any other."""
    loss = standing.eval_loss if evaluated else standing.train_loss
    halved = standing.stopped is not None and standing.stopped.startswith("halving")
    return (
        standing.failed,
        halved,
        -standing.steps if halved else 0,
        loss if loss is not None and math.isfinite(loss) else math.inf,
    )
