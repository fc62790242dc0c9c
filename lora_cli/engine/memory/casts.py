"""The casts of autocast, for tensors that no autocast kernel takes: those on `meta`.

The operators are those of `aten/src/ATen/autocast_mode.h` (CUDA) and `autocast_mode.cpp` (CPU), by the Python functions
that lead to them. As in PyTorch, the cast of a trainable float32 parameter is kept until autocast ends.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_BOTH_LOWER = {
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm),
    *(torch.bmm, Tensor.bmm, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.addbmm),
    *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.scaled_dot_product_attention),
}
_LOWER: dict[str, set[Any]] = {
    "cuda": _BOTH_LOWER | {torch.einsum, torch.mv, Tensor.mv, torch.addmv, torch.addr, torch.chain_matmul, F.prelu},
    "cpu": _BOTH_LOWER | {torch.linalg.vecdot},
}
# einsum on a CPU reaches bmm, which casts by itself.
_FLOAT: dict[str, set[Any]] = {
    "cuda": {
        *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.log1p, torch.expm1, torch.reciprocal, Tensor.reciprocal),
        *(torch.rsqrt, Tensor.rsqrt, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__, F.softplus, F.layer_norm),
        *(F.group_norm, F.rms_norm, F.cosine_similarity, F.nll_loss, F.kl_div, F.l1_loss, F.mse_loss, F.smooth_l1_loss),
        *(torch.logsumexp, Tensor.logsumexp, torch.layer_norm, torch.rms_norm, torch.norm, Tensor.norm, F.huber_loss),
        *(F.binary_cross_entropy_with_logits, torch.cdist, torch.dist, torch.renorm, torch.cosh, torch.sinh, torch.tan),
    },
    "cpu": {F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, torch.norm, Tensor.norm}
    | {torch.cdist, torch.renorm, torch.logsumexp, F.binary_cross_entropy_with_logits},
}
_FLOAT_UNLESS_DTYPE: dict[str, set[Any]] = {
    "cuda": {
        *(torch.softmax, Tensor.softmax, F.softmax, torch.log_softmax, Tensor.log_softmax, F.log_softmax),
        *(torch.cumsum, Tensor.cumsum, torch.cumprod, torch.sum, Tensor.sum, torch.prod, Tensor.prod),
        *(torch.linalg.vector_norm,),
    },
    "cpu": set(),
}
_LOSS = {F.cross_entropy}
"""Composed of log_softmax and nll_loss, which are cast."""


def cast_arguments(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: Literal["cpu", "cuda"],
    kept: dict[int, Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as autocast hands them on."""
    if func in _LOWER[kind]:
        dtype = torch.get_autocast_dtype(kind)
    elif (
        func in _FLOAT[kind]
        or (func in _LOSS and kind == "cuda")
        or (func in _FLOAT_UNLESS_DTYPE[kind] and kwargs.get("dtype") is None)
    ):
        dtype = torch.float32
    else:
        return args, kwargs

    def cast(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(cast(item) for item in value)
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point() or value.dtype == dtype:
            return value
        if value.dtype == torch.float64:
            return value
        keep = dtype != torch.float32 and value.dtype == torch.float32 and value.requires_grad and value.is_leaf
        if not keep:
            return value.to(dtype)
        if id(value) not in kept:
            kept[id(value)] = value.to(dtype)
        return kept[id(value)]

    return tuple(cast(a) for a in args), {name: cast(value) for name, value in kwargs.items()}
