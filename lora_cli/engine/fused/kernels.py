"""Triton kernels for what stands between products on a CUDA card. `card` allocates and launches; nothing else does.

Each reads what it needs once, computes in float32 and writes once. Where transformers rounds to the tensors' dtype on
the way (the normed value before the weight, the activation before the product), so is it here.

One program takes one row unless it says otherwise. Places are counted in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, residual, weight, normed, scale, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """normed = weight * x / rms(x), scale = 1 / rms(x); with ADD first x += residual, in place."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        total = values.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        values = total.to(values.dtype)
        tl.store(x + at, values, mask=inside)
    exact = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, axis=0) / width + eps)
    tl.store(scale + row, inverse)
    rounded = (exact * inverse).to(values.dtype).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (rounded * gain).to(values.dtype), mask=inside)


@triton.jit
def rms_norm_again(x, weight, normed, scale, width, BLOCK: tl.constexpr):
    """`rms_norm` with a scale that is known."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    values = tl.load(x + at, mask=inside, other=0.0)
    rounded = (values.to(tl.float32) * tl.load(scale + row)).to(values.dtype).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (rounded * gain).to(values.dtype), mask=inside)


@triton.jit
def rms_norm_back(grad, x, weight, scale, more, width, BLOCK: tl.constexpr):
    """In the place of `grad`: the gradient of x, plus `more`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    given = tl.load(grad + at, mask=inside, other=0.0)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(scale + row)
    unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * inverse
    through = given.to(tl.float32) * gain
    along = tl.sum(through * unit, axis=0) / width
    result = (through - unit * along) * inverse + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + at, result.to(given.dtype), mask=inside)


@triton.jit
def rotate(x, cos, sin, heads, sign, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotary positions in place, halves paired; one program takes all heads of one token. `sign` -1 turns back."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    at = (token * heads + head) * (2 * HALF) + column
    angle = token * (2 * HALF) + column
    known = column < HALF
    first = tl.load(x + at, mask=inside, other=0.0)
    second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    one = first.to(tl.float32)
    cos_1 = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=known, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32) * sign
    sin_2 = tl.load(sin + angle + HALF, mask=known, other=0.0).to(tl.float32) * sign
    tl.store(x + at, (one * cos_1 - second * sin_1).to(first.dtype), mask=inside)
    tl.store(x + at + HALF, (second * cos_2 + one * sin_2).to(first.dtype), mask=inside)


@triton.jit
def _activation(x, GELU: tl.constexpr):
    """The activation of float32 `x`, and its derivative: SiLU, or GELU by its tanh approximation."""
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        value = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        share = tl.sigmoid(x)
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    return value, slope


@triton.jit
def gated(gate, up, out, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(gate) * up; BLOCK values each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    given = tl.load(gate + at, mask=inside, other=0.0)
    value, _ = _activation(given.to(tl.float32), GELU)
    rounded = value.to(given.dtype).to(tl.float32)
    result = rounded * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(given.dtype), mask=inside)


@triton.jit
def gated_back(grad, gate, up, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """In the places of gate and up: their gradients; in that of `grad`: act(gate) * up. BLOCK values each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    given = tl.load(gate + at, mask=inside, other=0.0)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    back = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(given.to(tl.float32), GELU)
    rounded = value.to(given.dtype).to(tl.float32)
    tl.store(grad + at, (rounded * other).to(given.dtype), mask=inside)
    tl.store(gate + at, (back * other * slope).to(given.dtype), mask=inside)
    tl.store(up + at, (back * rounded).to(given.dtype), mask=inside)


@triton.jit
def cross_entropy(logits, targets, grad, losses, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """[C] losses of rows of logits, and the gradient of their sum into `grad`, which may be `logits` itself."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    start = row * VOCABULARY
    target = tl.load(targets + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, VOCABULARY, BLOCK):
        inside = first + columns < VOCABULARY
        values = tl.load(logits + start + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(values - higher), axis=0)
        largest = higher
    log_sum = largest + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(logits + start + target).to(tl.float32))
    tl.debug_barrier()  # `grad` may be where the target's logit is read from
    for first in range(0, VOCABULARY, BLOCK):
        inside = first + columns < VOCABULARY
        given = tl.load(logits + start + first + columns, mask=inside, other=float("-inf"))
        share = tl.exp(given.to(tl.float32) - log_sum)
        share = tl.where(first + columns == target, share - 1.0, share)
        tl.store(grad + start + first + columns, share.to(given.dtype), mask=inside)


@triton.jit
def unpack_4_bits(
    packed,
    code,
    absmax,
    code_2,
    absmax_2,
    offset,
    out,
    count,
    SIZE: tl.constexpr,
    SIZE_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """4-bit values to dense ones, code[value] * absmax of its SIZE neighbours; BLOCK bytes each, the high half first.

    With SIZE_2, `absmax` is quantized itself: code_2[absmax] * absmax_2 of SIZE_2 of them, plus `offset`.
    """
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < count
    pair = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    group = byte * 2 // SIZE
    if SIZE_2 > 0:
        rough = tl.load(absmax + group, mask=inside, other=0).to(tl.int32)
        largest = tl.load(code_2 + rough) * tl.load(absmax_2 + group // SIZE_2, mask=inside, other=0.0)
        largest += tl.load(offset)
    else:
        largest = tl.load(absmax + group, mask=inside, other=0.0)
    high = tl.load(code + (pair >> 4)) * largest
    low = tl.load(code + (pair & 15)) * largest
    at = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + at, tl.interleave(high, low).to(out.dtype.element_ty), mask=at < 2 * count)
