"""The estimator against `lora train` as it was measured on a card: docs/measurements/cuda-h200.jsonl."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lora_cli.config import Config
from lora_cli.engine.memory.need import Rehearsals
from lora_cli.engine.memory.rehearsal import MicroBatches, rehearse
from lora_cli.engine.memory.replay import replay
from lora_cli.engine.selftest import prove_run
from lora_cli.engine.target import Target
from lora_cli.model.architecture import read_architecture

ROWS = Path(__file__).parents[3] / "docs" / "measurements" / "cuda-h200.jsonl"
LENGTHS = (2048, 1024, 512, 256, 128, 64, 32, 32)
"""Of the documents in each step of the bench."""
H200 = Target("cuda", (9, 0))


def llama_8b(folder: Path) -> None:
    """Llama 3.1 8B's shape, as the bench made it."""
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(**sizes, **heads, max_position_embeddings=8192, dtype="bfloat16").save_pretrained(folder)


@pytest.mark.parametrize(
    ("way", "flash4"),
    [
        *((way, False) for way in ("lora", "qlora-ckpt", "lora-ckpt-offload", "qlora-ckpt-offload")),
        *((way, True) for way in ("lora", "lora-ckpt")),
    ],
)
def test_an_8b_run_takes_what_was_predicted(way: str, flash4: bool, tmp_path: Path) -> None:
    rows = (json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines())
    measured = next(row for row in rows if row["way"] == way and ("flash-attn-4" in row["versions"]) == flash4)
    llama_8b(tmp_path)
    quantization = {"type": "nf4"} if way.startswith("qlora") else None
    config = Config.model_validate(
        {
            "model": {"name_or_path": str(tmp_path), "dtype": "bfloat16", "quantization": quantization},
            "data": {"train": "rows.jsonl", "max_length": 4096},
            "train": {
                "micro_batch_tokens": 4096,
                "gradient_checkpointing": "ckpt" in way,
                "activation_offloading": way.endswith("offload"),
            },
            "output_dir": "run",
        }
    )
    architecture = read_architecture(config.model)
    proof = replace(prove_run(config, architecture), flash4=flash4)
    computation = Rehearsals(architecture, proof).computation(config, H200)
    found = replay(rehearse(config, architecture, computation, H200, MicroBatches(LENGTHS, 1)))
    assert found.peak_allocated_bytes == pytest.approx(measured["peak_allocated_bytes"], rel=1e-3)
    # To 0.3 % under transformers 5.17, which was measured; others load in another order and leave other holes.
    assert found.peak_reserved_bytes == pytest.approx(measured["peak_reserved_bytes"], rel=0.03)
