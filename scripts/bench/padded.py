"""The peers that need no trainer of their own: transformers' Trainer with PEFT, and the loop that a tutorial writes.

    python padded.py trainer|loop FOLDER [STEPS]

Standing alone, it reads `steps.jsonl` of the bench's world, so that rows and their order are those of the other runs.
Prints one line of JSON for each step: `{"step": 1, "loss": ...}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

SEED, LEARNING_RATE, RANK, ALPHA, ROWS_PER_STEP = 42, 2e-4, 16, 32, 16
Row = dict[str, list[int]]


def main() -> None:
    """Train by the way that is asked for."""
    way, folder = sys.argv[1], Path(sys.argv[2])
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines[: int(sys.argv[3]) if len(sys.argv) > 3 else None]]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).requires_grad_(False)
    model.config.use_cache = False
    torch.manual_seed(SEED)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )
    (train_with_trainer if way == "trainer" else train_in_a_loop)(adapted, steps, folder)


def pad(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": (0, "input_ids"), "labels": (-100, "labels")}
    batch = {
        name: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])
        for name, (fill, key) in padded.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def report(step: int, loss: float) -> None:
    """What the bench reads, and takes the time of."""
    print(json.dumps({"step": step, "loss": loss}), flush=True)


def train_in_a_loop(model: Any, steps: list[list[Row]], folder: Path) -> None:
    """Padded rows, all logits, the model's own loss, AdamW."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    for number, rows in enumerate(steps, start=1):
        loss = model(**pad(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(number, loss.item())
    model.save_pretrained(folder / "runs" / "loop")


class Reporter(TrainerCallback):
    """A line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            report(state.global_step, logs["loss"])


class InOrder(Trainer):
    """The rows come in the order that they have."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(cast(Any, self.train_dataset))


def train_with_trainer(model: Any, steps: list[list[Row]], folder: Path) -> None:
    """What the guides of PEFT and transformers show."""
    arguments = TrainingArguments(
        output_dir=str(folder / "runs" / "trainer"),
        per_device_train_batch_size=ROWS_PER_STEP,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=SEED,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [row for step in steps for row in step]
    InOrder(model=model, args=arguments, train_dataset=rows, data_collator=pad, callbacks=[Reporter()]).train()
    model.save_pretrained(folder / "runs" / "trainer")


if __name__ == "__main__":
    main()
