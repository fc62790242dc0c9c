"""Floating-point operations of one operator: matrix products and attention, in which nearly all of a step's time goes.

The formulas are PyTorch's own (`torch.utils.flop_counter`): two operations for each multiplication and addition.
Attention by documents, which it doesn't know in every release, is counted likewise: every document sees itself alone,
and as there the masked half counts as if it were computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {
    "aten::_flash_attention_forward": 2,
    "aten::_flash_attention_backward": 5,
    "lora_cli::flash4": 2,
    "lora_cli::flash4_back": 5,
}
"""Products of a document's length, its length and a head's size: scores and values, and five for their gradients."""


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of `func(*args, **kwargs)`; 0 for what is not a product."""
    products = _PRODUCTS.get(func.name().partition(".")[0])
    if products is not None:
        return _by_document(products, args)
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        try:
            return int(formula(*args, **kwargs, out_val=result))
        except AssertionError:  # some releases count no grouped heads
            return int(formula(*_ungrouped(args), **kwargs, out_val=result))
    if func is torch.ops.aten.linear.default:  # whole where a kernel that is itself an operator asks for it
        values, weight = args[:2]
        return 2 * int(values.numel()) * int(weight.shape[0])
    return 0


def _ungrouped(args: tuple[Any, ...]) -> list[Any]:
    """Arguments of an attention with as many heads of keys and values as of queries."""
    heads = max(arg.shape[1] for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4)
    return [
        arg.new_empty(arg.shape[0], heads, *arg.shape[2:]) if isinstance(arg, torch.Tensor) and arg.dim() == 4 else arg
        for arg in args
    ]


def _by_document(products: int, args: tuple[Any, ...]) -> int:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    query = next(tensor for tensor in tensors if tensor.dim() == 3)  # [T, H, E]
    total, heads, size = query.shape
    starts = next(tensor for tensor in tensors if tensor.dtype == torch.int32)
    # Lengths are values, which `meta` doesn't have: documents of a rehearsal are equally long, bar the last.
    return int(products * 2 * heads * size * total * total // max(1, starts.shape[0] - 1))
