"""Checkpoints: the state at a step's boundary, as safetensors and JSON.

A checkpoint is written under a temporary name, flushed, given a manifest with the size and SHA-256 of each file, and
renamed: a folder of that name is complete, or it is not there. No pickle is written or read.

No generator's state is in it, on any process: the order of the rows is a function of seed, epoch and step, and dropout
is drawn anew in each step from seed, step and process.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_cli.engine.step import Learner
from lora_cli.errors import RunFolderError
from lora_cli.runs.atomic import settle, sync
from lora_cli.runs.folder import RunFolder
from lora_cli.train.disk import require_room, tensors_into
from lora_cli.train.position import Position

_PARAMETERS = "trainable.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"
_BESIDES_BYTES = 256 * 1024
"""Room for all that isn't tensors: headers, position, manifest."""


def save_checkpoint(folder: RunFolder, learner: Learner, position: Position, fingerprint: str) -> Path:
    """Write the state after `position.step`, complete or not at all."""
    target = folder.checkpoint(position.step)
    if target.exists():
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_state(temporary, learner, position, fingerprint)
        settle(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint helps nobody, and the disk may be full
        raise
    sync(target.parent)
    return target


def _write_state(folder: Path, learner: Learner, position: Position, fingerprint: str) -> None:
    parameters = {name: p.detach().contiguous() for name, p in learner.parameters.items()}
    tensors, scalars = _optimizer_state(learner)
    state = {
        "position": asdict(position),
        "fingerprint": fingerprint,
        "optimizer": scalars,
        "scheduler": _plain(learner.scheduler.state_dict()),
        "scaler": _plain(learner.scaler.state_dict()),
        "rng": "drawn anew in each step from seed, step and process; nothing to store",
    }
    require_room(folder, sum(t.nbytes for group in (parameters, tensors) for t in group.values()) + _BESIDES_BYTES)
    for content, name in ((parameters, _PARAMETERS), (tensors, _OPTIMIZER)):
        with tensors_into(folder / name):
            save_file(content, folder / name)
    (folder / _STATE).write_text(json.dumps(state, indent=1))
    manifest = {path.name: _facts(path) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def load_checkpoint(path: Path, learner: Learner) -> tuple[Position, str]:
    """Put a checkpoint's state into a learner; its position and the fingerprint of the data that it was made on.

    Raises:
        RunFolderError: the checkpoint belongs to a model with other trainable parameters, or to another version.
    """
    try:
        return _load(path, learner)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RunFolderError(
            f"{path} is whole, but isn't a checkpoint of this version: {error!r}",
            remedy="Go on with the version that environment.json names, or start anew with --output-dir.",
        ) from error


def _load(path: Path, learner: Learner) -> tuple[Position, str]:
    saved = load_file(path / _PARAMETERS)
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in learner.parameters.items()}:
        raise RunFolderError(f"{path} holds other trainable parameters than this config makes")
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            parameter.copy_(saved[name])
    state = json.loads((path / _STATE).read_text())
    _restore_optimizer(learner, load_file(path / _OPTIMIZER), state)
    learner.scheduler.load_state_dict(state["scheduler"])
    _reschedule(learner)
    learner.scaler.load_state_dict(state["scaler"])
    return Position(**state["position"]), state["fingerprint"]


def _reschedule(learner: Learner) -> None:
    """The learning rate of the next step by this run's schedule: one that was made longer has another."""
    scheduler = learner.scheduler
    assert isinstance(scheduler, LambdaLR), "transformers' schedules are functions of the step"
    rates = [base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def load_parameters(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put only a checkpoint's trained parameters into place: the best ones, at the end of a run."""
    saved = load_file(path / _PARAMETERS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def newest_checkpoint(folder: RunFolder, at_most: float = math.inf) -> Path | None:
    """The newest complete checkpoint up to a step, its files what the manifest says; None where there is none."""
    for step in reversed(folder.checkpoint_steps()):
        if step <= at_most and is_complete(folder.checkpoint(step)):
            return folder.checkpoint(step)
    return None


def is_complete(path: Path) -> bool:
    """Whether each file is there with the size and hash that the manifest gives it."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        return bool(manifest == {name: _facts(path / name) for name in (_OPTIMIZER, _STATE, _PARAMETERS)})
    except (OSError, ValueError):
        return False


def prune_checkpoints(folder: RunFolder, limit: int | None, best_step: int | None) -> None:
    """Keep the newest `limit` checkpoints, and the best one besides."""
    if limit is None:
        return
    steps = folder.checkpoint_steps()
    for step in steps[:-limit]:
        if step != best_step:
            path = folder.checkpoint(step)
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)  # a half-removed folder must not look like a checkpoint
            shutil.rmtree(doomed)


def remove_later_checkpoints(folder: RunFolder, step: int) -> None:
    """Remove what is left of steps that will be taken again: broken checkpoints, and half-written ones."""
    if not folder.checkpoints_dir.is_dir():
        return
    kept = {folder.checkpoint(s) for s in folder.checkpoint_steps() if s <= step}
    for path in folder.checkpoints_dir.iterdir():
        if path not in kept:
            shutil.rmtree(path)


def _optimizer_state(learner: Learner) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Optimizer state by parameter name: tensors, and what else there is (bitsandbytes counts steps as an int)."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in learner.parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # Clones: bitsandbytes shares one quantization map among all states, and safetensors refuses that.
                tensors[f"{name}::{key}"] = value.detach().clone().contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def _restore_optimizer(learner: Learner, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state["optimizer"].items()}
    for key, tensor in tensors.items():
        name, _, field_name = key.rpartition("::")
        by_name.setdefault(name, {})[field_name] = tensor
    names = {id(parameter): name for name, parameter in learner.parameters.items()}
    order = [names[id(p)] for group in learner.optimizer.param_groups for p in group["params"]]
    whole = learner.optimizer.state_dict()
    whole["state"] = {index: by_name[name] for index, name in enumerate(order) if name in by_name}
    learner.optimizer.load_state_dict(whole)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a state; a schedule's functions are made again from the config."""
    return {key: value for key, value in state.items() if isinstance(value, int | float | str | list | None)}


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
