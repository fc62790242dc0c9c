"""Decoder layers on matrix tiles: PyTorch's results at all kinds of sizes, the same bits each time, faults found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.fitting import fuse
from lora_cli.engine.fused.gated import GatedBlock
from lora_cli.engine.fused.layer import DecoderLayer, FusedLayer, Norm
from lora_cli.engine.fused.linear import Adapted
from lora_cli.engine.fused.native import kernels, proof, tiled
from lora_cli.engine.fused.native.tiled import TiledLayer
from lora_cli.engine.fused.pointwise import GELU_TANH, SILU
from lora_cli.engine.world import World
from tests.unit.engine.learning import LENGTHS, examples
from tests.unit.engine.padded import padded_gradients
from tests.unit.engine.test_fused import apart, gradients, live
from tests.unit.engine.test_native import NATIVE

pytestmark = pytest.mark.skipif(not kernels.has_tiles(), reason="needs matrix tiles")
SIZES = [
    # width, query heads, key heads, head, intermediate, ranks of the seven layers, lengths of documents
    (256, 4, 2, 64, 688, (16,) * 7, (131, 70, 1, 17, 64)),  # as the benchmark's; a block that isn't whole
    (64, 2, 1, 32, 112, (8, 0, 5, 16, 40, 3, 0), (33, 5)),  # some adapted, ranks that fill no tile, and more than two
    (48, 3, 3, 32, 80, (20,) * 7, (200,)),  # widths that are no whole steps
    (32, 1, 1, 32, 32, (1,) * 7, (12, 1)),  # less than a tile
    (64, 2, 2, 32, 64, (0, 0, 0, 0, 0, 0, 4), (300, 300)),  # one adapter alone
]


def layer(sizes: tuple[Any, ...], dtype: torch.dtype, shown_as: torch.dtype) -> DecoderLayer:
    """Always the same; its weights as `dtype` has them, in another one."""
    width, heads, keys, size, intermediate, ranks, _ = sizes
    draw = torch.Generator().manual_seed(0)

    def frozen(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw) * scale).to(dtype).to(shown_as)

    def linear(inputs: int, outputs: int, rank: int) -> Adapted:
        weight, bias = frozen(outputs, inputs, scale=1 / math.sqrt(inputs)), frozen(outputs)
        if not rank:
            return Adapted(weight, bias, None, None)
        a = (torch.randn(rank, inputs, generator=draw) / math.sqrt(inputs)).requires_grad_()
        return Adapted(weight, bias, a, (torch.randn(outputs, rank, generator=draw) * 0.1).requires_grad_(), 0.7)

    def norm() -> Norm:
        return Norm(1 + frozen(width, scale=0.1), 1e-5)

    shapes = [(width, heads * size), (width, keys * size), (width, keys * size), (heads * size, width)]
    shapes += [(width, intermediate), (width, intermediate), (intermediate, width)]
    query, key, value, output, gate, up, down = (linear(*s, r) for s, r in zip(shapes, ranks, strict=True))
    block = GatedBlock(gate, up, down, SILU if width > 48 else GELU_TANH)
    return DecoderLayer(norm(), query, key, value, output, norm(), block, size, 1 / math.sqrt(size))


def results(kind: Any, sizes: tuple[Any, ...], dtype: torch.dtype, shown_as: torch.dtype) -> list[Tensor]:
    """Output, and the gradients of the input and of all adapters."""
    made, lengths = layer(sizes, dtype, shown_as), sizes[-1]
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(sum(lengths), sizes[0], generator=draw).to(dtype).to(shown_as) for _ in range(2))
    angles = torch.randn(sum(lengths), sizes[3], generator=draw)
    cos, sin = angles.cos().to(dtype).to(shown_as), angles.sin().to(dtype).to(shown_as)
    more = () if kind is TiledLayer else (False,)
    out = kind.apply(x.requires_grad_(), made, cos, sin, Documents(lengths), *more, *made.trained)
    return [out.detach(), *torch.autograd.grad(out, [x, *made.trained], grad)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("sizes", SIZES)
def test_layers_of_all_sizes(sizes: tuple[Any, ...], dtype: torch.dtype, tolerance: float) -> None:
    assert tiled.fits(layer(sizes, dtype, dtype))
    found, expected = results(TiledLayer, sizes, dtype, dtype), results(FusedLayer, sizes, dtype, torch.float32)
    assert max(apart_one(one, other) for one, other in zip(found, expected, strict=True)) < tolerance


def apart_one(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other).norm() / other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    """Threads add their parts in one order, and nothing is read that wasn't written."""
    first, again = (results(TiledLayer, SIZES[0], dtype, dtype) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_model_runs_on_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
    calls: list[str] = []
    run = tiled._run
    monkeypatch.setattr(tiled, "_run", lambda name, call: (calls.append(name), run(name, call)))
    model = live("llama", **settings)
    assert fuse(model, "native") == 2
    found = gradients(model, NATIVE, LENGTHS, world, 4096)
    assert apart(found, padded_gradients(live("llama", **settings), examples(LENGTHS))) < 2e-6
    assert calls == 2 * ["layer_inputs", "layer_outputs"] + 2 * ["layer_outputs_back", "layer_inputs_back"]


def test_what_is_too_large_or_odd_runs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tiled.fits(layer((64, 2, 2, 24, 64, (4,) * 7, (1,)), torch.float32, torch.float32))
    assert not tiled.fits(layer((40, 1, 1, 32, 64, (4,) * 7, (1,)), torch.float32, torch.float32))
    monkeypatch.setattr(tiled, "LARGEST", 64 * 64 - 1)
    assert not tiled.fits(layer(SIZES[4], torch.float32, torch.float32))


@pytest.mark.parametrize("name", ["layer_inputs", "layer_outputs", "layer_outputs_back", "layer_inputs_back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_layer_is_found(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiled._run

    def wrong(called: str, call: Any) -> None:
        scale = call.attention_eps, call.block_eps
        if called == name:
            call.attention_eps = call.block_eps = 1.0
        run(called, call)
        call.attention_eps, call.block_eps = scale

    sizes = proof.Sizes(4, 2, 64, 256, 688, 500)
    assert proof.holds(sizes, dtype)
    monkeypatch.setattr(tiled, "_run", wrong)
    assert not proof.holds(sizes, dtype)
