"""The compiled C on tensors: RMS norms, rotary positions, gated activations, attention by document, cross-entropy.

Tensors are of float32 or bfloat16, on the CPU, contiguous; what is written to may have longer rows. Raises MemoryError
where C found none.

Dimension names: T tokens, M model width, I intermediate width, H query heads, K key heads, E head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lora_cli.engine.fused.native.compiled import library
from lora_cli.engine.fused.pointwise import GELU_TANH, SILU, Activation

KINDS = {SILU: 0, GELU_TANH: 1}
"""Activations by their numbers in C."""
DTYPES = (torch.float32, torch.bfloat16)
_FLAG, _COUNT, _REAL, _PLACE = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "rms_norm": (_FLAG, *[_COUNT] * 2, *[_PLACE] * 3, _REAL, _PLACE, _COUNT),
    "rms_norm_back": (_FLAG, *[_COUNT] * 2, _PLACE, _COUNT, *[_PLACE] * 3, _REAL, _PLACE),
    "rotate": (_FLAG, *[_COUNT] * 3, _PLACE, _COUNT, *[_PLACE] * 2, _REAL),
    "gated": (_FLAG, _FLAG, *[_COUNT] * 2, *[_PLACE] * 2, _COUNT),
    "gated_back": (_FLAG, _FLAG, *[_COUNT] * 2, *[_PLACE] * 2, _COUNT),
    "cross_entropy": (_FLAG, *[_COUNT] * 2, *[_PLACE] * 3),
    "attend_with_tiles": (_FLAG,),
    "attend": (_FLAG, _COUNT, *[_PLACE] * 2, *[_COUNT] * 3, _PLACE, _COUNT, _REAL, _PLACE, _COUNT, _PLACE),
    "attend_back": (
        *(_FLAG, _COUNT, *[_PLACE] * 2, *[_COUNT] * 3, _PLACE, _COUNT, _REAL),
        *(_PLACE, _COUNT, _PLACE, _COUNT, *[_PLACE] * 2),
    ),
}

_FAILING = ("attend", "attend_back")
"""What asks for memory, and says 1 when there is none."""


@lru_cache(maxsize=1)
def _compiled() -> ctypes.CDLL:
    found = library()
    assert found is not None, "asked for after `available`"
    for name, types in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is not None:  # tiles are there only where the processor has them
            function.argtypes, function.restype = types, ctypes.c_int if name in _FAILING else None
    return found


def available() -> bool:
    """Whether there is a library to call, compiled if need be."""
    return library() is not None


def _half(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def rms_norm(
    x_TM: Tensor, weight_M: Tensor, eps: float, more_TM: Tensor | None = None, out_TM: Tensor | None = None
) -> Tensor:
    """The RMS norm of x, into `out_TM` when it is given; `more_TM` is added to x in place first."""
    out = torch.empty_like(x_TM) if out_TM is None else out_TM
    more = None if more_TM is None else more_TM.data_ptr()
    places = (x_TM.data_ptr(), more, weight_M.data_ptr())
    _compiled().rms_norm(_half(x_TM), *x_TM.shape, *places, eps, out.data_ptr(), out.stride(0))
    return out


def rms_norm_back(grad_TM: Tensor, x_TM: Tensor, weight_M: Tensor, residual_TM: Tensor, eps: float) -> Tensor:
    """The gradient of a norm's input plus `residual_TM`, from that of its output."""
    out_TM = torch.empty_like(x_TM)
    places = (grad_TM.data_ptr(), grad_TM.stride(0), x_TM.data_ptr(), weight_M.data_ptr(), residual_TM.data_ptr())
    _compiled().rms_norm_back(_half(x_TM), *x_TM.shape, *places, eps, out_TM.data_ptr())
    return out_TM


def rotate(rows_T: Tensor, heads: int, cos_TE: Tensor, sin_TE: Tensor, sign: float = 1.0) -> None:
    """Rotary positions in place on the first `heads` heads of each row; sign -1 turns back, which is the gradient."""
    places = (rows_T.data_ptr(), rows_T.shape[1], cos_TE.data_ptr(), sin_TE.data_ptr())
    _compiled().rotate(_half(rows_T), rows_T.shape[0], heads, cos_TE.shape[1], *places, sign)


def gated(gate_up: Tensor, activation: Activation, out_TI: Tensor | None = None) -> Tensor:
    """act(gate) * up, [T, I], from [T, 2 I], into `out_TI` when it is given."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out_TI is None else out_TI
    places = (gate_up.data_ptr(), out.data_ptr(), out.stride(0))
    _compiled().gated(_half(gate_up), KINDS[activation], rows, width, *places)
    return out


def gated_back(gate_up: Tensor, grad_TI: Tensor, activation: Activation) -> None:
    """In place: gate and up become their gradients, and the gradient of `gated`'s output becomes that output."""
    places = (gate_up.data_ptr(), grad_TI.data_ptr(), grad_TI.stride(0))
    _compiled().gated_back(_half(gate_up), KINDS[activation], *grad_TI.shape, *places)


def cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """[C] float32 losses; the gradient of their sum takes the place of the logits."""
    losses_C = torch.empty(len(logits_CV), dtype=torch.float32)
    places = (logits_CV.data_ptr(), targets_C.data_ptr(), losses_C.data_ptr())
    _compiled().cross_entropy(_half(logits_CV), *logits_CV.shape, *places)
    return losses_C


@dataclass(frozen=True)
class Heads:
    """How rows of queries, keys and values are made up, and the documents that they belong to."""

    query: int
    key: int
    size: int
    scale: float
    lengths: Sequence[int]

    @property
    def width(self) -> int:
        """Of a row's values, all heads."""
        return self.query * self.size

    def arguments(self, qkv: Tensor) -> tuple[object, ...]:
        order, starts = _places(tuple(self.lengths))
        documents = (len(order), order.ctypes.data, starts.ctypes.data)
        return (_half(qkv), *documents, self.query, self.key, self.size, qkv.data_ptr(), qkv.shape[1], self.scale)


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Documents from longest to shortest, which keeps all threads busy to the end, and where each begins."""
    order = np.argsort([-length for length in lengths], kind="stable")
    return order.astype(np.int64), np.cumsum([0, *lengths]).astype(np.int64)


def attend(qkv: Tensor, heads: Heads, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[T, H E], into `out` when it is given, and the logarithms of softmax's sums, [H, T] float32, from rows
    [T, (H + 2 K) E]. On matrix tiles they are to base 2: `attend_back` is to run the way that `attend` ran."""
    out = qkv.new_empty(len(qkv), heads.width) if out is None else out
    log_sums = torch.empty(heads.query, len(qkv), dtype=torch.float32)
    if _compiled().attend(*heads.arguments(qkv), out.data_ptr(), out.stride(0), log_sums.data_ptr()):
        raise MemoryError("attention: out of memory")
    return out, log_sums


def attend_back(grad: Tensor, out: Tensor, log_sums: Tensor, qkv: Tensor, heads: Heads) -> Tensor:
    """The gradient of qkv, from that of `attend`'s output, that output and its log-sums."""
    back = torch.empty_like(qkv)
    places = (out.data_ptr(), out.stride(0), grad.data_ptr(), grad.stride(0), log_sums.data_ptr(), back.data_ptr())
    if _compiled().attend_back(*heads.arguments(qkv), *places):
        raise MemoryError("attention: out of memory")
    return back


def attend_with_tiles(allowed: bool) -> None:
    """Whether attention takes matrix tiles where it may, as it does from the start; for tests of the other way."""
    _compiled().attend_with_tiles(int(allowed))


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 on matrix tiles that this process may use."""
    return available() and bool(_compiled().has_tiles())
