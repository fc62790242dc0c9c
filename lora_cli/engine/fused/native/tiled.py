"""`native.layer`'s decoder layer on the processor's matrix tiles (layer.c): two calls of C there and two back, and
attention between them.

A block of tokens goes through norms, products, positions and activation while it lies in a core's caches, which saves
the passes over memory in between. In float32 too: a float32 is the sum of three bfloat16s, whose products are exact
(pieces.h). Fits frozen weights that stay near the caches; larger ones are multiplied by PyTorch's products.

Dimension names: T tokens, M model width, H query heads, K key heads, E head size, I intermediate width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_cli.engine.fused.documents import Documents
from lora_cli.engine.fused.layer import DecoderLayer
from lora_cli.engine.fused.linear import Adapted
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.fused.native.compiled import library
from lora_cli.engine.fused.native.layer import heads_of

LARGEST = 2**20
"""Values of a layer's largest weight."""
_PLACE, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, _PLACE) for name in ("weight", "bias", "a", "b", "a_grad", "b_grad")),
        *(("outputs", _COUNT), ("rank", _COUNT), ("scale", _REAL)),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("half", "tokens", "width", "attended_width", "intermediate")),
        *((name, _COUNT) for name in ("turned_heads", "head", "activation")),
        *(("attention_eps", _REAL), ("block_eps", _REAL)),
        *((name, _PLACE) for name in ("attention_norm", "block_norm", "cosine", "sine", "x", "qkv", "attended")),
        *((name, _PLACE) for name in ("hidden", "gate_up", "out", "grad", "hidden_grad", "attended_grad")),
        *(("qkv_grad", _PLACE), ("x_grad", _PLACE), ("linears", _Linear * 7)),
    ]


def fits(layer: DecoderLayer) -> bool:
    """Whether the layer's sizes and adapters are such as the C takes."""
    widths = [size for linear in layer.linears for size in linear.weight.shape]
    adapters = [t for linear in layer.linears for t in linear.trained]
    return (
        kernels.has_tiles()
        and layer.head_size % 32 == 0
        and all(width % 16 == 0 for width in widths)
        and max(linear.weight.numel() for linear in layer.linears) <= LARGEST
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in adapters)
        and all(linear.weight.is_contiguous() for linear in layer.linears)
    )


class TiledLayer(torch.autograd.Function):
    """`DecoderLayer` on hidden states [T, M]; cos and sin are [T, E], `where` tells of the documents."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        layer: DecoderLayer,
        cos_TE: Tensor,
        sin_TE: Tensor,
        where: Documents,
        *trained: Tensor,
    ) -> Tensor:
        x_TM, tokens = x_TM.contiguous(), len(x_TM)
        heads = heads_of(layer, where.lengths)
        qkv = x_TM.new_empty(tokens, (heads.query + 2 * heads.key) * heads.size)
        hidden_TM, out_TM = torch.empty_like(x_TM), torch.empty_like(x_TM)
        gate_up = x_TM.new_empty(_whole(tokens), 2 * _whole(layer.block.gate.outputs))  # in an order of its own
        call = _call(layer, heads, x=x_TM, qkv=qkv, cosine=cos_TE, sine=sin_TE)
        _run("layer_inputs", call)
        attended, log_sums = kernels.attend(qkv, heads)
        _add(call, attended=attended, hidden=hidden_TM, gate_up=gate_up, out=out_TM)
        _run("layer_outputs", call)
        ctx.layer, ctx.heads = layer, heads
        ctx.save_for_backward(
            *(x_TM, cos_TE, sin_TE, qkv, attended, log_sums, hidden_TM, gate_up),
            *trained,  # their versions are checked on the way back
        )
        return out_TM

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        layer, heads = ctx.layer, ctx.heads
        x_TM, cos_TE, sin_TE, qkv, attended, log_sums, hidden_TM, gate_up, *trained = ctx.saved_tensors
        grad_TM = grad_TM.contiguous()
        hidden_grad, attended_grad = torch.empty_like(x_TM), torch.empty_like(attended)
        grads = [torch.empty_like(each) for each in trained]
        call = _call(layer, heads, x=x_TM, cosine=cos_TE, sine=sin_TE, attended=attended, hidden=hidden_TM)
        _add(call, gate_up=gate_up, grad=grad_TM, hidden_grad=hidden_grad, attended_grad=attended_grad)
        _add_gradients(call, layer, grads)
        _run("layer_outputs_back", call)
        qkv_grad = kernels.attend_back(attended_grad, attended, log_sums, qkv, heads)
        into = torch.empty_like(x_TM) if ctx.needs_input_grad[0] else None
        _add(call, qkv_grad=qkv_grad, x_grad=into)
        _run("layer_inputs_back", call)
        return (into, None, None, None, None, *grads)


def _whole(count: int) -> int:
    return -(-count // 32) * 32


def _call(layer: DecoderLayer, heads: kernels.Heads, **tensors: Tensor) -> _Layer:
    """What the C is told of a layer."""
    call = _Layer()
    x_TM = tensors["x"]
    call.half, (call.tokens, call.width) = int(x_TM.dtype == torch.bfloat16), x_TM.shape
    call.attended_width, call.intermediate = heads.width, layer.block.gate.outputs
    call.turned_heads, call.head = heads.query + heads.key, heads.size
    call.activation = kernels.KINDS[layer.block.activation]
    call.attention_norm, call.attention_eps = layer.attention_norm.weight.data_ptr(), layer.attention_norm.eps
    call.block_norm, call.block_eps = layer.block_norm.weight.data_ptr(), layer.block_norm.eps
    for number, linear in enumerate(layer.linears):
        _describe(call.linears[number], linear)
    _add(call, **tensors)
    return call


def _describe(place: _Linear, linear: Adapted) -> None:
    place.weight, place.outputs = linear.weight.data_ptr(), linear.outputs
    if linear.bias is not None:
        place.bias = linear.bias.data_ptr()
    if linear.a is not None and linear.b is not None:
        place.a, place.b, place.rank, place.scale = linear.a.data_ptr(), linear.b.data_ptr(), linear.rank, linear.scale


def _add(call: _Layer, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())


def _add_gradients(call: _Layer, layer: DecoderLayer, grads: Sequence[Tensor]) -> None:
    rest = iter(grads)
    for number, linear in enumerate(layer.linears):
        if linear.rank:
            call.linears[number].a_grad, call.linears[number].b_grad = next(rest).data_ptr(), next(rest).data_ptr()


def _run(name: str, call: _Layer) -> None:
    found = library()
    assert found is not None, "asked for after `kernels.available`"
    if getattr(found, name)(ctypes.byref(call)):
        raise MemoryError("a decoder layer: out of memory")
