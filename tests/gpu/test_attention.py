"""Attention by document on CUDA: the variable-length kernel against one exact attention per document."""

from __future__ import annotations

import pytest
import torch

from lora_cli.engine.attention import document_attention

LENGTHS = (1, 7, 64, 130, 33)


def exact(query, key, value, scaling, window):
    """Per document, in float64 on the CPU, with the mask written out."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    start = 0
    for length in LENGTHS:
        q, k, v = (t[:, :, start : start + length].double().cpu() for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        row, column = torch.arange(length)[:, None], torch.arange(length)[None]
        hidden = (column > row) | (column <= row - (window or length + 1))
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(hidden, float("-inf"))
        outputs.append(torch.softmax(scores, -1) @ v)
        start += length
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_documents_see_themselves_alone(dtype, tolerance, key_heads, window):
    generator = torch.Generator("cuda").manual_seed(0)
    total = sum(LENGTHS)

    def draw(heads):
        return torch.randn(1, heads, total, 64, device="cuda", dtype=dtype, generator=generator).requires_grad_()

    query, key, value = draw(8), draw(key_heads), draw(key_heads)
    starts = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    module = torch.nn.Identity()
    output, _ = document_attention(
        module,
        query,
        key,
        value,
        None,
        scaling=0.125,
        sliding_window=window,
        document_lengths=LENGTHS,
        cu_seq_lens_q=starts,
    )
    expected = exact(query.detach(), key.detach(), value.detach(), 0.125, window)
    error = (output.detach().double().cpu() - expected).norm() / expected.norm()
    assert error < tolerance
    output.float().square().sum().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.any() for t in (query, key, value))
