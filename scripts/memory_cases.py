"""The configurations that `measure_memory.py` measures: our own trainer on small random Llamas.

Methods (LoRA, NF4, full), three vocabularies, checkpointing on and off, 512 to 32,768 tokens, five optimizers, fused
layers, expandable segments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_cli.config import Config


@dataclass(frozen=True)
class Case:
    method: str = "lora"
    """`lora`, `nf4`, `nf4-double` or `full`."""
    vocab_size: int = 32_000
    checkpointing: bool = True
    tokens: int = 2048
    max_length: int = 1024
    optim: str = "adamw_torch"
    dtype: str = "bfloat16"
    layers: int = 8
    hidden_size: int = 1024
    per_step: int = 2
    """Micro-batches that an optimizer step accumulates."""
    fused: bool = False
    """`train.fused`."""
    expandable: bool = False
    """Under PyTorch's `expandable_segments`."""

    @property
    def id(self) -> str:
        checkpointing = "checkpointed" if self.checkpointing else "plain"
        size = f"{self.layers}x{self.hidden_size}"
        name = f"{self.method}-{self.vocab_size}-{checkpointing}-{self.tokens}-{self.optim}-{self.dtype}-{size}"
        return name + self.fused * "-fused" + self.expandable * "-expandable"

    @property
    def model(self) -> str:
        """A name that cases on the same weights share."""
        return f"{self.vocab_size}-{self.layers}x{self.hidden_size}-{self.dtype}"

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def cases() -> list[Case]:
    """The whole grid; ids are unique."""
    grid = [
        Case(method=method, vocab_size=vocab, checkpointing=checkpointing)
        for method in ("lora", "nf4", "full")
        for vocab in (32_000, 128_256, 262_144)
        for checkpointing in (True, False)
    ]
    lengths = [
        Case(method=method, checkpointing=checkpointing, tokens=tokens, max_length=min(tokens, 4096))
        for method in ("lora", "nf4")
        for checkpointing in (True, False)
        for tokens in (512, 8192, 32_768)
    ]
    optimizers = [
        Case(method=method, optim=optim)
        for method in ("lora", "full")
        for optim in ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
    ]
    others = [
        Case(method="nf4-double"),
        Case(method="nf4-double", checkpointing=False, tokens=8192),
        Case(dtype="float16"),
        Case(method="nf4", dtype="float16", checkpointing=False),
        Case(optim="sgd", method="full"),
        Case(layers=16, hidden_size=2048, tokens=4096),
        Case(layers=16, hidden_size=2048, tokens=4096, method="nf4"),
        Case(layers=16, hidden_size=2048, tokens=4096, method="full"),
    ]
    fused = [
        Case(fused=True),
        Case(checkpointing=False, fused=True),
        Case(tokens=8192, max_length=4096, fused=True),
        Case(checkpointing=False, tokens=8192, max_length=4096, fused=True),
        Case(method="nf4", fused=True),
        Case(method="nf4", checkpointing=False, tokens=8192, max_length=4096, fused=True),
    ]
    expandable = [
        Case(expandable=True),
        Case(method="nf4", expandable=True),
        Case(checkpointing=False, tokens=32_768, max_length=4096, expandable=True),
        Case(method="full", vocab_size=128_256, checkpointing=False, expandable=True),
    ]
    return [*grid, *lengths, *optimizers, *others, *fused, *expandable]


ALONE = (Case(), Case(method="nf4"), Case(method="full"))
"""Measured one after the other, so that what the whole card holds is what one process holds."""

EDGES = (Case(tokens=8192), Case(method="nf4", tokens=8192), Case(tokens=8192, checkpointing=False))
"""Around whose largest micro-batch on a part of the card the pairs lie."""

_TINY = Case(vocab_size=256, tokens=64, max_length=32, layers=2, hidden_size=64, dtype="float32")
DRY = (_TINY, replace(_TINY, checkpointing=False, fused=True), replace(_TINY, method="full"))
"""For a dry run on a CPU."""


def config_of(case: Case, folder: Path) -> Config:
    """The run of a case, on the model that lies in `folder`."""
    quantization = None
    if case.method.startswith("nf4"):
        quantization = {"type": "nf4", "double_quant": case.method == "nf4-double", "allow_partial": True}
    examples = max(1, case.tokens // case.max_length)
    return Config.model_validate(
        {
            "model": {"name_or_path": str(folder), "dtype": case.dtype, "quantization": quantization},
            **({"adapter": None} if case.method == "full" else {}),
            "data": {"train": "rows.jsonl", "max_length": case.max_length},
            "train": {
                "batch_size": examples * case.per_step,
                "micro_batch_tokens": case.tokens,
                "gradient_checkpointing": case.checkpointing,
                "optim": case.optim,
                "fused": case.fused,
            },
            "output_dir": "run",
        }
    )


def write_config(case: Case, folder: Path) -> None:
    """The config.json of a Llama of the case's size."""
    from transformers import LlamaConfig

    heads = max(2, case.hidden_size // 64)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        intermediate_size=case.hidden_size * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=32_768,
        dtype=case.dtype,
    )
    config.save_pretrained(folder)


def write_weights(folder: Path) -> None:
    """Safetensors beside a config.json: norms of ones, and everything else one run of normal values, again and again.

    Memory doesn't depend on values, and drawing a billion takes longer than all that is measured.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    dtype: torch.dtype = model.config.dtype
    some = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    tensors = {
        name: torch.ones(like.shape, dtype=dtype)
        if like.dim() == 1
        else some.repeat(-(-like.numel() // some.numel()))[: like.numel()].reshape(like.shape)
        for name, like in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
