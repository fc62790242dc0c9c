"""What each of two processes runs in `test_step.py`; the first prints the losses as JSON."""

from __future__ import annotations

import json
import sys

import torch.distributed as dist

from lora_cli.engine.world import join_world
from tests.unit.engine.learning import engine_steps


def main() -> None:
    world = join_world()
    assert world.size == 2
    losses = {
        model_type: [[r.loss for r in engine_steps(model_type, tokens, world)] for tokens in (1, 64)]
        for model_type in sys.argv[1:]
    }
    if world.is_main:
        print(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
