"""Causal attention within each document, there and back, on rows of tokens [T, heads, head size].

On a CUDA card in 16 bits all of them are one call of a variable-length flash kernel, PyTorch's own or FlashAttention
4's (`flash4`). On a CPU documents of about one length are taken together, each padded at its end to the longest of
them: under causal attention no token sees what comes after it, so that padding changes nothing, and a few large
operations take the place of hundreds of small ones. PyTorch's flash kernel for the CPU does the rest, and takes grouped
heads as they are. 16 bits are computed in float32, because that kernel is several times slower in bfloat16 on its way
back.

Dimension names: D documents of a group, L tokens of each, H query heads, K key heads, E head size, P tokens of all
groups with their padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.engine.fused import flash4

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Documents:
    """Where documents lie in a row."""

    lengths: tuple[int, ...]
    starts: Tensor | None = None
    """[documents + 1], int32, where each begins and the last one ends: for a card."""
    window: int | None = None
    """How many tokens back, itself included, a token sees: on a card alone."""
    flash4: bool = False
    """Whether FlashAttention 4's kernels have been proven right there."""


SHORTEST = 0.85
"""Of a group's longest document: shorter ones begin another group."""


@dataclass(frozen=True)
class Layout:
    """Which documents are taken together."""

    groups: tuple[tuple[int, int], ...]
    """(D, L) of each."""
    gather: NDArray[np.int64]
    """[P]: the token in each place; where there is padding, the document's last one, which nobody looks at."""
    back: NDArray[np.int64]
    """[T]: the place of each token."""
    padding: NDArray[np.int64]
    """Places that hold no token of their own."""


@lru_cache(maxsize=64)
def layout(lengths: tuple[int, ...]) -> Layout:
    """Longest first, so that a group's first document is its longest."""
    starts = np.cumsum([0, *lengths])
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    members: list[list[int]] = []
    for index in order:
        if not members or lengths[index] < SHORTEST * lengths[members[-1][0]]:
            members.append([])
        members[-1].append(index)
    groups, gather, own = [], [], []
    for group in members:
        longest = lengths[group[0]]
        groups.append((len(group), longest))
        for index in group:
            places = np.arange(longest)
            gather.append(starts[index] + np.minimum(places, lengths[index] - 1))
            own.append(places < lengths[index])
    all_gather, all_own = np.concatenate(gather), np.concatenate(own)
    places = np.flatnonzero(all_own)
    back = np.empty(len(places), dtype=np.int64)
    back[all_gather[places]] = places
    return Layout(tuple(groups), all_gather, back, np.flatnonzero(~all_own))


def attend(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """[T, H, E], and what `attend_back` needs."""
    if query_THE.is_cuda:
        given = (query_THE, key_TKE, value_TKE)
        if _by_flash4(query_THE, documents):
            out, log_sums = flash4.flash4(*given, *_for_flash4(documents), scale)
            return out, [*given, log_sums]
        out, log_sums, seed, unused, _ = aten._flash_attention_forward(
            *given, *_on_card(documents), False, scale=scale, **_window(documents)
        )
        return out, [*given, log_sums, seed, unused]
    plan = layout(documents.lengths)
    gather = _on(query_THE.device, plan.gather)
    inputs = [t.index_select(0, gather).float() for t in (query_THE, key_TKE, value_TKE)]
    out_PHE = torch.empty_like(inputs[0])
    kept = [*inputs]
    for q, k, v, out in _groups(plan, (*inputs, out_PHE)):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        result, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, True, scale=scale)
        out.copy_(result.transpose(1, 2))
        kept.append(log_sums)
    return out_PHE.to(query_THE.dtype).index_select(0, _on(query_THE.device, plan.back)), kept


def attend_back(
    grad_THE: Tensor, out_THE: Tensor, kept: Sequence[Tensor], documents: Documents, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from those of `attend`'s output, that output and what it kept."""
    if grad_THE.is_cuda and _by_flash4(kept[0], documents):
        query, key, value, log_sums = kept
        return flash4.flash4_back(grad_THE, query, key, value, out_THE, log_sums, *_for_flash4(documents), scale)
    if grad_THE.is_cuda:
        *given, log_sums, seed, unused = kept
        about = (*_on_card(documents), seed, unused)
        found = aten._flash_attention_backward(
            grad_THE, *given, out_THE, log_sums, *about, scale=scale, **_window(documents)
        )
        return found[0], found[1], found[2]
    plan = layout(documents.lengths)
    gather, back = _on(grad_THE.device, plan.gather), _on(grad_THE.device, plan.back)
    grad_PHE, out_PHE = (t.index_select(0, gather).float() for t in (grad_THE, out_THE))
    if len(plan.padding):
        grad_PHE.index_fill_(0, _on(grad_THE.device, plan.padding), 0.0)
    inputs, rest = kept[:3], iter(kept[3:])
    fresh = [torch.empty_like(t) for t in inputs]
    for grad, out, q, k, v, dq, dk, dv in _groups(plan, (grad_PHE, out_PHE, *inputs, *fresh)):
        tensors = [t.transpose(1, 2) for t in (grad, q, k, v, out)]
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, next(rest), 0.0, True, scale=scale)
        for place, result in zip((dq, dk, dv), found, strict=True):
            place.copy_(result.transpose(1, 2))
    dq, dk, dv = (t.to(grad_THE.dtype).index_select(0, back) for t in fresh)
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """`attend` as one autograd node, for a model's own layers on a card."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
        out, kept = attend(query, key, value, documents, scale)
        ctx.documents, ctx.scale = documents, scale
        ctx.save_for_backward(out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, *kept = ctx.saved_tensors
        return (*attend_back(grad.contiguous(), out, kept, ctx.documents, ctx.scale), None, None)


def _on_card(documents: Documents) -> tuple[Any, ...]:
    """Where queries and keys begin, the longest of each, no dropout, and whether the mask is causal: as both ways take
    them."""
    assert documents.starts is not None
    longest = max(documents.lengths)
    return documents.starts, documents.starts, longest, longest, 0.0, documents.window is None


def _by_flash4(query_THE: Tensor, documents: Documents) -> bool:
    proven = documents.flash4 and flash4.pays(documents.lengths)
    return proven and flash4.takes(query_THE.shape[-1], query_THE.dtype, query_THE.device)


def _for_flash4(documents: Documents) -> tuple[Tensor, int, int | None]:
    assert documents.starts is not None
    return documents.starts, max(documents.lengths), documents.window


def _window(documents: Documents) -> dict[str, int]:
    """The kernel counts tokens to the left of the query, itself not included; 0 to the right is causal."""
    return {} if documents.window is None else {"window_size_left": documents.window - 1, "window_size_right": 0}


def _on(device: torch.device, indices: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(indices).to(device)


def _groups(plan: Layout, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each group's part of each [P, heads, E] as [D, L, heads, E]."""
    start = 0
    for documents, length in plan.groups:
        end = start + documents * length
        yield [t[start:end].view(documents, length, *t.shape[1:]) for t in tensors]
        start = end
