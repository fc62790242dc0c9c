"""Where a resumed run begins, and who may clear away what came after."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_cli.engine.world import World
from lora_cli.report.events import ignore
from lora_cli.runs.folder import RunFolder
from lora_cli.train.resuming import start_position


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_process_that_holds_the_lock_removes_anything(rank: int, tmp_path: Path) -> None:
    """Under torchrun every process starts alike; two that clear one folder trip over each other, and the second would
    do so even where the first was refused because another run is writing there."""
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": 2.0})
    broken = folder.checkpoint(3)
    broken.mkdir(parents=True)
    prepared: Any = SimpleNamespace(plan=SimpleNamespace(engine=SimpleNamespace(micro_batch_tokens=64)))
    world = World(rank, 2, torch.device("cpu"), SimpleNamespace())  # type: ignore[arg-type]
    learner: Any = None  # nothing is loaded where there is no complete checkpoint

    position = start_position(folder, learner, prepared, world, True, ignore)

    assert position.step == 0
    assert broken.exists() is (rank == 1)
    assert bool(folder.read_metrics()) is (rank == 1)
