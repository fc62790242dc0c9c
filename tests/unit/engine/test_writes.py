"""What a run will write, against what runs of that shape leave behind."""

from __future__ import annotations

import pytest

from lora_cli.config import load_config
from lora_cli.engine.writes import planned_writes
from lora_cli.plan import Steps


def planned(tmp_path, *overrides):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"model: {{name_or_path: gpt2}}\ndata: {{train: a.jsonl, validation: 0.5}}\noutput_dir: {tmp_path}/x/y\n"
    )
    steps = Steps(
        total=100, per_epoch=50, epochs=2.0, batch_size=8, warmup=3, learning_rate=1e-4, lr_scheduler_type="cosine"
    )
    return planned_writes(load_config(path, overrides), 1_000_000, steps)


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        ((), 1),
        (("train.save_steps=10",), 3),  # two are kept, and the third is whole before the first goes
        (("train.save_steps=10", "train.save_total_limit=null"), 10),
        (("train.save_steps=60",), 2),
        (("train.save_steps=10", "train.eval_steps=10", "train.load_best_model_at_end=true"), 4),
        (("train.save_minutes=5",), 2),
    ],
)
def test_the_most_that_lies_there_at_one_time(tmp_path, overrides, checkpoints):
    found = planned(tmp_path, *overrides)
    assert found.checkpoint_bytes == 12_000_000
    assert found.peak_bytes == checkpoints * 12_000_000 + 4_000_000
    assert found.free_bytes > 0 and not (tmp_path / "x").exists()


def test_optimizers_have_states_of_other_sizes(tmp_path):
    assert planned(tmp_path, "train.optim=sgd").checkpoint_bytes == 4_000_000
    assert planned(tmp_path, "train.optim=adamw_8bit").checkpoint_bytes == 6_000_000
