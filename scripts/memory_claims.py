"""Fill in the table of docs/memory.md with estimates: python scripts/memory_claims.py [--write]

Each line is one call of `estimate_vram`, on a config.json written here: Llama's architecture at the sizes of its
published models. Nothing is downloaded. With --write the page is changed in place, between its two marks.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.page import put_between

from lora_cli.config import Config
from lora_cli.estimate import Estimate, estimate_vram

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- estimates: python scripts/memory_claims.py --write -->", "<!-- end of estimates -->"
GIB = 2**30

LLAMAS: dict[str, dict[str, Any]] = {
    "Llama 2 7B": {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32},
    "Llama 3.1 8B": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "Llama 65B": {
        "vocab_size": 32_000,
        "hidden_size": 8192,
        "intermediate_size": 22_016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama 3.1 70B": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""As in the config.json of each; what isn't named has Llama's default."""


@dataclass(frozen=True)
class Line:
    model: str
    method: str
    length: int
    gpu: str = "a100-80gb"
    optimizer: str = "adamw_torch"
    checkpointing: bool = True
    offloading: bool = False


LINES = (
    *(Line("Llama 3.1 8B", method, length) for method in ("LoRA", "QLoRA") for length in (2048, 8192, 32_768)),
    *(Line("Llama 3.1 8B", "QLoRA", length, offloading=True) for length in (8192, 32_768, 131_072)),
    *(Line("Llama 3.1 70B", "QLoRA", length, "a6000-48gb") for length in (512, 2048, 4096)),
    Line("Llama 65B", "QLoRA", 512, "a6000-48gb"),
    Line("Llama 65B", "QLoRA", 512, "a6000-48gb", "paged_adamw_32bit"),
    Line("Llama 2 7B", "QLoRA", 512, "rtx-3060-12gb"),
    Line("Llama 2 7B", "QLoRA", 2048, "rtx-3060-12gb"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="change docs/memory.md")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    table = "\n".join(rows())
    if not write:
        print(table)
        return
    put_between(PAGE, BEGIN, END, table)


def rows() -> list[str]:
    found = [
        "| model | method | tokens | base weights | allocated | reserved | process | peak in | double quant. saves |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for line in LINES:
            estimate = estimated(line, Path(folder))
            twice = estimated(line, Path(folder), double_quant=True) if line.method == "QLoRA" else None
            method = line.method + (", paged AdamW" if line.optimizer.startswith("paged") else "")
            method += ", offloaded" if line.offloading else ""
            saves = gib(estimate.process_bytes - twice.process_bytes) if twice is not None else ""
            cells = [line.model, method, f"{line.length:,}", gib(estimate.base_bytes)]
            cells += [gib(estimate.peak_allocated_bytes), gib(estimate.peak_reserved_bytes)]
            cells += [gib(estimate.process_bytes), estimate.moment.split(",")[0], saves]
            found.append(f"| {' | '.join(cells)} |")
            print(found[-1], flush=True)
    return found


def estimated(line: Line, folder: Path, *, double_quant: bool = False) -> Estimate:
    config = config_of(line, folder, double_quant=double_quant)
    return estimate_vram(config, gpu=line.gpu, judge_others=False)


def config_of(line: Line, folder: Path, *, double_quant: bool = False) -> Config:
    """Rank 16 on all linear layers; one micro-batch of one longest example."""
    quantization = {"type": "nf4", "double_quant": double_quant} if line.method == "QLoRA" else None
    return Config.model_validate(
        {
            "model": {"name_or_path": str(model_folder(line.model, folder)), "quantization": quantization},
            "data": {"train": "rows.jsonl", "max_length": line.length},
            "train": {
                "micro_batch_tokens": line.length,
                "gradient_checkpointing": line.checkpointing,
                "activation_offloading": line.offloading,
                "optim": line.optimizer,
            },
            "output_dir": "run",
        }
    )


def model_folder(name: str, parent: Path) -> Path:
    """A folder that holds a config.json and nothing else."""
    from transformers import LlamaConfig

    folder = parent / name.replace(" ", "-").lower()
    if not folder.exists():
        LlamaConfig(max_position_embeddings=131_072, **LLAMAS[name]).save_pretrained(folder)
    return folder


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"


if __name__ == "__main__":
    main()
