"""A run from config to result: prepare, write the run folder, load, train, and leave an adapter that says how it came.

config -> Prepared (data, tokenizer, plan) -> Learner (weights, optimizer) -> Loop -> results
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.config import Config, dump_config
from lora_cli.data.cache import tokenizer_fingerprint
from lora_cli.engine.assembly import causal_lm, load_model, make_computation, make_trainable, trainable_parameters
from lora_cli.engine.computation import Computation
from lora_cli.engine.freed import keep_freed_memory
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.planning import Prepared, check_against_plan, prepare
from lora_cli.engine.step import Learner
from lora_cli.engine.world import World, join_world
from lora_cli.errors import Interrupted
from lora_cli.model.fingerprint import weights_fingerprint
from lora_cli.report.events import Emit, Finished, Planned, Summary, Warned, Working, ignore
from lora_cli.runs.atomic import write_json, write_text
from lora_cli.runs.environment import describe_environment
from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import load_parameters, newest_checkpoint
from lora_cli.train.disk import failing_writes, require_room_for_run
from lora_cli.train.loop import Loop, resume_command
from lora_cli.train.position import Position
from lora_cli.train.results import read_summary, write_results
from lora_cli.train.resuming import config_as_before, refuse_other_base, start_position
from lora_cli.train.signals import without_save_requests
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
    with without_save_requests():
        return _train(config, resume, emit)


def _train(config: Config, resume: bool, emit: Emit) -> Summary:
    config = config.model_copy(update={"sweep": None})
    folder = RunFolder(Path(config.output_dir))
    folder.refuse_occupied(resume=resume)
    require_trackers(config.train.report_to)
    world = join_world()
    emit = emit if world.is_main else ignore
    if resume:
        config = config_as_before(folder, config)
        refuse_other_base(folder, config)
    prepared = prepare(config, world.device, processes=world.size, emit=emit)
    finished = read_summary(folder) if resume else None
    if finished is not None and (finished.stopped or finished.steps >= prepared.plan.steps.total):
        emit(Warned(f"{folder.path} is finished; a larger train.num_train_epochs or train.max_steps extends it"))
        emit(Finished(finished))
        return finished
    emit(Planned(prepared.plan))
    require_room_for_run(prepared.plan.writes, folder)
    model, learner = assemble(prepared, world, emit)
    with (
        failing_writes(folder, lambda: newest_checkpoint(folder), resume_command(folder)),
        _stopped_at_once(folder),
        folder.claim(resume=resume) if world.is_main else nullcontext(),
    ):
        position = start_position(folder, learner, prepared, world, resume, emit)
        if world.is_main:
            write_origin(folder, prepared)
        return _run(folder, prepared, model, learner, position, world, emit)


@contextmanager
def _stopped_at_once(folder: RunFolder) -> Iterator[None]:
    """Ctrl-C before the loop, behind it, or twice within it: there is no new checkpoint, and the last one stands."""
    try:
        yield
    except KeyboardInterrupt:
        steps = folder.checkpoint_steps()
        kept = f"Kept: {folder.checkpoint(steps[-1])}" if steps else "No checkpoint had been written yet."
        raise Interrupted(
            signal.SIGINT, "stopped by SIGINT at once", remedy=f"{kept}\nGo on with: {resume_command(folder)}"
        ) from None


def assemble(prepared: Prepared, world: World, emit: Emit) -> tuple[PreTrainedModel | PeftModel, Learner]:
    """The model with its weights, and what trains it. The last of the user's mistakes show here: nothing is written."""
    config = prepared.config
    if world.device.type == "cpu":
        keep_freed_memory()
    emit(Working("loading weights"))
    computation = make_computation(config, prepared.proof, world.device)
    base = load_model(config, prepared.architecture, computation, world.device)
    model = make_trainable(base, config, computation, prepared.tokenizer)
    if not config.model.resize_embeddings:
        check_against_plan(model, prepared.plan)
    return model, make_learner(model, prepared, computation, world)


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
    summary = conclude(model, prepared, loop, emit)
    emit(Finished(summary))
    return summary


def conclude(
    model: PreTrainedModel | PeftModel,
    prepared: Prepared,
    loop: Loop,
    emit: Emit,
    base_texts: Sequence[str] | None = None,
) -> Summary:
    """What a loop that is over leaves in its folder; `base_texts` as `write_results` takes them."""
    position, folder = loop.position, loop.folder
    _say_if_worse(position, emit)
    if prepared.config.train.load_best_model_at_end and position.best_step is not None:
        load_parameters(folder.checkpoint(position.best_step), loop.learner.parameters)
    return write_results(folder, model, prepared, loop, emit, base_texts)


def _say_if_worse(position: Position, emit: Emit) -> None:
    if position.best_eval_loss is not None and position.best_eval_loss >= position.eval_losses[0][1]:
        base = position.eval_losses[0][1]
        emit(Warned(f"no evaluation was better than the base's {base:.4f}; the best was {position.best_eval_loss:.4f}"))


def make_learner(
    model: PreTrainedModel | PeftModel, prepared: Prepared, computation: Computation, world: World
) -> Learner:
    """What trains a model that is ready to be trained; all processes start from the main one's values."""
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


def write_origin(folder: RunFolder, prepared: Prepared, base: str | None = None) -> None:
    """config.yaml and environment.json: how the run is made. Resumed, it may have other versions and settings.

    Args:
        base: the fingerprint of the base's weights, where it is known.
    """
    write_text(folder.config_file, dump_config(prepared.config))
    write_json(folder.environment_file, _environment(prepared, base or base_fingerprint(prepared.config)))


def base_fingerprint(config: Config) -> str | None:
    """Of the base's weights where they lie in a folder; a model of the hub is told by its revision."""
    folder = Path(config.model.name_or_path).expanduser()
    return weights_fingerprint(folder) if folder.is_dir() else None


def _environment(prepared: Prepared, base: str | None) -> dict[str, Any]:
    return {
        **describe_environment(),
        "device": prepared.plan.engine.device,
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "engine": asdict(prepared.plan.engine),
        "fingerprints": {
            "base": base,
            "train": prepared.train.fingerprint,
            "validation": None if prepared.validation is None else prepared.validation.fingerprint,
            "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
        },
    }
