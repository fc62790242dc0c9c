"""What a run will write, from its config: how large a checkpoint is, and how much lies on the disk at one time."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_cli.config import Config
from lora_cli.config.schema import TrainConfig
from lora_cli.plan import Steps, Writes

OPTIMIZER_BYTES = {"sgd": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
"""Bytes of optimizer state per trainable parameter; 8 where not named (two float32 moments)."""
_PARAMETER_BYTES = 4


def planned_writes(config: Config, trainable: int, steps: Steps) -> Writes:
    """What a run with so many trainable parameters writes into its `output_dir`, and what is free there now."""
    folder = Path(config.output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    train = config.train
    checkpoint_bytes = trainable * (_PARAMETER_BYTES + OPTIMIZER_BYTES.get(train.optim, 8))
    return Writes(
        output_dir=config.output_dir,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_every=_every(train),
        free_bytes=shutil.disk_usage(existing).free,
        peak_bytes=_most_checkpoints(train, steps) * checkpoint_bytes + trainable * _PARAMETER_BYTES,
    )


def _every(train: TrainConfig) -> str:
    if train.save_steps is not None:
        return f"every {train.save_steps:,} steps"
    if train.save_minutes is not None:
        return f"every {train.save_minutes:g} minutes"
    return "at the end"


def _most_checkpoints(train: TrainConfig, steps: Steps) -> int:
    """Checkpoints that lie there at one time: a new one is complete before an old one goes, and the best stays besides.

    How many `save_minutes` makes isn't known beforehand: two, where nothing limits them.
    """
    made = 2 if train.save_minutes is not None else 1
    if train.save_steps is not None:
        made = max(made, -(-steps.total // train.save_steps))
    best = int(train.load_best_model_at_end)
    return made + best if train.save_total_limit is None else min(made, train.save_total_limit + 1) + best
