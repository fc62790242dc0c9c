"""A tiny GPT-2, a few ragged conversations and a config that trains them on a CPU in a second or two."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from make_tiny_gpt2 import build_tiny_gpt2

VOLATILE = ("tokens_per_second", "peak_memory_bytes", "train_seconds", "output_dir", "adapter_dir")
"""What differs between two runs that are otherwise equal to the bit."""
_WORDS = "the rent is due on a day of may when we met at noon and it rained all over town".split()  # noqa: SIM905


def make_model(folder: Path) -> Path:
    """A GPT-2 of 40,000 random parameters, with tokenizer and chat template."""
    build_tiny_gpt2(folder, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    return folder


def make_llama(folder: Path, like: Path) -> Path:
    """A Llama of 30,000 random parameters, whose layers run fused, with tokenizer and chat template of `like`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(like)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """So many conversations of one to three turns, as JSON Lines."""
    random = Random(seed)

    def said(most: int) -> str:
        return " ".join(random.choices(_WORDS, k=random.randint(1, most)))

    def conversation() -> str:
        turns = range(random.randint(1, 3))
        pairs = [({"role": "user", "content": said(8)}, {"role": "assistant", "content": said(5)}) for _ in turns]
        return json.dumps({"messages": [message for pair in pairs for message in pair]}) + "\n"

    path.write_text("".join(conversation() for _ in range(count)), encoding="utf-8")
    return path


def write_config(path: Path, model: Path, rows: Path, output_dir: Path, /, **sections: dict[str, Any]) -> Path:
    """A small config, with settings of its sections changed."""
    config: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"train": str(rows), "max_length": 128, "cache": False},
        "train": {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 3},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    path.write_text(json.dumps({**config, "output_dir": str(output_dir)}, indent=1), encoding="utf-8")
    return path


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal in two runs: the adapter's bits, the metrics, the summary."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "adapter": hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "metrics": [stable(line) for line in lines(folder)],
        "summary": stable(summary),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def stable(values: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run."""
    return {key: value for key, value in values.items() if key not in VOLATILE}
