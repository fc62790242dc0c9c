"""The Triton kernels in Triton's interpreter, on a CPU, in float32: the same programs that a card runs, one by one.

Sizes are no powers of two, so that what lies outside of a block would show. Run by `test_kernels`: Triton asks once,
when it is imported, whether it interprets.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from lora_cli.engine.fused import card, pointwise

TOKENS, WIDTH, HEADS, SIZE = 5, 100, 3, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_norm_there_and_back() -> None:
    x, residual, grad, more = (draw(TOKENS, WIDTH, seed=seed) for seed in range(4))
    weight, added = draw(WIDTH), x.clone()
    normed, scale = card.rms_norm(added, weight, 1e-5, residual)
    hidden = (x + residual).requires_grad_()
    expected = F.rms_norm(hidden, (WIDTH,), weight, 1e-5)
    torch.testing.assert_close(added, hidden.detach())
    torch.testing.assert_close(normed, expected.detach())
    torch.testing.assert_close(card.rms_norm_again(added, scale, weight), normed)
    (back,) = torch.autograd.grad(expected, hidden, grad)
    torch.testing.assert_close(card.rms_norm_back(grad, added, scale, weight, more), back + more)


def test_norm_leaves_its_input_alone_without_a_residual() -> None:
    x, weight = draw(TOKENS, WIDTH), draw(WIDTH)
    normed, _ = card.rms_norm(x, weight, 1e-5)
    assert torch.equal(x, draw(TOKENS, WIDTH))
    torch.testing.assert_close(normed, F.rms_norm(x, (WIDTH,), weight, 1e-5))


@pytest.mark.parametrize("back", [False, True])
def test_rotation_is_that_of_the_operations(back: bool) -> None:
    x, cos, sin = draw(TOKENS, HEADS, SIZE), draw(TOKENS, SIZE, seed=1), draw(TOKENS, SIZE, seed=2)
    expected = pointwise.rotate(x.clone(), cos, sin, back=back)
    card.rotate(x, cos, sin, back=back)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_activation_there_and_back(name: str) -> None:
    gate, up, grad = (draw(TOKENS, WIDTH * 3, seed=seed) for seed in range(3))
    own = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    expected = (F.silu(own[0]) if name == "silu" else F.gelu(own[0], approximate="tanh")) * own[1]
    torch.testing.assert_close(card.gated(gate, up, name), expected.detach())
    backs = torch.autograd.grad(expected, own, grad)
    card.gated_back(grad, gate, up, name)
    torch.testing.assert_close((grad, gate, up), (expected.detach(), *backs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_have_the_bits_that_bitsandbytes_gives(kind: str, nested: bool, dtype: torch.dtype) -> None:
    weight = draw(65, 192).to(dtype)
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    expected = dequantize_4bit(packed, state)
    found = card.dense(packed, state)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:  # the interpreter cuts where a card rounds
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    assert torch.equal(card.dense(packed.flatten().view(torch.float16), state), found)


@pytest.mark.parametrize("in_place", [False, True])
def test_cross_entropy_and_its_gradient(in_place: bool) -> None:
    logits, targets = draw(4, 10_000) * 3, torch.tensor([0, 5, 8192, 9_999])
    own = logits.clone().requires_grad_()
    expected = F.cross_entropy(own, targets, reduction="none")
    (back,) = torch.autograd.grad(expected.sum(), own)
    losses, grad = card.cross_entropy(logits, targets, in_place=in_place)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grad, back)
    assert (grad is logits) == in_place
