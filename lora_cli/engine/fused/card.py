"""The fused arithmetic's passes on a CUDA card: memory is taken here, where a rehearsal on `meta` sees it too, and what
stands between products runs in one Triton kernel each.

Tensors are contiguous, in bfloat16 or float16, logits also in float32; scales and losses are float32. Dimension names:
T tokens, M model width, I intermediate width, H heads, E head size, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

DTYPES = (torch.bfloat16, torch.float16)
_FLAT = 1024
"""Values that one program of an elementwise kernel takes."""
_VOCABULARY = 8192
"""Logits that one program of the cross-entropy looks at together."""


@cache
def available() -> bool:
    """Whether Triton is installed, as it is with PyTorch's own CUDA builds on Linux."""
    return find_spec("triton") is not None


def rms_norm(x_TM: Tensor, weight_M: Tensor, eps: float, residual_TM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normed [T, M] and the scale [T, 1] that was used; x becomes x + residual first, where there is one."""
    normed, scale_T1 = torch.empty_like(x_TM), x_TM.new_empty(len(x_TM), 1, dtype=torch.float32)
    add = residual_TM is not None
    _run_rows("rms_norm", x_TM, residual_TM if add else x_TM, weight_M, normed, scale_T1, x_TM.shape[1], eps, ADD=add)
    return normed, scale_T1


def rms_norm_again(x_TM: Tensor, scale_T1: Tensor, weight_M: Tensor) -> Tensor:
    """The normed [T, M] once more."""
    normed = torch.empty_like(x_TM)
    _run_rows("rms_norm_again", x_TM, weight_M, normed, scale_T1, x_TM.shape[1])
    return normed


def rms_norm_back(grad_TM: Tensor, x_TM: Tensor, scale_T1: Tensor, weight_M: Tensor, more_TM: Tensor) -> Tensor:
    """The gradient of x plus `more_TM`, in the place of `grad_TM`; the weight is frozen."""
    _run_rows("rms_norm_back", grad_TM, x_TM, weight_M, scale_T1, more_TM, x_TM.shape[1])
    return grad_TM


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, back: bool = False) -> None:
    """Rotary positions in place, or with `back` what turns a gradient back."""
    tokens, heads, size = x_THE.shape
    blocks = {"HALF": size // 2, "HEADS": _power(heads), "BLOCK": _power(size // 2)}
    _launch("rotate", tokens, x_THE, cos_TE, sin_TE, heads, -1.0 if back else 1.0, **blocks, num_warps=4)


def gated(gate_TI: Tensor, up_TI: Tensor, activation: str) -> Tensor:
    """act(gate) * up, [T, I]."""
    out = torch.empty_like(gate_TI)
    _run_flat("gated", gate_TI, up_TI, out, activation=activation)
    return out


def gated_back(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    """In place: gate and up become their gradients, and `grad_TI` what `gated` gave."""
    _run_flat("gated_back", grad_TI, gate_TI, up_TI, activation=activation)
    for spent in (gate_TI, up_TI):
        torch.autograd.graph.increment_version(spent)  # a second way back has to fail, not to find gradients there


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """[C] losses, and the gradient of their sum in the dtype of the logits, in their place if nobody needs them."""
    grad_CV = logits_CV if in_place else torch.empty_like(logits_CV)
    losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
    vocabulary = logits_CV.shape[1]
    block = min(_VOCABULARY, _power(vocabulary))
    constants = {"VOCABULARY": vocabulary, "BLOCK": block, "num_warps": 16 if block > 2048 else 4}
    _launch("cross_entropy", len(logits_CV), logits_CV, targets_C, grad_CV, losses_C, **constants)
    return losses_C, grad_CV


def dense(packed: Tensor, state: QuantState) -> Tensor:
    """bitsandbytes' 4-bit weight as [O, I] of the dtype that it was quantized from: the same bits as its own kernels.

    Scales that are quantized themselves are unpacked on the way, and take no memory.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    packed = packed.view(torch.uint8).view(-1)
    nested = state.state2 if state.nested else None
    tables = (state.code, state.absmax) + (
        (state.code, state.absmax, state.absmax) if nested is None else (nested.code, nested.absmax, state.offset)
    )
    sizes = {"SIZE": state.blocksize, "SIZE_2": 0 if nested is None else nested.blocksize, "BLOCK": _FLAT}
    count = out.numel() // 2
    # Without joined multiplications and additions, which round once where bitsandbytes rounds twice.
    settings = {"num_warps": 4, "enable_fp_fusion": False}
    _launch("unpack_4_bits", -(-count // _FLAT), packed, *tables, out, count, **sizes, **settings)
    return out


def _run_rows(name: str, x_TM: Tensor, *given: Any, **constants: Any) -> None:
    block = _power(x_TM.shape[1])
    warps = min(16, max(4, block // 1024))
    _launch(name, len(x_TM), x_TM, *given, **constants, BLOCK=block, num_warps=warps)


def _run_flat(name: str, *given: Tensor, activation: str) -> None:
    count = given[0].numel()
    _launch(name, -(-count // _FLAT), *given, count, GELU=activation != "silu", BLOCK=_FLAT, num_warps=4)


def _launch(name: str, programs: int, *given: Any, **constants: Any) -> None:
    if given[0].is_meta or not programs:
        return
    assert all(each.is_contiguous() for each in given if isinstance(each, Tensor)), name
    from lora_cli.engine.fused import kernels

    getattr(kernels, name)[(programs,)](*given, **constants)


def _power(value: int) -> int:
    """The smallest power of two that isn't smaller."""
    return 1 << max(0, value - 1).bit_length()
