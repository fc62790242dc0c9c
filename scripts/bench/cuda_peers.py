"""The peers on a card, each as its own guide shows it: TRL's SFTTrainer, Unsloth, transformers' Trainer with PEFT.

    python cuda_peers.py '{"tool": "trl", "base": "nf4", ...}'      settings as `cuda_ways` writes them

All get the token ids of the world's `steps.jsonl`. TRL and Unsloth pack the documents by themselves and draw their own
order; Trainer gets each step's documents as one row with restarting positions, in lora's order. What isn't set here is
as each tool has it by default. Prints `{"step": 1, "loss": ...}` for each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED, LEARNING_RATE, RANK, ALPHA = 42, 2e-4, 16, 32
Settings = dict[str, Any]


def main() -> None:
    """Train by the tool that is asked for."""
    settings = json.loads(sys.argv[1])
    {"trl": train_with_trl, "unsloth": train_with_unsloth, "trainer": train_with_trainer}[settings["tool"]](settings)


def documents(settings: Settings) -> list[list[list[int]]]:
    """Of each step, its documents' token ids."""
    lines = (Path(settings["folder"]) / settings["rows"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shared_arguments(settings: Settings) -> dict[str, Any]:
    """What every trainer of transformers' kind is told."""
    import torch

    return {
        "output_dir": settings["output"],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": settings["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": settings["checkpointing"],
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": SEED,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential" if settings["rows"] != "steps.jsonl" else "random",
        "use_cpu": not torch.cuda.is_available(),
    }


def reporter() -> Any:
    """A callback that prints a line for each step."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                told = {"step": state.global_step, "loss": float(logs["loss"]), "num_tokens": logs.get("num_tokens")}
                print(json.dumps(told), flush=True)

    return Reporter()


def nf4() -> Any:
    """QLoRA's quantization."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora_config() -> Any:
    """PEFT's, as lora's is."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEAR)


def packing_arguments(settings: Settings) -> dict[str, Any]:
    """TRL's, for rows of so many tokens; `packing` is its strategy, or `rows`, which are full already."""
    if settings.get("packing") == "rows":
        return {"max_length": settings["tokens"], "packing": False}
    return {"max_length": settings["tokens"], "packing": True, "packing_strategy": settings.get("packing", "bfd")}


def flat_dataset(settings: Settings) -> Any:
    """A row for each document, tokenized already; for `packing: rows` one for each step."""
    from datasets import Dataset

    steps = documents(settings)
    if settings.get("packing") == "rows":
        return Dataset.from_list([{"input_ids": [token for row in rows for token in row]} for rows in steps])
    return Dataset.from_list([{"input_ids": row} for rows in steps for row in rows])


def train_with_trl(settings: Settings) -> None:
    """SFTTrainer with packing and Liger's kernels, which need Triton and so a card."""
    import torch
    from trl import SFTConfig, SFTTrainer

    arguments = shared_arguments(settings) | packing_arguments(settings)
    attention = settings.get("attention", "sdpa")
    trainer = SFTTrainer(
        model=str(Path(settings["folder"]) / "model"),
        args=SFTConfig(
            **arguments,
            use_liger_kernel=torch.cuda.is_available(),
            model_init_kwargs={"dtype": "bfloat16", "attn_implementation": attention},
        ),
        train_dataset=flat_dataset(settings),
        peft_config=lora_config(),
        quantization_config=nf4() if settings["base"] == "nf4" else None,
        callbacks=[reporter()],
    )
    trainer.train()


def train_with_unsloth(settings: Settings) -> None:
    """FastLanguageModel and the SFTTrainer that Unsloth patches; it must be imported before all others."""
    from unsloth import FastLanguageModel  # isort: skip
    import torch
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(Path(settings["folder"]) / "model"),
        max_seq_length=settings["tokens"],
        dtype=torch.bfloat16,
        load_in_4bit=settings["base"] == "nf4",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=LINEAR,
        bias="none",
        use_gradient_checkpointing="unsloth" if settings["checkpointing"] else False,
        random_state=SEED,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**shared_arguments(settings), **packing_arguments(settings)),
        train_dataset=flat_dataset(settings),
        callbacks=[reporter()],
    )
    trainer.train()


def train_with_trainer(settings: Settings) -> None:
    """What the guides of PEFT and transformers show, on packed rows."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(
        Path(settings["folder"]) / "model",
        dtype=torch.bfloat16,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        **({"quantization_config": nf4()} if settings["base"] == "nf4" else {}),
    )
    model.config.use_cache = False
    rows = [
        {
            "input_ids": [token for document in step for token in document],
            "labels": [label for document in step for label in (-100, *document[1:])],
            "position_ids": [place for document in step for place in range(len(document))],
        }
        for step in documents(settings)
    ]
    arguments = TrainingArguments(**shared_arguments(settings) | {"train_sampling_strategy": "sequential"})
    trainer = Trainer(
        model=get_peft_model(model, lora_config()),
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        callbacks=[reporter()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
