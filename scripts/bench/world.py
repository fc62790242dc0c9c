"""What every way of training gets: a random Llama with its own tokenizer, conversations, and the steps made of them.

Rows are as skewed as chat data are: a median of 70 tokens, a 90th percentile of 500, cut at 512; the last two fifths
are the answer. Words are invented and drawn by Zipf's law. Everything is a function of the seed.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEDIAN, NINTH_DECILE, LONGEST = 70, 500, 512
ROWS_PER_STEP = 16
LEARNING_RATE = 2e-4
SEED = 42
RANK, ALPHA = 16, 32

# The braces of `generation` mark what TRL trains; lora finds the same tokens by itself.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FRAME = 14
"""Tokens of a conversation's template, and what a turn's first word may take more without its space."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the data."""

    rows: int = 400
    hidden: int = 256
    intermediate: int = 688
    layers: int = 6
    heads: int = 4
    key_heads: int = 2
    vocabulary: int = 8000


@dataclass(frozen=True)
class Facts:
    """What the world came out as."""

    rows: int
    steps: int
    tokens: int
    supervised: int
    median: float
    parameters: int
    layer_parameters: int
    """Of the frozen linear layers that every token passes."""
    head_parameters: int

    @property
    def flops(self) -> int:
        """The least that must be multiplied in an epoch: 4 per parameter and token, the head where a loss is."""
        return 4 * (self.layer_parameters * self.tokens + self.head_parameters * self.supervised)


def make_world(folder: Path, shape: Shape) -> Facts:
    """Write model, tokenizer, `data/train.jsonl`, `steps.jsonl` and `facts.json` to `folder`."""
    vocabulary = write_conversations(folder, shape.rows, shape.vocabulary)
    parameters, in_layers, in_head = _write_model(folder / "model", shape, vocabulary)
    lengths, supervised, steps = _write_steps(folder, shape)
    facts = Facts(
        shape.rows, steps, sum(lengths), supervised, statistics.median(lengths), parameters, in_layers, in_head
    )
    (folder / "facts.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
    return facts


def write_conversations(folder: Path, count: int, vocabulary: int) -> int:
    """The tokenizer to `model`, and so many conversations to `data/train.jsonl`; how many tokens the tokenizer has."""
    draw = np.random.Generator(np.random.PCG64(SEED))
    words = _words(draw, vocabulary)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(folder / "model", words, vocabulary)
    sizes = [len(tokenizer(" " + word)["input_ids"]) for word in words]
    rows = [_conversation(draw, words, sizes) for _ in range(count)]
    with (folder / "data" / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return len(tokenizer)


def _words(draw: Generator, count: int) -> list[str]:
    letters = np.array(list("abcdefghijklmnoprstuvw"))
    return ["".join(draw.choice(letters, int(draw.integers(2, 9)))) for _ in range(count)]


def _conversation(draw: Generator, words: list[str], sizes: list[int]) -> dict[str, list[dict[str, str]]]:
    """A question and an answer that together have a log-normal number of tokens, and never lose the answer to a cut."""
    spread = np.log(NINTH_DECILE / MEDIAN) / statistics.NormalDist().inv_cdf(0.9)
    length = int(np.clip(np.exp(draw.normal(np.log(MEDIAN), spread)), 16, LONGEST)) - FRAME
    picked: list[str] = []
    while length > 0 or len(picked) < 2:
        number = min(int(draw.zipf(1.2)), len(words)) - 1
        length -= sizes[number]
        if length >= 0 or len(picked) < 2:
            picked.append(words[number])
    asked = max(len(picked) * 3 // 5, 1)
    return {
        "messages": [
            {"role": "user", "content": " ".join(picked[:asked])},
            {"role": "assistant", "content": " ".join(picked[asked:])},
        ]
    }


def _write_tokenizer(folder: Path, words: list[str], size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    common = [" ".join([word] * (1 + len(words) // (10 * place))) for place, word in enumerate(words, start=1)]
    tokenizer.train_from_iterator(["user\nassistant\n", *(" " + text for text in common)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def _write_model(folder: Path, shape: Shape, vocabulary: int) -> tuple[int, int, int]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(vocabulary, shape.vocabulary),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            max_position_embeddings=2 * LONGEST,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return model.num_parameters(), in_layers, model.lm_head.weight.numel()


def _write_steps(folder: Path, shape: Shape) -> tuple[list[int], int, int]:
    """`steps.jsonl`: for each step its rows as token ids and labels, in the order that lora takes them."""
    import torch

    from lora_cli.config import Config
    from lora_cli.data.order import step_examples
    from lora_cli.engine.planning import prepare

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepared = prepare(Config.model_validate(lora_settings(folder, "float32")), torch.device("cpu"), processes=1)
    examples = prepared.train
    lengths = [int(n) for n in examples.lengths]
    if len(examples) != shape.rows:  # a row that lora leaves out, others might train on
        raise RuntimeError(f"lora uses {len(examples)} of {shape.rows} rows: {prepared.plan.data}")
    with (folder / "steps.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, prepared.plan.steps.total + 1):
            indices = step_examples(step, seed=SEED, count=len(examples), batch_size=ROWS_PER_STEP, draw=examples.draw)
            rows = []
            for index in indices:
                row = examples.example(int(index))
                ids = row.input_ids.astype(np.int64)
                labels = np.where(row.trained, ids, -100)
                labels[0] = -100  # nothing predicts a row's first token
                rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
            file.write(json.dumps(rows) + "\n")
    return lengths, int(examples.supervised.sum()), prepared.plan.steps.total


def lora_settings(folder: Path, dtype: str, output: str = "lora") -> dict[str, object]:
    """lora's config as plain values."""
    return {
        "model": {"name_or_path": str(folder / "model"), "dtype": dtype},
        "adapter": {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
        "data": {"train": str(folder / "data" / "train.jsonl"), "max_length": LONGEST},
        "train": {
            "num_train_epochs": 1,
            "batch_size": ROWS_PER_STEP,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "seed": SEED,
        },
        "output_dir": str(folder / "runs" / output),
    }
