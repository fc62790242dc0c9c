"""Where a run begins: before its first step, or at the newest checkpoint of what stands in its folder.

Refuses to go on with what would give another result, by name; says what changes the last digits alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lora_cli.config import Config, load_config
from lora_cli.engine.planning import Prepared
from lora_cli.engine.provenance import base_has_changed
from lora_cli.engine.step import Learner
from lora_cli.engine.world import World
from lora_cli.errors import RunFolderError
from lora_cli.report.events import Emit, Warned
from lora_cli.report.numbers import counted
from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import load_checkpoint, newest_checkpoint, remove_later_checkpoints
from lora_cli.train.differences import refuse_differences
from lora_cli.train.position import Position


def start_position(
    folder: RunFolder,
    learner: Learner,
    prepared: Prepared,
    world: World,
    resume: bool,
    emit: Emit,
    at_most: float = math.inf,
) -> Position:
    """Where the run begins: at its newest complete checkpoint when it is resumed, else before the first step.

    Every process reads; only the main one, which holds the folder's lock, removes what came after.

    Args:
        at_most: a step that the run mustn't be beyond.

    Raises:
        RunFolderError: the data is not what the checkpoint was made on.
    """
    tokens = prepared.plan.engine.micro_batch_tokens
    fresh = Position(
        micro_batch_tokens=tokens,
        asked_micro_batch_tokens=tokens,
        threads=torch.get_num_threads(),
        processes=world.size,
    )
    if not resume:
        return fresh
    newest = newest_checkpoint(folder, at_most)
    for step in reversed(folder.checkpoint_steps()):
        if folder.checkpoint(step) == newest:
            break
        if step > at_most:
            continue
        emit(Warned(f"{folder.checkpoint(step)} isn't what its manifest says: it is passed over and removed"))
    if newest is None:
        _cut_back(folder, fresh, world)
        return fresh
    position, fingerprint = load_checkpoint(newest, learner)
    if fingerprint != prepared.train.fingerprint:
        raise RunFolderError(
            f"the training rows are not those that {folder.path} was trained on",
            remedy="Bring the data back as it was, or start anew with --output-dir.",
        )
    _cut_back(folder, position, world)
    if position.asked_micro_batch_tokens != tokens:
        position.micro_batch_tokens = position.asked_micro_batch_tokens = tokens
    _say_what_changes_sums(position, fresh, prepared.plan.engine.dropout, emit)
    position.threads, position.processes = fresh.threads, fresh.processes
    position.resumed_after.append(position.step)
    return position


def _say_what_changes_sums(before: Position, now: Position, dropout: float, emit: Emit) -> None:
    """Another number of threads or processes takes the same rows in the same steps, and adds them up otherwise."""
    found = []
    if now.threads != before.threads:
        found.append(f"{counted(now.threads, 'thread')} instead of {before.threads}")
    if now.processes != before.processes:
        found.append(f"{now.processes} process{'es' * (now.processes > 1)} instead of {before.processes}")
    if found:
        emit(
            Warned(
                f"{', '.join(found)}: sums are ordered otherwise, and the last digits will differ from those of an "
                "uninterrupted run"
            )
        )
    if now.processes != before.processes and dropout:
        emit(Warned("dropout is drawn for each process: with another number of them it falls on other places"))


def _cut_back(folder: RunFolder, position: Position, world: World) -> None:
    """Remove what was written of steps that will be taken again."""
    if world.is_main:
        folder.cut_metrics(position.metrics_bytes)
        remove_later_checkpoints(folder, position.step)


def config_as_before(folder: RunFolder, config: Config) -> Config:
    """The config of the run in `folder`; the one given may differ from it only in what can't change the result.

    Raises:
        RunFolderError: there is no run, or a difference that matters; each is named.
    """
    if not folder.config_file.is_file():
        if folder.holds_run:
            raise RunFolderError(f"{folder.path} has no config.yaml; it can't be resumed")
        return config
    return refuse_differences(load_config(folder.config_file), config, folder)


def refuse_other_base(folder: RunFolder, config: Config) -> None:
    """Refuse to go on when the base's weights are not those that the run was started on.

    Raises:
        RunFolderError: they have changed.
    """
    if base_has_changed(folder, Path(config.model.name_or_path).expanduser()):
        raise RunFolderError(
            f"{config.model.name_or_path} isn't the base that {folder.path} was started on: its weights have changed",
            remedy="Put the same weights back in their place, or start anew with --output-dir.",
        )
