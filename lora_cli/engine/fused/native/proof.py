"""Do the compiled kernels compute what plain PyTorch does, at the sizes of the model that is to be trained?

A compiler may be broken, and sizes take paths of their own through the kernels. So each is tried on random tokens
against `pointwise` and `documents`, in float32 and in the dtype of the run, before the layer made of them is
(`engine.selftest`). Takes a few hundredths of a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_cli.engine.distance import distance
from lora_cli.engine.fused import documents, pointwise
from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.gated import GatedBlock
from lora_cli.engine.fused.layer import DecoderLayer, FusedLayer, Norm
from lora_cli.engine.fused.linear import Adapted
from lora_cli.engine.fused.native import kernels, tiled
from lora_cli.engine.fused.native.tiled import TiledLayer
from lora_cli.engine.fused.pointwise import SILU, Activation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the largest value. A bfloat16 has eight bits; each kernel rounds once what PyTorch rounds a few times."""
_LAYER_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""The same of a whole layer's results, which add up a few roundings."""

_LENGTHS = (131, 70, 1, 17, 64)
"""Documents within a block, of a whole one, and of more than two."""
_EPS, _RANK = 1e-5, 5


@dataclass(frozen=True)
class Sizes:
    """Of a model's layers."""

    query_heads: int
    key_heads: int
    head: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes | None:
        """Those that a config names as Llama's does; None for another."""
        text = vars(config.get_text_config())
        names = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size")
        heads, keys, hidden, *rest = (text.get(name) for name in names)
        found = (heads, keys or heads, text.get("head_dim") or (hidden // heads if heads and hidden else None))
        values = [value for value in (*found, hidden, *rest) if isinstance(value, int) and value > 0]
        return cls(*values) if len(values) == 6 and values[0] % values[1] == 0 else None


def holds(sizes: Sizes, dtype: torch.dtype) -> bool:
    """Whether every kernel is right at these sizes. At most one group of heads is tried: all are alike."""
    if dtype not in TOLERANCES:
        return False
    return all(
        distance(found, expected) <= TOLERANCES[kind]
        for kind in {torch.float32, dtype}
        for found, expected in (
            *(*_attention(sizes, kind), *_norms(sizes, kind)),
            *(*_gates(sizes, kind), *_losses(sizes, kind)),
        )
    ) and all(
        distance(found, expected) <= _LAYER_TOLERANCES[kind]
        for kind in {torch.float32, dtype}
        for found, expected in _layer(sizes, kind)
    )


def _random(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _attention(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    query, key, tokens = sizes.query_heads // sizes.key_heads, 1, sum(_LENGTHS)
    heads = kernels.Heads(query, key, sizes.head, sizes.head**-0.5, _LENGTHS)
    rows = _random(dtype, 1, tokens, (query + 2 * key) * sizes.head)
    cos, sin = _random(dtype, 2, tokens, sizes.head), _random(dtype, 3, tokens, sizes.head)
    split = [t.contiguous() for t in rows.unflatten(1, (-1, sizes.head)).float().split((query, key, key), dim=1)]
    turned = rows.clone()
    kernels.rotate(turned, query + key, cos, sin)
    for part in split[:2]:
        pointwise.rotate(part, cos.float(), sin.float())
    yield turned, torch.cat(split, dim=1).flatten(1)
    out, log_sums = kernels.attend(rows, heads)
    split = [t.contiguous() for t in rows.unflatten(1, (-1, sizes.head)).float().split((query, key, key), dim=1)]
    expected, kept = documents.attend(split[0], split[1], split[2], Documents(_LENGTHS), heads.scale)
    yield out, expected.flatten(1)
    grad = _random(dtype, 4, tokens, heads.width)
    back = kernels.attend_back(grad, out, log_sums, rows, heads).unflatten(1, (-1, sizes.head))
    grads = documents.attend_back(grad.float().view_as(expected), expected, kept, Documents(_LENGTHS), heads.scale)
    yield from zip(back.split((query, key, key), dim=1), grads, strict=True)


def _norms(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    x, more, grad = (_random(dtype, seed, 9, sizes.hidden) for seed in (5, 6, 7))
    weight, added = _random(dtype, 8, sizes.hidden), x.clone()
    normed = kernels.rms_norm(added, weight, _EPS, more)
    yield added, x.float() + more.float()
    scale = pointwise.rms_scale(added, _EPS)
    yield normed, pointwise.rms_norm(added.float(), scale, weight.float())
    back = kernels.rms_norm_back(grad.clone(), added, weight, more, _EPS)
    yield back, pointwise.rms_norm_back(grad.float(), added.float(), scale, weight.float(), more.float())


def _gates(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for activation in kernels.KINDS:
        rows, grad = _random(dtype, 9, 9, 2 * sizes.intermediate) * 4, _random(dtype, 10, 9, sizes.intermediate)
        gate, up = rows.float().split(sizes.intermediate, dim=1)
        expected = activation.there(gate) * up
        yield kernels.gated(rows, activation), expected
        yield from _gates_back(rows.clone(), grad.clone(), activation, gate, up, expected)


def _gates_back(
    rows: Tensor, grad: Tensor, activation: Activation, gate: Tensor, up: Tensor, expected: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    grad_gate = activation.back(grad.float() * up, gate)
    grad_up = activation.there(gate) * grad.float()
    kernels.gated_back(rows, grad, activation)
    yield rows, torch.cat([grad_gate, grad_up], dim=1)
    yield grad, expected


def _losses(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    logits = _random(dtype, 11, 5, sizes.vocabulary) * 3
    targets = torch.tensor([0, 1, sizes.vocabulary // 2, sizes.vocabulary - 1, 0])
    wanted = logits.float().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wanted, targets, reduction="none")
    yield kernels.cross_entropy(logits, targets), expected.detach()
    yield logits, torch.autograd.grad(expected.sum(), wanted)[0]


def _layer(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a whole layer, where it runs on matrix tiles; from PyTorch's operations in float32, on the same values."""
    tried = _random_layer(sizes, dtype)
    if not tiled.fits(tried):
        return
    tokens, where = sum(_LENGTHS), Documents(_LENGTHS)
    x, grad = _random(dtype, 1, tokens, sizes.hidden), _random(dtype, 2, tokens, sizes.hidden)
    angles = _random(torch.float32, 3, tokens, sizes.head)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    with torch.enable_grad():
        inputs = [x.requires_grad_(), *tried.trained]
        found: Tensor = TiledLayer.apply(x, tried, cos, sin, where, *tried.trained)  # type: ignore[no-untyped-call]
        gradients = torch.autograd.grad(found, inputs, grad)
        exact, wide = _random_layer(sizes, dtype, torch.float32), x.detach().float().requires_grad_()
        arguments = (wide, exact, cos.float(), sin.float(), where, False, *exact.trained)
        expected: Tensor = FusedLayer.apply(*arguments)  # type: ignore[no-untyped-call]
        wanted = torch.autograd.grad(expected, [wide, *exact.trained], grad.float())
    yield found.detach(), expected.detach()
    yield from zip(gradients, wanted, strict=True)


def _random_layer(sizes: Sizes, dtype: torch.dtype, shown_as: torch.dtype | None = None) -> DecoderLayer:
    """A layer with an adapter on each linear layer, as large as a trained one's is."""
    kind = dtype if shown_as is None else shown_as

    def weight(seed: int, *shape: int) -> Tensor:
        values = _random(torch.float32, seed, *shape) / math.sqrt(shape[-1])
        return values.to(dtype).to(kind)

    def linear(seed: int, inputs: int, outputs: int) -> Adapted:
        a = (_random(torch.float32, seed + 1, _RANK, inputs) / math.sqrt(inputs)).requires_grad_()
        b = (_random(torch.float32, seed + 2, outputs, _RANK) * 0.1).requires_grad_()
        return Adapted(weight(seed, outputs, inputs), None, a, b, 0.5)

    def norm(seed: int) -> Norm:
        return Norm((1 + 0.1 * _random(torch.float32, seed, sizes.hidden)).to(dtype).to(kind), _EPS)

    query, key = sizes.query_heads * sizes.head, sizes.key_heads * sizes.head
    return DecoderLayer(
        attention_norm=norm(20),
        query=linear(30, sizes.hidden, query),
        key=linear(40, sizes.hidden, key),
        value=linear(50, sizes.hidden, key),
        output=linear(60, query, sizes.hidden),
        block_norm=norm(21),
        block=GatedBlock(
            linear(70, sizes.hidden, sizes.intermediate),
            linear(80, sizes.hidden, sizes.intermediate),
            linear(90, sizes.intermediate, sizes.hidden),
            SILU,
        ),
        head_size=sizes.head,
        scale=sizes.head**-0.5,
    )
