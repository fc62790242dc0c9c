"""Causal attention within each document, there and back, on rows of tokens [T, heads, head size].

Short and very long documents go through PyTorch's flash kernel for the CPU, which takes grouped heads as they are.
In between, blocks of queries against all keys before them are faster as plain products, above all on the way back:
all query heads of a key head lie below each other in one product.

Dimension names: L tokens of a document, H query heads, K key heads, G = H / K, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten

BLOCK = 128
"""Queries of a block."""
PLAIN = range(192, 769)
"""Lengths for which plain products were measured to be faster; their weights [H, L, L] / 2 are kept."""


@dataclass
class Kept:
    """What one document keeps for the way back."""

    log_sums: Tensor | None
    """Of the flash kernel."""
    weights: list[Tensor]
    """[K, block * G, keys] of each block, where plain products were used."""


def attend(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, list[Kept]]:
    """[T, H, E], and what is kept of each document."""
    out_THE = torch.empty_like(query_THE)
    kept = []
    for q, k, v, out in zip(*(t.split(list(lengths)) for t in (query_THE, key_TKE, value_TKE, out_THE)), strict=True):
        if q.shape[0] in PLAIN and q.dtype == torch.float32:
            kept.append(Kept(None, _plain(q, k, v, out, scale)))
        else:
            result, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(
                _batch(q), _batch(k), _batch(v), 0.0, True, scale=scale
            )
            out.copy_(result[0].transpose(0, 1))
            kept.append(Kept(log_sums, []))
    return out_THE, kept


def attend_back(
    grad_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    kept: Sequence[Kept],
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    tensors = (grad_THE, query_THE, key_TKE, value_TKE, out_THE)
    fresh = tuple(torch.empty_like(t) for t in (query_THE, key_TKE, value_TKE))
    pieces = zip(*(t.split(list(lengths)) for t in (*tensors, *fresh)), kept, strict=True)
    for grad, q, k, v, out, dq, dk, dv, one in pieces:
        if one.log_sums is None:
            _plain_back(grad, q, k, v, one.weights, scale, (dq, dk, dv))
            continue
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _batch(grad), _batch(q), _batch(k), _batch(v), _batch(out), one.log_sums, 0.0, True, scale=scale
        )
        for place, found in zip((dq, dk, dv), grads, strict=True):
            place.copy_(found[0].transpose(0, 1))
    return fresh


def _batch(x_LHE: Tensor) -> Tensor:
    return x_LHE.transpose(0, 1).unsqueeze(0)


def _rows(x_LHE: Tensor, key_heads: int) -> Tensor:
    """[K, L * G, E], contiguous: for each key head its query heads, token by token."""
    length, heads, size = x_LHE.shape
    return x_LHE.view(length, key_heads, heads // key_heads, size).transpose(0, 1).reshape(key_heads, -1, size)


def _plain(q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, out_LHE: Tensor, scale: float) -> list[Tensor]:
    length, heads, size = q_LHE.shape
    key_heads = k_LKE.shape[1]
    groups = heads // key_heads
    q, k, v = _rows(q_LHE, key_heads), _rows(k_LKE, key_heads), _rows(v_LKE, key_heads)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu_(1)
    weights = []
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        rows = slice(start * groups, end * groups)
        scores = q.new_empty(key_heads, (end - start) * groups, end)
        torch.baddbmm(scores, q[:, rows], k[:, :end].transpose(1, 2), beta=0, alpha=scale, out=scores)
        own = scores.view(key_heads, end - start, groups, end)[..., start:]
        own.masked_fill_(future[: end - start, None, : end - start], float("-inf"))
        torch.softmax(scores, -1, out=scores)
        weights.append(scores)
        found = torch.bmm(scores, v[:, :end]).view(key_heads, end - start, groups, size)
        out_LHE[start:end].view(end - start, key_heads, groups, size).copy_(found.transpose(0, 1))
    return weights


def _plain_back(
    grad_LHE: Tensor,
    q_LHE: Tensor,
    k_LKE: Tensor,
    v_LKE: Tensor,
    weights: list[Tensor],
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    length, heads, size = q_LHE.shape
    key_heads = k_LKE.shape[1]
    groups = heads // key_heads
    g, q, k, v = (_rows(t, key_heads) for t in (grad_LHE, q_LHE, k_LKE, v_LKE))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for start, weight in zip(range(0, length, BLOCK), weights, strict=True):
        end = min(length, start + BLOCK)
        rows = slice(start * groups, end * groups)
        dv[:, :end].baddbmm_(weight.transpose(1, 2), g[:, rows])
        grad = torch.bmm(g[:, rows], v[:, :end].transpose(1, 2))
        grad = aten._softmax_backward_data(grad, weight, -1, torch.float32)
        dk[:, :end].baddbmm_(grad.transpose(1, 2), q[:, rows], alpha=scale)
        dq = torch.bmm(grad, k[:, :end]).mul_(scale).view(key_heads, end - start, groups, size)
        into[0][start:end].view(end - start, key_heads, groups, size).copy_(dq.transpose(0, 1))
    into[1].copy_(dk.transpose(0, 1))
    into[2].copy_(dv.transpose(0, 1))
