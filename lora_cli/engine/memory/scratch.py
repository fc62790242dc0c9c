"""Memory that CUDA kernels take and give back within one call, which no operator returns and `meta` doesn't show.

Every entry names the source file that it was read from. A library's workspace that stays is in `workspace_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.target import Target

aten = torch.ops.aten

Sizes = Callable[[tuple[Any, ...]], list[int]]


def workspace_bytes(target: Target) -> int:
    """cuBLAS's workspace of one handle and stream, from PyTorch's allocator and kept for the process.

    `aten/src/ATen/cuda/CublasHandlePool.cpp`, parseChosenWorkspaceSize: 32 MiB on Hopper and newer data-center
    architectures, else `:4096:2:16:8`, which is 8,320 KiB.
    """
    if target.kind == "cpu":
        return 0
    return 32 * 2**20 if target.capability[0] in (9, 10) else (4096 * 2 + 16 * 8) * 1024


class Scratch:
    """What the kernels of a target take within one call."""

    def __init__(self, target: Target) -> None:
        self._rules: dict[Any, Sizes] = _CUDA if target.kind == "cuda" else {}
        self.parts = {**_PARTS, **_PARTS_ON_CUDA} if target.kind == "cuda" else _PARTS
        """Operators to be recorded as what they consist of."""

    def sizes(self, func: Any, args: tuple[Any, ...]) -> list[int]:
        rule = self._rules.get(func)
        return [] if rule is None else rule(args)


def _softmax_backward(args: tuple[Any, ...]) -> list[int]:
    """`aten/src/ATen/native/cuda/SoftMax.cu`, softmax_backward_cuda_out: `Tensor tmp = grad * output`."""
    grad = args[0]
    return [grad.numel() * grad.element_size()]


def _flash_backward(args: tuple[Any, ...]) -> list[int]:
    """`aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`, mha_bwd: softmax_d and dq_accum in float32,
    over queries rounded up to 128 and head sizes to 32, and keys and values expanded over grouped heads."""
    _, query, key, *_ = args  # [B, H, L, E]
    batch, heads, length, size = query.shape
    rounded, wide = -(-length // 128) * 128, -(-size // 32) * 32
    sizes = [batch * heads * rounded * 4, batch * heads * rounded * wide * 4]
    if key.shape[1] != heads:
        sizes += 2 * [batch * heads * key.shape[2] * size * key.element_size()]
    return sizes


_CUDA: dict[Any, Sizes] = {
    aten._softmax_backward_data.default: _softmax_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}


def _grouped_mm(
    left: Tensor, right: Tensor, offsets: Tensor | None = None, bias: Tensor | None = None, dtype: Any = None
) -> Tensor:
    """Experts' products; its `meta` kernel knows bfloat16 alone."""
    if dtype is None and left.dtype != torch.bfloat16:
        groups = () if offsets is None or 3 in (left.dim(), right.dim()) else (offsets.shape[0],)
        return left.new_empty((*groups, *left.shape[:-1], right.shape[-1]))
    out: Tensor = aten._grouped_mm(left, right, offsets, bias, dtype)
    return out


_PARTS: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}
_PARTS_ON_CUDA: dict[Any, Callable[..., Any]] = {}
"""Operators whose kernel is itself a sequence of operators."""


def register_bitsandbytes() -> None:
    """Add bitsandbytes' kernels, whose operators exist once it is imported.

    `bitsandbytes/backends/cuda/ops.py`, gemm_4bit: from some hundred rows on it multiplies by the dequantized weight.
    """
    import bitsandbytes  # noqa: F401
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    _PARTS_ON_CUDA[torch.ops.bitsandbytes.gemm_4bit.default] = _gemm_4bit_default_impl
