"""The members of a sweep, made ready: each prepared as `lora train` prepares it, its adapter around the one base.

What members can't share is refused here, before the weights are loaded. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lora_cli.config import Grid, MemberConfig
from lora_cli.engine.assembly import load_model, make_computation, make_trainable
from lora_cli.engine.planning import Prepared, check_against_plan, prepare
from lora_cli.engine.step import Learner
from lora_cli.engine.world import World
from lora_cli.errors import ConfigError, Problem, UserError
from lora_cli.report.events import Emit, Event, Planned, Warned, Working
from lora_cli.sweep.proof import prove_sharing
from lora_cli.sweep.stack import Adapter, Stack
from lora_cli.train.run import make_learner

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Candidate:
    """A member before its weights are loaded."""

    name: str
    changes: Mapping[str, Any]
    prepared: Prepared


def prepare_members(grid: Grid, configs: Sequence[MemberConfig], world: World, emit: Emit) -> list[Candidate]:
    """Every member as it will run, sharing what is the same for all.

    Args:
        configs: the grid's members, perhaps with the configs of a sweep that is gone on with.

    Raises:
        UserError: a mistake that can be known by now, or something that can't be shared.
    """
    found: list[Candidate] = []
    for number, member in enumerate(configs, start=1):
        emit(Working("preparing members", number, len(configs), "members"))
        first = found[0].prepared if found else None
        prepared = prepare(
            member.config, world.device, processes=1, emit=emit if first is None else _quiet(emit), beside=first
        )
        found.append(Candidate(member.name, member.changes, prepared))
    _refuse_uneven_halving(grid, found)
    if not go_in_turn(found):
        emit(Working("proving that members don't see each other"))
        first = found[0].prepared
        adapters = [one.prepared.config.adapter for one in found]
        prove_sharing(
            first.architecture,
            make_computation(first.config, first.proof, world.device),
            [adapter for adapter in adapters if adapter is not None],
        )
    for text in warnings_of(found):
        emit(Warned(text))
    return found


def go_in_turn(candidates: Sequence[Candidate]) -> bool:
    """Whether members take their steps one after the other: where whole layers run fused, rows of several gain nothing.

    Products are what such steps are made of, and every member's are its own from the first adapted layer on. Side by
    side saves what stands between them: Python, dispatch, a 4-bit base's dequantization.
    """
    return any(_runs_whole_layers(one.prepared) for one in candidates)


def _runs_whole_layers(prepared: Prepared) -> bool:
    return prepared.plan.engine.fusion in ("native", "layers")


def assemble(candidates: Sequence[Candidate], world: World, emit: Emit) -> tuple[Stack, list[Learner]]:
    """The base with its weights, the adapters of all members around it, and what trains each."""
    first = candidates[0].prepared
    emit(Working("loading weights"))
    computations = [make_computation(one.prepared.config, one.prepared.proof, world.device) for one in candidates]
    base = load_model(first.config, first.architecture, computations[0], world.device)
    adapters: list[Adapter] = []
    learners: list[Learner] = []
    for candidate, computation in zip(candidates, computations, strict=True):
        prepared = candidate.prepared
        model = cast("PeftModel", make_trainable(base, prepared.config, computation, prepared.tokenizer))
        if not prepared.config.model.resize_embeddings:
            check_against_plan(model, prepared.plan)
        learners.append(make_learner(model, prepared, computation, world))
        adapters.append(Adapter.taken_from(base, model))
    for candidate, computation in zip(candidates, computations, strict=True):
        if _runs_whole_layers(candidate.prepared):
            computation.prepare(base)  # a fused layer looks at whoever is seated; the last adapter may not have let it
            break
    return Stack(base, adapters), learners


def _refuse_uneven_halving(grid: Grid, candidates: Sequence[Candidate]) -> None:
    """Members are ranked at the same step: it must be as far into the run of each."""
    assert grid.config.sweep is not None
    totals = {one.prepared.plan.steps.total for one in candidates}
    if grid.config.sweep.halving is not None and len(totals) > 1:
        hint = "leave halving out, or train.batch_size, num_train_epochs and max_steps out of the grid"
        problem = Problem("sweep.halving", f"members have between {min(totals):,} and {max(totals):,} steps", hint)
        raise ConfigError("the grid", (problem,))
    longest = {one.prepared.train.fingerprint for one in candidates}
    if grid.config.sweep.halving is not None and len(longest) > 1:
        raise UserError(
            "sweep.halving ranks members by their validation loss, and data.validation is a share that train.seed "
            "draws anew for each seed of the grid",
            remedy="Give data.validation a file of its own, or leave train.seed out of the grid, or halving out.",
        )


def warnings_of(candidates: Sequence[Candidate]) -> list[str]:
    """What the plans warn of, each once; and what is another than in a run of its own."""
    found = dict.fromkeys(text for one in candidates for text in one.prepared.plan.warnings)
    if not go_in_turn(candidates) and any(one.prepared.plan.engine.dropout for one in candidates):
        found["with dropout a member's masks are others than in a run of its own: its losses differ from those"] = None
    if len({one.prepared.train.fingerprint for one in candidates}) > 1:
        found["data.validation is a share drawn by train.seed: members of other seeds have other held-out rows"] = None
    return [text for text in found if text not in candidates[0].prepared.plan.warnings] + list(
        candidates[0].prepared.plan.warnings
    )


def _quiet(emit: Emit) -> Emit:
    def only_work(event: Event) -> None:
        if not isinstance(event, Working | Planned):
            emit(event)

    return only_work
