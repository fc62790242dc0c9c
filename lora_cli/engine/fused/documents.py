"""Causal attention within each document, there and back, on rows of tokens [T, heads, head size].

Short and very long documents go through PyTorch's flash kernel for the CPU, which takes grouped heads as they are.
In between, blocks of queries against all keys before them are faster as plain products, above all on the way back:
all query heads of a key head lie below each other in one product.

Dimension names: L tokens of a document, H query heads, K key heads, G = H / K, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

aten = torch.ops.aten

BLOCK = 128
"""Queries of a block."""
PLAIN = range(192, 769)
"""Lengths for which plain products were measured to be faster; their weights [H, L, L] / 2 are kept."""


def attend(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, list[list[Tensor]]]:
    """[T, H, E], and what is kept of each document: the weights of each block, or the log-sums of the flash kernel.

    16 bits are computed in float32: the flash kernel for the CPU is several times slower in bfloat16 on its way back.
    """
    outputs, kept = [], []
    for q, k, v in _documents((query_THE, key_TKE, value_TKE), lengths):
        if q.shape[0] in PLAIN:
            out, weights = _plain(q, k, v, scale)
            kept.append(weights)
        else:
            result, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(
                _batch(q), _batch(k), _batch(v), 0.0, True, scale=scale
            )
            out = result[0].transpose(0, 1)
            kept.append([log_sums])
        outputs.append(out)
    return torch.cat(outputs).to(query_THE.dtype), kept


def attend_back(
    grad_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    kept: Sequence[Sequence[Tensor]],
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    found: tuple[list[Tensor], ...] = ([], [], [])
    pieces = _documents((grad_THE, query_THE, key_TKE, value_TKE, out_THE), lengths)
    for (grad, q, k, v, out), one in zip(pieces, kept, strict=True):
        if q.shape[0] in PLAIN:
            grads = _plain_back(grad, q, k, v, one, scale)
        else:
            batched = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _batch(grad), _batch(q), _batch(k), _batch(v), _batch(out), one[0], 0.0, True, scale=scale
            )
            grads = tuple(g[0].transpose(0, 1) for g in batched)
        for pile, result in zip(found, grads, strict=True):
            pile.append(result)
    dq, dk, dv = (torch.cat(pile).to(query_THE.dtype) for pile in found)
    return dq, dk, dv


def _documents(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """Each document's rows of each tensor, in float32."""
    return zip(*(t.float().split(list(lengths)) for t in tensors), strict=True)


def _batch(x_LHE: Tensor) -> Tensor:
    return x_LHE.transpose(0, 1).unsqueeze(0)


def _rows(x_LHE: Tensor, key_heads: int) -> Tensor:
    """[K, L * G, E], contiguous: for each key head its query heads, token by token."""
    length, heads, size = x_LHE.shape
    return x_LHE.view(length, key_heads, heads // key_heads, size).transpose(0, 1).reshape(key_heads, -1, size)


def _plain(q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
    length, heads, size = q_LHE.shape
    key_heads = k_LKE.shape[1]
    groups = heads // key_heads
    q, k, v = _rows(q_LHE, key_heads), _rows(k_LKE, key_heads), _rows(v_LKE, key_heads)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu_(1)
    weights, outputs = [], []
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        rows = slice(start * groups, end * groups)
        scores = q.new_empty(key_heads, (end - start) * groups, end)
        torch.baddbmm(scores, q[:, rows], k[:, :end].transpose(1, 2), beta=0, alpha=scale, out=scores)
        own = scores.view(key_heads, end - start, groups, end)[..., start:]
        own.masked_fill_(future[: end - start, None, : end - start], float("-inf"))
        torch.softmax(scores, -1, out=scores)
        weights.append(scores)
        outputs.append(torch.bmm(scores, v[:, :end]).view(key_heads, end - start, groups, size))
    return _tokens(torch.cat(outputs, dim=1)), weights


def _plain_back(
    grad_LHE: Tensor, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, weights: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    length, heads, size = q_LHE.shape
    key_heads = k_LKE.shape[1]
    groups = heads // key_heads
    g, q, k, v = (_rows(t, key_heads) for t in (grad_LHE, q_LHE, k_LKE, v_LKE))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, weight in zip(range(0, length, BLOCK), weights, strict=True):
        end = min(length, start + BLOCK)
        rows = slice(start * groups, end * groups)
        dv[:, :end].baddbmm_(weight.transpose(1, 2), g[:, rows])
        grad = torch.bmm(g[:, rows], v[:, :end].transpose(1, 2))
        grad = aten._softmax_backward_data(grad, weight, -1, torch.float32)
        dk[:, :end].baddbmm_(grad.transpose(1, 2), q[:, rows], alpha=scale)
        into = dq[:, rows]
        torch.baddbmm(into, grad, k[:, :end], beta=0, alpha=scale, out=into)
    return _tokens(dq.view(key_heads, length, groups, size)), dk.transpose(0, 1), dv.transpose(0, 1)


def _tokens(x_KLGE: Tensor) -> Tensor:
    """[L, H, E], the opposite of `_rows`; a view where there is one query head for each key head."""
    key_heads, length, groups, size = x_KLGE.shape
    return x_KLGE.transpose(0, 1).reshape(length, key_heads * groups, size)
