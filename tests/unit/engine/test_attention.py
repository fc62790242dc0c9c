"""Compiled attention, on matrix tiles and on vector units: errors against float64 beside those of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lora_cli.engine.fused.native import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="needs a C compiler")


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def tiles(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether attention may run on matrix tiles."""
    kernels.attend_with_tiles(request.param)
    yield request.param and kernels.has_tiles()
    kernels.attend_with_tiles(True)


def attention(rows: torch.Tensor, grad: torch.Tensor, heads: kernels.Heads) -> list[torch.Tensor]:
    """What the kernels give: output, and the gradients of queries, keys and values."""
    out, log_sums = kernels.attend(rows, heads)
    return parted(out, kernels.attend_back(grad, out, log_sums, rows, heads), heads)


def plain(rows: torch.Tensor, grad: torch.Tensor, heads: kernels.Heads) -> list[torch.Tensor]:
    """The same by PyTorch, in the dtype of the rows."""
    rows = rows.clone().requires_grad_()
    found = []
    for document in rows.split(list(heads.lengths)):
        split = document.unflatten(1, (-1, heads.size)).transpose(0, 1).split((heads.query, heads.key, heads.key))
        query, key, value = (part[None] for part in split)
        one = scaled_dot_product_attention(query, key, value, is_causal=True, scale=heads.scale, enable_gqa=True)
        found.append(one[0].transpose(0, 1).flatten(1))
    out = torch.cat(found)
    return parted(out.detach(), torch.autograd.grad(out, rows, grad)[0], heads)


def parted(out: torch.Tensor, back: torch.Tensor, heads: kernels.Heads) -> list[torch.Tensor]:
    return [out, *back.split([count * heads.size for count in (heads.query, heads.key, heads.key)], dim=1)]


def example(heads: kernels.Heads, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a gradient; queries and keys are `size` times as large as values."""
    generator = torch.Generator().manual_seed(sum(heads.lengths))
    rows = torch.randn(sum(heads.lengths), (heads.query + 2 * heads.key) * heads.size, generator=generator)
    rows[:, : (heads.query + heads.key) * heads.size] *= size
    return rows, torch.randn(len(rows), heads.width, generator=generator)


def rms(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Of the errors, as shares of the rms of what is expected."""
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("lengths", [(17,) * 30, (64,) * 8, (131,) * 4, (512,), (700,), (33, 5, 128, 129, 2, 40)])
@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 3, 32), (8, 1, 96), (5, 5, 64)])
def test_float32_is_as_exact_on_tiles(shape: tuple[int, int, int], lengths: tuple[int, ...], size: int) -> None:
    """Products of three bfloat16 pieces lose no more than float32's own, whatever the size of the scores: at most what
    vector units lose, and about what PyTorch does, which sums keys' gradients in another order."""
    heads = kernels.Heads(*shape, shape[2] ** -0.5, lengths)
    rows, grad = example(heads, size)
    exact = plain(rows.double(), grad.double(), heads)
    errors = [rms(plain(rows, grad, heads), exact)]
    for allowed in (False, True):
        kernels.attend_with_tiles(allowed)
        errors.append(rms(attention(rows, grad, heads), exact))
    for torchs, vectors, tiles in zip(*errors, strict=True):
        assert vectors < 4 * torchs, errors
        assert tiles < 1.25 * vectors and tiles < 2 * torchs, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_alone_attends_to_itself(dtype: torch.dtype, tiles: bool) -> None:
    heads = kernels.Heads(4, 2, 64, 0.125, (1, 1, 1))
    rows, grad = (each.to(dtype) for each in example(heads, 8))
    out, query, key, value = attention(rows, grad, heads)
    assert torch.allclose(out, rows.unflatten(1, (-1, 64))[:, 6:].repeat_interleave(2, dim=1).flatten(1), rtol=1e-6)
    assert torch.allclose(value.float(), grad.view(3, 2, 2, 64).float().sum(dim=2).flatten(1), rtol=1e-2, atol=1e-6)
    assert max(float(each.abs().max()) for each in (query, key)) < (1e-4 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("lengths", [(17,), (131,), (33, 5, 128, 129, 2, 40)])
def test_bfloat16_rounds_once(lengths: tuple[int, ...], tiles: bool) -> None:
    heads = kernels.Heads(4, 2, 64, 0.125, lengths)
    rows, grad = (each.bfloat16() for each in example(heads, 1))
    assert max(rms(attention(rows, grad, heads), plain(rows.double(), grad.double(), heads))) < 4e-3


def test_what_is_no_number_stays_none_where_it_is(tiles: bool) -> None:
    heads = kernels.Heads(2, 1, 64, 0.125, (40,))
    rows, _ = example(heads, 1)
    rows[20, 0] = float("nan")
    out, _ = kernels.attend(rows, heads)
    assert out[20, :64].isnan().all() and out[:20].isfinite().all() and out[21:].isfinite().all()
