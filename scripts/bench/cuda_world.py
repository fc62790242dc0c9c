"""What every way of training on a card gets: Llama-3.1-8B's shape with random bf16 weights, and rows that pack exactly.

The rows of a step are documents of 2,048, 1,024, 512, 256, 128, 64, 32 and 32 tokens: as skewed as chat data are, 4,096
tokens together, and so made that any packing fills its rows to the last token. They lie in the file where lora's order
finds them step by step. One word is one token.

    python -m bench.cuda_world FOLDER tiny|8b STEPS [LENGTH,LENGTH...]     also measures the card's best matrix product
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.cuda_weights import drawn_weight, write_safetensors
from bench.world import ALPHA, LEARNING_RATE, RANK, SEED

TOKENS_PER_STEP = 4096
DOCUMENTS = (2048, 1024, 512, 256, 128, 64, 32, 32)
WORDS = 8000
SHARDS = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are Llama 3.1 8B's."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128_256
    documents: tuple[int, ...] = DOCUMENTS
    """Lengths of the rows of a step, in tokens."""
    tied: bool = False
    """Whether the head is the embedding."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return sum(self.documents)

    @property
    def multiplied(self) -> int:
        """Parameters that each token is multiplied with: linear layers and head, the embedding not."""
        head_size = self.hidden // self.heads
        attention = self.hidden * head_size * (2 * self.heads + 2 * self.key_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocabulary


SHAPES = {
    "8b": Shape(),
    "tiny": Shape(32, 64, 2, 4, 2, 8192, (128, 64, 32, 32)),
}


def make_world(folder: Path, shape: Shape, steps: int) -> dict[str, float]:
    """Write model, tokenizer, `data/train.jsonl` and `steps.jsonl`; seconds by phase."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    write_tokenizer(folder / "model")
    write_rows(folder, shape, steps)
    seconds["rows"] = time.perf_counter() - began
    began = time.perf_counter()
    stamp, said = folder / "shape.json", json.dumps(asdict(shape))
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != said:  # of an earlier call
        write_model(folder / "model", shape)
    seconds["model"] = time.perf_counter() - began
    stamp.write_text(said, encoding="utf-8")
    return seconds


def write_tokenizer(folder: Path) -> None:
    """A word of the vocabulary is a token, whatever stands around it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|end|>", "<|pad|>", *(f"w{number}" for number in range(WORDS))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # words with a space between them
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(folder)


def write_rows(folder: Path, shape: Shape, steps: int) -> None:
    """`data/train.jsonl` in the order of the file, `steps.jsonl` with the token ids of each step in lora's order."""
    _write_documents(folder / "data" / "train.jsonl", folder / "steps.jsonl", [shape.documents] * steps)


def _write_documents(rows_file: Path, steps_file: Path, lengths: Sequence[Sequence[int]]) -> None:
    """Documents of these lengths, step by step; each step has as many."""
    from lora_cli.data.order import step_examples

    draw = np.random.Generator(np.random.PCG64(SEED))
    per_step = len(lengths[0])
    rows: list[list[int]] = [[] for _ in range(len(lengths) * per_step)]
    with steps_file.open("w", encoding="utf-8") as file:
        for step, each in enumerate(lengths, start=1):
            places = step_examples(step, seed=SEED, count=len(rows), batch_size=per_step)
            documents = [[*(int(n) for n in 2 + draw.integers(0, WORDS, length - 1)), 0] for length in each]
            for place, document in zip(places, documents, strict=True):
                rows[int(place)] = document
            file.write(json.dumps(documents) + "\n")
    with rows_file.open("w", encoding="utf-8") as file:
        for row in rows:  # the end is added by whoever tokenizes
            file.write(json.dumps({"text": " ".join(f"w{token - 2}" for token in row[:-1])}) + "\n")


def write_ladder(folder: Path, lengths: Sequence[int]) -> None:
    """The same for single documents that get longer from step to step: `data/ladder.jsonl`, `ladder-steps.jsonl`."""
    _write_documents(folder / "data" / "ladder.jsonl", folder / "ladder-steps.jsonl", [(n,) for n in lengths])


def write_model(folder: Path, shape: Shape, *, end: int = 0, padding: int = 1) -> None:
    """Config and safetensors files; normal weights of deviation 0.02, norms of 1, as transformers begins.

    Args:
        end, padding: token ids.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=padding,
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in LlamaForCausalLM(config).state_dict().items()}
    if shape.tied:
        del shapes["lm_head.weight"]
    write_safetensors(folder, shapes, drawn_weight, SHARDS)


def lora_settings(folder: Path, shape: Shape, ladder: Sequence[int] = ()) -> dict[str, Any]:
    """lora's config as plain values; a way adds what is its own."""
    longest = max(ladder, default=shape.tokens)
    return {
        "model": {"name_or_path": str(folder / "model"), "dtype": "bfloat16"},
        "adapter": {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
        "data": {
            "train": str(folder / "data" / ("ladder.jsonl" if ladder else "train.jsonl")),
            "max_length": longest,
            "cache": False,
        },
        "train": {
            "num_train_epochs": 1,
            "batch_size": 1 if ladder else len(shape.documents),
            "micro_batch_tokens": longest,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "seed": SEED,
        },
    }


def matmul_peak(size: int = 8192, rounds: int = 30) -> float:
    """The median of so many bf16 products of random square matrices on the card, in FLOPs per second; on a CPU 0."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        torch.mm(left, right)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        torch.mm(left, right)
        mark.record()
    torch.cuda.synchronize()
    took = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return float(2 * size**3 / (np.median(took) / 1000))


def main() -> None:
    """Measure the peak first, while the card holds nothing else; then make the world."""
    folder, shape, steps = Path(sys.argv[1]), SHAPES[sys.argv[2]], int(sys.argv[3])
    began = time.perf_counter()
    peak = matmul_peak()
    seconds = {"peak": time.perf_counter() - began} | make_world(folder, shape, steps)
    if len(sys.argv) > 4:
        write_ladder(folder, [int(length) for length in sys.argv[4].split(",")])
    (folder / "made.json").write_text(json.dumps({"matmul_peak_flops": peak, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main()
