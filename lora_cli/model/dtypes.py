"""The compute dtype of a run: what `model.dtype: auto` means on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float16 on CUDA, else float32.

    Trainable parameters stay float32 whatever this is: it is the dtype of frozen weights and of the arithmetic.
    """
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    # Public PyTorch has no question for this; its own CPU inductor asks the same one.
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
