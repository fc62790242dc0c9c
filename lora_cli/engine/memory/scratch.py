"""Memory that CUDA kernels take and give back within one call, which no operator returns and `meta` doesn't show.

Every entry names the source file that it was read from. A library's workspace that stays is in `workspace_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.fused import flash4
from lora_cli.engine.target import Target

aten = torch.ops.aten

Sizes = Callable[[tuple[Any, ...]], list[int]]


def workspace_bytes(target: Target) -> int:
    """cuBLAS's workspace of one handle and stream, from PyTorch's allocator and kept for the process.

    `aten/src/ATen/cuda/CublasHandlePool.cpp`, parseChosenWorkspaceSize: 32 MiB from Hopper on (Blackwell since pull
    request 175344), else `:4096:2:16:8`, which is 8,320 KiB.
    """
    if target.kind == "cpu":
        return 0
    return 32 * 2**20 if target.capability >= (9, 0) else (4096 * 2 + 16 * 8) * 1024


LT_WORKSPACE_BYTES = 2**20
"""cuBLASLt's, likewise: same file, parseCUDABlasLtWorkspaceSize; getCUDABlasLtWorkspace keeps it apart."""

_CUBLAS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.addmv.default}
    | {aten.mm.out, aten.addmm.out, aten.addmm_.default}
    | {aten.dot.default, aten.vdot.default}
)


def libraries(func: Any, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The libraries whose workspace an operator asks for: taken when a thread first needs it, and kept.

    `aten/src/ATen/native/cuda/Blas.cpp`, addmm_out_cuda_impl: a product with a bias vector goes through cuBLASLt, whose
    handle is cuBLAS's.
    """
    if func is aten.linear.default:
        return ("cublas", "cublaslt") if len(args) > 2 and args[2] is not None else ("cublas",)
    if func not in _CUBLAS:
        return ()
    biased = func in (aten.addmm.default, aten.addmm.out) and args[0].dim() == 1
    return ("cublas", "cublaslt") if biased else ("cublas",)


class Scratch:
    """What the kernels of a target take within one call."""

    def __init__(self, target: Target) -> None:
        self._cuda = target.kind == "cuda"
        self._rules: dict[Any, Sizes] = _CUDA if self._cuda else {}

    def parts(self, func: Any) -> Callable[..., Any] | None:
        """What an operator consists of, where that is what has to be recorded."""
        return _PARTS.get(func) or (_PARTS_ON_CUDA.get(func) if self._cuda else None)

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


def _varlen_backward(args: tuple[Any, ...]) -> list[int]:
    """The same file, mha_varlen_bwd: 128 more rows a document, and keys and values expanded over grouped heads."""
    _, query, key, _, _, _, starts, *_ = args  # [T, H, E]
    total, heads, size = query.shape
    rows, wide = total + 128 * (starts.shape[0] - 1), -(-size // 32) * 32
    sizes = [heads * rows * 4, rows * heads * wide * 4]
    if key.shape[1] != heads:
        sizes += 2 * [key.shape[0] * heads * size * key.element_size()]
    return sizes


def _efficient_backward(args: tuple[Any, ...]) -> list[int]:
    """`aten/src/ATen/native/transformers/cuda/attention_backward.cu` and `mem_eff_attention/kernel_backward.h`.

    In float32 delta is a product that is summed (kKernelComputesDelta is for 16 bits); in 16 bits the kernel computes
    it, and adds up the queries' gradient in float32 tiles of 64 by 64 (kNeedsAccumGradQ).
    """
    grad = args[0]  # [B, H, L, E]
    batch, heads, length, size = grad.shape
    delta = batch * heads * length * 4
    if grad.dtype == torch.float32:
        return [grad.numel() * 4, delta, delta]
    return [delta, batch * heads * (-(-length // 64) * 64) * (-(-size // 64) * 64) * 4]


_CUDA: dict[Any, Sizes] = {
    aten._softmax_backward_data.default: _softmax_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._flash_attention_backward.default: _varlen_backward,
    torch.ops.lora_cli.flash4_back.default: flash4.scratch_bytes,
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
    """Add bitsandbytes' kernels, whose operators exist once it is imported."""
    import bitsandbytes  # noqa: F401

    _PARTS_ON_CUDA[torch.ops.bitsandbytes.gemm_4bit.default] = _gemm_4bit
    _PARTS_ON_CUDA[torch.ops.bitsandbytes.quantize_4bit.default] = _quantize_4bit


def _gemm_4bit(
    values: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """`bitsandbytes/backends/cuda/ops.py`, _dequant_linear_fallback: a product by the dequantized weight.

    Up to some hundred rows a fused kernel can take its place, which needs less.
    """
    alive: list[Tensor] = []  # until the call's end
    if absmax_8bit is not None and absmax_offset is not None:
        alive.append(torch.empty_like(absmax_8bit, dtype=torch.float32))
        alive.append(alive[0] + absmax_offset)
    alive.append(torch.empty(shape, dtype=values.dtype, device="meta"))
    return torch.nn.functional.linear(values, alive[-1], bias)


def _quantize_4bit(values: Tensor, blocksize: int, kind: str, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """`bitsandbytes/backends/cuda/ops.py`, quantize_4bit: scales first, then the packed weight."""
    count = values.numel()
    absmax = torch.empty(-(count // -blocksize), dtype=torch.float32, device="meta")
    return torch.empty(((count + 1) // (storage.itemsize * 2), 1), dtype=storage, device="meta"), absmax
