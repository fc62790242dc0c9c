"""Causal attention within each document, there and back, on rows of tokens [T, heads, head size].

Documents of about one length are taken together, each padded at its end to the longest of them: under causal attention
no token sees what comes after it, so that padding changes nothing, and a few large operations take the place of
hundreds of small ones. Short and very long documents go through PyTorch's flash kernel for the CPU; in between, blocks
of queries against all keys before them are faster as plain products, above all on the way back: all query heads of a
key head lie below each other in one product. 16 bits are computed in float32, because the flash kernel is several
times slower in bfloat16 on its way back.

Dimension names: D documents of a group, L tokens of each, H query heads, K key heads, G = H / K, E head size,
P tokens of all groups with their padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

aten = torch.ops.aten

BLOCK = 128
"""Queries of a block."""
PLAIN = range(192, 769)
"""Lengths for which plain products were measured to be faster; their weights [H, L, L] / 2 are kept."""
SHORTEST = 0.75
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
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """[T, H, E], and what `attend_back` needs."""
    plan = layout(tuple(lengths))
    gather = _on(query_THE.device, plan.gather)
    inputs = [t.index_select(0, gather).float() for t in (query_THE, key_TKE, value_TKE)]
    out_PHE = torch.empty_like(inputs[0])
    kept = [*inputs]
    for q, k, v, out in _groups(plan, (*inputs, out_PHE)):
        if q.shape[1] in PLAIN:
            kept += _plain(q, k, v, out, scale)
        else:
            result, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(
                *(t.transpose(1, 2) for t in (q, k, v)), 0.0, True, scale=scale
            )
            out.copy_(result.transpose(1, 2))
            kept.append(log_sums)
    return out_PHE.to(query_THE.dtype).index_select(0, _on(query_THE.device, plan.back)), kept


def attend_back(
    grad_THE: Tensor, out_THE: Tensor, kept: Sequence[Tensor], lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from those of `attend`'s output, that output and what it kept."""
    plan = layout(tuple(lengths))
    gather, back = _on(grad_THE.device, plan.gather), _on(grad_THE.device, plan.back)
    grad_PHE, out_PHE = (t.index_select(0, gather).float() for t in (grad_THE, out_THE))
    if len(plan.padding):
        grad_PHE.index_fill_(0, _on(grad_THE.device, plan.padding), 0.0)
    inputs, rest = kept[:3], iter(kept[3:])
    fresh = [torch.empty_like(t) for t in inputs]
    for grad, out, q, k, v, dq, dk, dv in _groups(plan, (grad_PHE, out_PHE, *inputs, *fresh)):
        if q.shape[1] in PLAIN:
            weights = [next(rest) for _ in range(0, q.shape[1], BLOCK)]
            _plain_back(grad, q, k, v, weights, scale, (dq, dk, dv))
            continue
        tensors = [t.transpose(1, 2) for t in (grad, q, k, v, out)]
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, next(rest), 0.0, True, scale=scale)
        for place, result in zip((dq, dk, dv), found, strict=True):
            place.copy_(result.transpose(1, 2))
    dq, dk, dv = (t.to(grad_THE.dtype).index_select(0, back) for t in fresh)
    return dq, dk, dv


def _on(device: torch.device, indices: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(indices).to(device)


def _groups(plan: Layout, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each group's part of each [P, heads, E] as [D, L, heads, E]."""
    start = 0
    for documents, length in plan.groups:
        end = start + documents * length
        yield [t[start:end].view(documents, length, *t.shape[1:]) for t in tensors]
        start = end


def _rows(x_DLHE: Tensor, key_heads: int) -> Tensor:
    """[D * K, L * G, E], contiguous: for each key head its query heads, token by token."""
    documents, length, heads, size = x_DLHE.shape
    split = x_DLHE.view(documents, length, key_heads, heads // key_heads, size)
    return split.transpose(1, 2).reshape(documents * key_heads, -1, size)


def _unrow(x_NRE: Tensor, into_DLHE: Tensor, key_heads: int) -> None:
    """The opposite of `_rows`."""
    documents, length, heads, size = into_DLHE.shape
    split = into_DLHE.view(documents, length, key_heads, heads // key_heads, size)
    split.copy_(x_NRE.view(documents, key_heads, length, heads // key_heads, size).transpose(1, 2))


def _plain(q_DLHE: Tensor, k_DLKE: Tensor, v_DLKE: Tensor, out_DLHE: Tensor, scale: float) -> list[Tensor]:
    """The output into `out_DLHE`; the weights [D * K, block * G, keys] of each block."""
    length, key_heads = k_DLKE.shape[1:3]
    groups = q_DLHE.shape[2] // key_heads
    q, k, v = (_rows(t, key_heads) for t in (q_DLHE, k_DLKE, v_DLKE))
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu_(1)
    weights, outputs = [], torch.empty_like(q)
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        rows = slice(start * groups, end * groups)
        scores = q.new_empty(q.shape[0], (end - start) * groups, end)
        torch.baddbmm(scores, q[:, rows], k[:, :end].transpose(1, 2), beta=0, alpha=scale, out=scores)
        own = scores.view(-1, end - start, groups, end)[..., start:]
        own.masked_fill_(future[: end - start, None, : end - start], float("-inf"))
        torch.softmax(scores, -1, out=scores)
        weights.append(scores)
        torch.bmm(scores, v[:, :end], out=outputs[:, rows])
    _unrow(outputs, out_DLHE, key_heads)
    return weights


def _plain_back(
    grad_DLHE: Tensor,
    q_DLHE: Tensor,
    k_DLKE: Tensor,
    v_DLKE: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    length, key_heads = k_DLKE.shape[1:3]
    groups = q_DLHE.shape[2] // key_heads
    g, q, k, v = (_rows(t, key_heads) for t in (grad_DLHE, q_DLHE, k_DLKE, v_DLKE))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, weight in zip(range(0, length, BLOCK), weights, strict=True):
        end = min(length, start + BLOCK)
        rows = slice(start * groups, end * groups)
        dv[:, :end].baddbmm_(weight.transpose(1, 2), g[:, rows])
        grad = torch.bmm(g[:, rows], v[:, :end].transpose(1, 2))
        grad = aten._softmax_backward_data(grad, weight, -1, torch.float32)
        dk[:, :end].baddbmm_(grad.transpose(1, 2), q[:, rows], alpha=scale)
        part = dq[:, rows]
        torch.baddbmm(part, grad, k[:, :end], beta=0, alpha=scale, out=part)
    for found, place in zip((dq, dk, dv), into, strict=True):
        _unrow(found, place, key_heads)
