"""The device that a step is meant for: what PyTorch, transformers and this engine choose by device follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """A CPU, or a CUDA card of some architecture."""

    kind: Literal["cpu", "cuda"]
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA card: (8, 0) is an A100, (7, 5) a T4."""
    attention_kernel: Literal["auto", "efficient"] = "auto"
    """`efficient` where a program has asked PyTorch for that kernel of attention."""

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda", 0) if self.kind == "cuda" else torch.device("cpu")

    @property
    def native_bfloat16(self) -> bool:
        return self.kind == "cuda" and self.capability >= (8, 0)


CPU = Target("cpu")


def target_of(device: torch.device) -> Target:
    """The device at hand."""
    import torch

    return Target("cuda", torch.cuda.get_device_capability(device)) if device.type == "cuda" else CPU
