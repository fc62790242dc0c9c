"""The ways to train on a card: each a program that `watch` runs, in the order of their importance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from bench.cuda_world import Shape, lora_settings

HERE = Path(__file__).parent
PEER_IMPORTS = "torch,transformers,datasets,accelerate,transformers.models.llama.modeling_llama"
LORA_IMPORTS = f"{PEER_IMPORTS},lora_cli.train.run"


@dataclass(frozen=True)
class CudaWay:
    """One way to train."""

    name: str
    says: str
    """What it is, for the table."""
    tool: Literal["lora", "trl", "unsloth", "trainer"]
    base: Literal["bf16", "nf4"]
    checkpointing: bool
    options: tuple[str, ...] = ()
    """`key=value`: lora's settings; of the peers' program, its own."""
    ladder: tuple[int, ...] = ()
    """Lengths of single documents, instead of the world's rows, to see how long a one still trains."""

    @property
    def imports(self) -> str:
        """Modules that can be imported before the card is free: bitsandbytes, which PEFT imports, takes memory on it
        when it is imported, and so does Unsloth."""
        return {"lora": LORA_IMPORTS, "unsloth": ""}.get(self.tool, PEER_IMPORTS)

    def program(self, folder: Path, shape: Shape, steps: int) -> list[str]:
        """What `watch` runs."""
        return (_lora if self.tool == "lora" else _peer)(self, folder, shape, steps)

    def told(self, folder: Path, log: str) -> list[tuple[float, float | None]]:
        """Loss and tokens of each step as far as it came, in as many digits as it gives; None where it counts none."""
        if self.tool == "lora":
            file = folder / "runs" / self.name / "metrics.jsonl"
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            rows = [row for row in map(json.loads, lines) if "loss" in row]
            return [(row["loss"], row["num_tokens"]) for row in rows]
        rows = [json.loads(line) for line in log.splitlines() if line.startswith('{"step"')]
        so_far = [0.0, *(row["num_tokens"] or 0.0 for row in rows)]
        tokens = [after - before for before, after in pairwise(so_far)]
        return [(row["loss"], count or None) for row, count in zip(rows, tokens, strict=True)]


def _lora(way: CudaWay, folder: Path, shape: Shape, steps: int) -> list[str]:
    settings = lora_settings(folder, shape, way.ladder)
    settings["train"] |= {"gradient_checkpointing": way.checkpointing, "max_steps": steps}
    if way.base == "nf4":
        settings["model"]["quantization"] = {"type": "nf4"}
    settings["output_dir"] = str(folder / "runs" / way.name)
    config = folder / f"{way.name}.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    return ["-m", "lora_cli", "train", str(config), *(part for option in way.options for part in ("--set", option))]


def _peer(way: CudaWay, folder: Path, shape: Shape, steps: int) -> list[str]:
    settings: dict[str, Any] = {
        "tool": way.tool,
        "base": way.base,
        "checkpointing": way.checkpointing,
        "tokens": max(way.ladder, default=shape.tokens),
        "rows": "ladder-steps.jsonl" if way.ladder else "steps.jsonl",
        "steps": steps,
        "folder": str(folder),
        "output": str(folder / "runs" / way.name),
    } | dict(option.split("=", 1) for option in way.options)
    return [str(HERE / "cuda_peers.py"), json.dumps(settings)]


def _pair(
    tool: Literal["lora", "trl", "unsloth"], says: str, base: Literal["bf16", "nf4"], name: str, *options: str
) -> tuple[CudaWay, CudaWay]:
    """A way as it is, and with activations recomputed."""
    return (
        CudaWay(name, says, tool, base, False, options),
        CudaWay(f"{name}-ckpt", f"{says}, checkpointing", tool, base, True, options),
    )


_LORA, _LORA_CKPT = _pair("lora", "lora train", "bf16", "lora")
_QLORA, _QLORA_CKPT = _pair("lora", "lora train", "nf4", "qlora")
_UNFUSED, _UNFUSED_CKPT = _pair("lora", "lora train, train.fused: false", "bf16", "lora-unfused", "train.fused=false")
_UNFUSED_Q, _ = _pair("lora", "lora train, train.fused: false", "nf4", "qlora-unfused", "train.fused=false")
_TRL, _TRL_CKPT = _pair("trl", "TRL + Liger, packed", "bf16", "trl")
_TRL_Q, _TRL_Q_CKPT = _pair("trl", "TRL + Liger, packed", "nf4", "trl-qlora")
_TRL_WRAPPED, _ = _pair("trl", "TRL + Liger, packed across documents", "bf16", "trl-wrapped", "packing=wrapped")
_UNSLOTH, _UNSLOTH_CKPT = _pair("unsloth", "Unsloth, packed", "bf16", "unsloth")
_UNSLOTH_Q, _UNSLOTH_Q_CKPT = _pair("unsloth", "Unsloth, packed", "nf4", "unsloth-qlora")
_UNSLOTH_WRAPPED, _ = _pair("unsloth", "Unsloth, rows across documents", "bf16", "unsloth-wrapped", "packing=rows")
_HOST = ("lora train, checkpointing, activations on the host", "train.activation_offloading=true")
_AWAY = CudaWay("lora-ckpt-offload", _HOST[0], "lora", "bf16", True, _HOST[1:])
_AWAY_Q = CudaWay("qlora-ckpt-offload", _HOST[0], "lora", "nf4", True, _HOST[1:])
_TORCH = ("lora train, PyTorch's attention kernels", "train.flash_attention_4=false")
_FLASH2 = CudaWay("lora-flash2", _TORCH[0], "lora", "bf16", False, _TORCH[1:])
_TRAINER = CudaWay("trainer", "transformers' Trainer + PEFT", "trainer", "bf16", False)

CUDA_WAYS: Sequence[CudaWay] = (
    _LORA,
    _TRL,
    _QLORA,
    _UNSLOTH,
    _UNSLOTH_Q,
    _TRL_Q,
    _LORA_CKPT,
    _TRL_CKPT,
    _UNSLOTH_CKPT,
    _QLORA_CKPT,
    _AWAY,
    _AWAY_Q,
    _FLASH2,
    _UNFUSED,
    _TRL_WRAPPED,
    _UNSLOTH_WRAPPED,
    _TRL_Q_CKPT,
    _UNSLOTH_Q_CKPT,
    _UNFUSED_Q,
    _UNFUSED_CKPT,
    _TRAINER,
)


def climbers(ladder: tuple[int, ...], base: Literal["bf16", "nf4"]) -> list[CudaWay]:
    """The ways to train on one ever longer document a step, activations recomputed, by importance."""
    kept, moved = ("train.activation_offloading=false",), ("train.activation_offloading=true",)
    ways: tuple[tuple[str, str, Literal["lora", "trl", "unsloth"], tuple[str, ...]], ...] = (
        ("longest-lora", "lora train", "lora", kept),
        ("longest-lora-offload", "lora train, activations on the host", "lora", moved),
        ("longest-lora-flash2", f"{_TORCH[0]}, activations on the host", "lora", (*moved, *_TORCH[1:])),
        ("longest-unsloth", "Unsloth", "unsloth", ("packing=rows",)),
        ("longest-trl", "TRL + Liger", "trl", ("packing=rows",)),
    )
    return [CudaWay(name, says, tool, base, True, options, ladder) for name, says, tool, options in ways]


def chosen(ways: Sequence[CudaWay], names: str | None, without: Callable[[CudaWay], bool]) -> list[CudaWay]:
    """Those of these names in their order, `none` being no name, or all that can run."""
    known = {way.name: way for way in ways}
    if names is None:
        return [way for way in ways if not without(way)]
    if names == "none":
        return []
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"no such way: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]
