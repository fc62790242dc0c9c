"""What stands between products: RMS norms, rotary positions, gated activations; each way there and back.

In place wherever a buffer is ours. PyTorch's operations on a CPU; on a CUDA card one kernel each (`card`). Dimension
names: T tokens, M model width, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.engine.fused import card

aten = torch.ops.aten


def normalize(x_TM: Tensor, weight_M: Tensor, eps: float, residual_TM: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The RMS norm of x, and the scale that was used; x becomes x + residual first, where there is one."""
    if x_TM.is_cuda:
        return card.rms_norm(x_TM, weight_M, eps, residual_TM)
    if residual_TM is not None:
        x_TM.add_(residual_TM)
    scale_T1 = rms_scale(x_TM, eps)
    return rms_norm(x_TM, scale_T1, weight_M), scale_T1


def rms_scale(x_TM: Tensor, eps: float) -> Tensor:
    """[T, 1] float32: 1 / sqrt(mean of squares + eps)."""
    norm: Tensor = torch.linalg.vector_norm(x_TM, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x_TM.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x_TM: Tensor, scale_T1: Tensor, weight_M: Tensor) -> Tensor:
    """x * scale, rounded to the dtype of `x` as transformers does, times the weight."""
    if x_TM.is_cuda:
        return card.rms_norm_again(x_TM, scale_T1, weight_M)
    return torch.mul(x_TM, scale_T1).to(x_TM.dtype).mul_(weight_M)


def rms_norm_back(grad_TM: Tensor, x_TM: Tensor, scale_T1: Tensor, weight_M: Tensor, more_TM: Tensor) -> Tensor:
    """The gradient of x plus `more_TM`, in the place of `grad_TM`, which is spent; the weight is frozen."""
    if x_TM.is_cuda:
        return card.rms_norm_back(grad_TM, x_TM, scale_T1, weight_M, more_TM)
    g_TM = grad_TM.mul_(weight_M)
    dot_T1 = (g_TM * x_TM).sum(-1, keepdim=True, dtype=torch.float32)
    back_T1 = dot_T1.mul_(scale_T1.pow(3)).div_(x_TM.shape[-1])
    if x_TM.dtype == torch.float32:
        return g_TM.mul_(scale_T1).addcmul_(x_TM, back_T1, value=-1).add_(more_TM)
    return g_TM.mul_(scale_T1.to(x_TM.dtype)).addcmul_(x_TM, back_T1.to(x_TM.dtype), value=-1).add_(more_TM)


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, back: bool = False) -> Tensor:
    """Rotary positions in place, halves paired: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    `back` turns the other way, which is the gradient.
    """
    if x_THE.is_cuda:
        card.rotate(x_THE, cos_TE, sin_TE, back=back)
        return x_THE
    cos_T1E, sin_T1E = cos_TE[:, None], (-sin_TE if back else sin_TE)[:, None]
    half = x_THE.shape[-1] // 2
    first, second = x_THE[..., :half], x_THE[..., half:]
    kept = first.clone()
    first.mul_(cos_T1E[..., :half]).addcmul_(second, sin_T1E[..., :half], value=-1)
    second.mul_(cos_T1E[..., half:]).addcmul_(kept, sin_T1E[..., half:])
    return x_THE


@dataclass(frozen=True)
class Activation:
    """An activation and its derivative, in place where they can be."""

    name: str
    there: Callable[[Tensor], Tensor]
    """A fresh tensor."""
    back: Callable[[Tensor, Tensor], Tensor]
    """(gradient, input) to the input's gradient, in the gradient's place."""


def _silu_back(grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = aten.silu_backward.grad_input(grad, x, grad_input=grad)
    return result


def _gelu_tanh_back(grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
    return result


SILU = Activation("silu", torch.nn.functional.silu, _silu_back)
GELU_TANH = Activation("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"), _gelu_tanh_back)
