"""A run from config to result: prepare, write the run folder, load, train, and leave an adapter that says how it came.

config -> Prepared (data, tokenizer, plan) -> Learner (weights, optimizer) -> Loop -> results
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.config import Config, dump_config, load_config
from lora_cli.data.cache import tokenizer_fingerprint
from lora_cli.engine.assembly import causal_lm, load_model, make_computation, make_trainable, trainable_parameters
from lora_cli.engine.computation import Computation
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.planning import Prepared, check_against_plan, prepare
from lora_cli.engine.provenance import base_has_changed
from lora_cli.engine.step import Learner
from lora_cli.engine.world import World, join_world
from lora_cli.errors import RunFolderError
from lora_cli.model.fingerprint import weights_fingerprint
from lora_cli.report.events import Emit, Finished, Planned, Summary, Warned, Working, ignore
from lora_cli.runs.atomic import write_json, write_text
from lora_cli.runs.environment import describe_environment
from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import (
    Position,
    load_checkpoint,
    load_parameters,
    newest_checkpoint,
    remove_later_checkpoints,
)
from lora_cli.train.differences import refuse_differences
from lora_cli.train.loop import Loop
from lora_cli.train.results import read_summary, write_results
from lora_cli.train.trackers import Trackers, flat_settings, require_trackers, start_trackers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def train(config: Config, *, resume: bool = False, emit: Emit = ignore) -> Summary:
    """Train as `config` says and leave the result in `config.output_dir`.

    Under torchrun, call it in every process; the first one emits and writes.

    Args:
        resume: go on with the run in `output_dir`, from its newest complete checkpoint.

    Raises:
        UserError: anything that the user can mend; before training starts, nothing has been written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
    """
    folder = RunFolder(Path(config.output_dir))
    folder.refuse_occupied(resume=resume)
    require_trackers(config.train.report_to)
    world = join_world()
    emit = emit if world.is_main else ignore
    if resume:
        config = _as_before(folder, config)
        _refuse_other_base(folder, config)
    prepared = prepare(config, world.device, processes=world.size, emit=emit)
    finished = read_summary(folder) if resume else None
    if finished is not None and (finished.stopped or finished.steps >= prepared.plan.steps.total):
        emit(Warned(f"{folder.path} is finished; a larger train.num_train_epochs or train.max_steps extends it"))
        emit(Finished(finished))
        return finished
    emit(Planned(prepared.plan))
    model, learner = assemble(prepared, world, emit)
    with folder.claim(resume=resume) if world.is_main else nullcontext():
        position = _start(folder, learner, prepared, world, resume, emit)
        if world.is_main:
            _write_origin(folder, prepared)
        return _run(folder, prepared, model, learner, position, world, emit)


def assemble(prepared: Prepared, world: World, emit: Emit) -> tuple[PreTrainedModel | PeftModel, Learner]:
    """The model with its weights, and what trains it. The last of the user's mistakes show here: nothing is written."""
    config = prepared.config
    emit(Working("loading weights"))
    computation = make_computation(config, prepared.proof, world.device)
    base = load_model(config, prepared.architecture, computation, world.device)
    model = make_trainable(base, config, computation, prepared.tokenizer)
    if not config.model.resize_embeddings:
        check_against_plan(model, prepared.plan)
    return model, _learner(model, prepared, computation, world)


def _run(
    folder: RunFolder,
    prepared: Prepared,
    model: PreTrainedModel | PeftModel,
    learner: Learner,
    position: Position,
    world: World,
    emit: Emit,
) -> Summary:
    config = prepared.config
    trackers = start_trackers(config, str(folder.path), flat_settings(config)) if world.is_main else Trackers()
    loop = Loop(
        config, prepared.plan, learner, prepared.train, prepared.validation, world, folder, position, emit, trackers
    )
    try:
        loop.run()
    finally:
        trackers.finish()
    _say_if_worse(position, emit)
    if config.train.load_best_model_at_end and position.best_step is not None:
        load_parameters(folder.checkpoint(position.best_step), learner.parameters)
    summary = write_results(folder, model, prepared, loop, emit)
    emit(Finished(summary))
    return summary


def _say_if_worse(position: Position, emit: Emit) -> None:
    if position.best_eval_loss is not None and position.best_eval_loss >= position.eval_losses[0][1]:
        base = position.eval_losses[0][1]
        emit(Warned(f"no evaluation was better than the base's {base:.4f}; the best was {position.best_eval_loss:.4f}"))


def _learner(model: PreTrainedModel | PeftModel, prepared: Prepared, computation: Computation, world: World) -> Learner:
    train = prepared.config.train
    parameters = trainable_parameters(model)
    world.copy_from_main([p.data for p in parameters.values()])
    optimizer = make_optimizer(train, parameters, world.device)
    return Learner(
        model=causal_lm(model),
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_scheduler(train, optimizer, prepared.plan.steps.total),
        scaler=torch.amp.GradScaler(world.device.type, enabled=computation.dtype == torch.float16),
        computation=computation,
        max_grad_norm=train.max_grad_norm,
    )


def _start(folder: RunFolder, learner: Learner, prepared: Prepared, world: World, resume: bool, emit: Emit) -> Position:
    """Where the run begins: at its newest complete checkpoint when it is resumed, else before the first step.

    Every process reads; only the main one, which holds the folder's lock, removes what came after.

    Raises:
        RunFolderError: the data is not what the checkpoint was made on.
    """
    tokens = prepared.plan.engine.micro_batch_tokens
    fresh = Position(micro_batch_tokens=tokens, asked_micro_batch_tokens=tokens, threads=torch.get_num_threads())
    if not resume:
        return fresh
    newest = newest_checkpoint(folder)
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
    if position.threads != torch.get_num_threads():
        emit(
            Warned(
                f"{torch.get_num_threads()} threads instead of {position.threads}: sums are ordered otherwise, and the "
                "last digits will differ from those of an uninterrupted run"
            )
        )
    return position


def _cut_back(folder: RunFolder, position: Position, world: World) -> None:
    """Remove what was written of steps that will be taken again."""
    if world.is_main:
        folder.cut_metrics(position.metrics_bytes)
        remove_later_checkpoints(folder, position.step)


def _as_before(folder: RunFolder, config: Config) -> Config:
    """The config of the run in `folder`; the one given may differ from it only in what can't change the result.

    Raises:
        RunFolderError: there is no run, or a difference that matters; each is named.
    """
    if not folder.config_file.is_file():
        if folder.holds_run:
            raise RunFolderError(f"{folder.path} has no config.yaml; it can't be resumed")
        return config
    return refuse_differences(load_config(folder.config_file), config, folder)


def _write_origin(folder: RunFolder, prepared: Prepared) -> None:
    """config.yaml and environment.json: how the run is made. Resumed, it may have other versions and settings."""
    write_text(folder.config_file, dump_config(prepared.config))
    write_json(folder.environment_file, _environment(prepared))


def _base_fingerprint(config: Config) -> str | None:
    """Of the base's weights where they lie in a folder; a model of the hub is told by its revision."""
    folder = Path(config.model.name_or_path).expanduser()
    return weights_fingerprint(folder) if folder.is_dir() else None


def _refuse_other_base(folder: RunFolder, config: Config) -> None:
    """Refuse to go on when the base's weights are not those that the run was started on.

    Raises:
        RunFolderError: they have changed.
    """
    if base_has_changed(folder, Path(config.model.name_or_path).expanduser()):
        raise RunFolderError(
            f"{config.model.name_or_path} isn't the base that {folder.path} was started on: its weights have changed",
            remedy="Put the same weights back in their place, or start anew with --output-dir.",
        )


def _environment(prepared: Prepared) -> dict[str, Any]:
    return {
        **describe_environment(),
        "device": prepared.plan.engine.device,
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "engine": asdict(prepared.plan.engine),
        "fingerprints": {
            "base": _base_fingerprint(prepared.config),
            "train": prepared.train.fingerprint,
            "validation": None if prepared.validation is None else prepared.validation.fingerprint,
            "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
        },
    }
