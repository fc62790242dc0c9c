"""A frozen linear head with its cross-entropy on matrix tiles, there and back in one compiled pass over its weight.

Neither logits [S, V] nor their gradient lie in memory. Sums are of float32; a bfloat16 head's logits aren't rounded.
Takes widths of whole tiles, on processors with tiles for bfloat16. Raises MemoryError where C found none.

Dimension names: S positions, M model width, V vocabulary.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli.engine.fused.native import kernels
from lora_cli.engine.fused.native.compiled import library

ROWS = 512
"""Positions that a thread takes through the weight at once: with fewer it is read more often, with more they don't stay
in a second-level cache."""
FEWEST = {torch.float32: 64, torch.bfloat16: 16}
"""Positions from which on it pays: each thread makes the weight ready anew, whatever it is multiplied by."""
WIDEST = 2048
"""M up to which it pays: beyond, a few columns of the weight fill a second-level cache."""
_PLACE, _COUNT = ctypes.c_void_p, ctypes.c_int64
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the largest value, as in `proof`."""
_PANEL = 128
"""Columns that C takes at once (head.c): all panels but the last are alike."""


def takes(weight_VM: Tensor, positions: int) -> bool:
    """Whether the kernel fits this weight, and pays for so many positions."""
    width, dtype = weight_VM.shape[1], weight_VM.dtype
    fits = weight_VM.device.type == "cpu" and dtype in FEWEST and weight_VM.is_contiguous() and width % 32 == 0
    return fits and width <= WIDEST and positions >= FEWEST[dtype] and kernels.has_tiles()


def losses(hidden_SM: Tensor, weight_VM: Tensor, bias_V: Tensor | None, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """[S] cross-entropies in float32, and the gradient of their sum with respect to the hidden states, in their dtype.

    All floats have one dtype, and everything is contiguous.
    """
    losses_S, grad_SM = torch.empty(len(hidden_SM), dtype=torch.float32), torch.empty_like(hidden_SM)
    bias = None if bias_V is None else bias_V.data_ptr()
    places = (hidden_SM.data_ptr(), weight_VM.data_ptr(), bias, targets_S.data_ptr())
    shape = (int(hidden_SM.dtype == torch.bfloat16), *hidden_SM.shape, len(weight_VM))
    if _function()(*shape, *places, ROWS, losses_S.data_ptr(), grad_SM.data_ptr()):
        raise MemoryError("the head: out of memory")
    return losses_S, grad_SM


@lru_cache(maxsize=1)
def _function() -> ctypes._NamedFuncPointer:
    found = library()
    assert found is not None, "asked for after `takes`"
    function = found.head_losses
    function.argtypes = (ctypes.c_int, *[_COUNT] * 3, *[_PLACE] * 4, _COUNT, *[_PLACE] * 2)
    function.restype = ctypes.c_int
    return function


@lru_cache(maxsize=8)
def holds(width: int, vocabulary: int, dtype: torch.dtype, biased: bool) -> bool:
    """Whether the kernel computes what PyTorch does, on random tokens and weights; of the vocabulary as many as make
    three panels, the last one cut off as the model's is."""
    columns = vocabulary if vocabulary <= 3 * _PANEL else 2 * _PANEL + 1 + (vocabulary - 1) % _PANEL
    generator = torch.Generator().manual_seed(17)
    hidden_SM, weight_VM, bias_V = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((70, width), (columns, width), (columns,))
    )
    weight_VM *= 4 * width**-0.5
    targets_S = torch.randint(columns, (70,), generator=generator)
    targets_S[:2] = torch.tensor([0, columns - 1])
    wide_SM = hidden_SM.float().requires_grad_()
    bias = bias_V if biased else None
    logits_SV = F.linear(wide_SM, weight_VM.float(), None if bias is None else bias.float())
    expected_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
    (expected_SM,) = torch.autograd.grad(expected_S.sum(), wide_SM)
    pairs = zip(losses(hidden_SM, weight_VM, bias, targets_S), (expected_S.detach(), expected_SM), strict=True)
    return all(
        bool((found.float() - expected).abs().max() <= _TOLERANCES[dtype] * expected.abs().max())
        for found, expected in pairs
    )
