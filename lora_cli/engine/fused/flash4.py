"""Attention by document with FlashAttention 4 (the package flash-attn-4), for Hopper and Blackwell.

PyTorch's own flash kernel uses none of the instructions that came with these cards. The package compiles its kernels
for a head size when they are first called, in some seconds, and keeps them in the cache folder. It is in beta, so
nothing is taken on trust: whether it is right at the model's sizes is tried on the card before a run uses it (`prove`).

The kernels stand behind two operators of PyTorch's, so that a rehearsal on `meta` sees what they return, and what
they take meanwhile (`scratch_bytes`). Dimension names: T tokens, H query heads, K key heads, E head size.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lora_cli.data.cache import cache_folder
from lora_cli.engine.distance import distance

TOLERANCE = 2e-2
"""Of the largest value, from PyTorch's own kernel in the same 16 bits."""

_ARCHITECTURES = {9: 256, 10: 128}
"""Major capabilities that it trains on, and the largest head size there."""
SHORTEST = 256
"""Tokens of a batch's mean document from which on it is faster than PyTorch's kernel: on an H200 1.3 times at 512, 0.7
times at 64."""
_LENGTHS = (131, 70, 1, 17, 300, 1100)
_LONGEST = 512
"""What the kernels are told of the longest document is never less: below a block's size others would be compiled."""


@dataclass(frozen=True)
class Heads:
    """Of a model's attention."""

    query: int
    key: int
    size: int
    window: int | None = None


def installed() -> bool:
    """Whether the package is, by its own name: flash-attn 2 brings parts of it along. Importing it takes seconds."""
    try:
        version("flash-attn-4")
        return find_spec("flash_attn.cute") is not None
    except (PackageNotFoundError, ModuleNotFoundError):
        return False


def takes(size: int, dtype: torch.dtype, card: torch.device) -> bool:
    """Whether there are kernels for heads of this size on a card."""
    major, _ = torch.cuda.get_device_capability(card)
    return dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= _ARCHITECTURES.get(major, 0)


def pays(lengths: tuple[int, ...]) -> bool:
    """Whether documents are long enough."""
    return sum(lengths) >= SHORTEST * len(lengths)


def prove(heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """Try the kernels on random documents of this many heads; None if they are right, else what is wrong."""
    from lora_cli.engine.fused.documents import Attention, Documents

    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> Tensor:
        shape = (sum(_LENGTHS), count, heads.size)
        return torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_()

    query, key, value = draw(heads.query), draw(heads.key), draw(heads.key)
    grad = draw(heads.query).detach()
    starts = torch.tensor([0, *_LENGTHS], device=device).cumsum(0).int()
    try:
        for window in {None, heads.window}:
            results = []
            for flash4 in (False, True):
                where = Documents(_LENGTHS, starts, window, flash4)
                arguments = (query, key, value, where, heads.size**-0.5)
                out: Tensor = Attention.apply(*arguments)  # type: ignore[no-untyped-call]
                results.append((out.detach(), *torch.autograd.grad(out, (query, key, value), grad)))
            apart = max(distance(found, expected) for expected, found in zip(*results, strict=True))
            if apart > TOLERANCE:
                return f"its results are {apart:.0e} from those of PyTorch's kernel"
    except Exception as error:  # a compiler of its own, in beta
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"[:160]
    finally:
        torch.cuda.empty_cache()  # what is free is asked for next
    return None


def flash4(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    starts: Tensor,
    longest: int,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """[T, H, E], and the logarithms of softmax's sums, [H, T] in float32.

    Args:
        starts: [documents + 1] int32, where each begins and the last one ends.
        window: how many tokens back, itself included, a token sees.
    """
    out, log_sums = torch.ops.lora_cli.flash4(query_THE, key_TKE, value_TKE, starts, longest, window, scale)
    return out, log_sums


def flash4_back(
    grad_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    log_sums_HT: Tensor,
    starts: Tensor,
    longest: int,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from that of `flash4`'s output and what it returned."""
    given = (grad_THE, query_THE, key_TKE, value_TKE, out_THE, log_sums_HT)
    query_grad, key_grad, value_grad = torch.ops.lora_cli.flash4_back(*given, starts, longest, window, scale)
    return query_grad, key_grad, value_grad


def scratch_bytes(args: tuple[Any, ...]) -> list[int]:
    """What `flash4_back` takes and gives back: softmax's sums and the queries' gradient in float32, each document's
    rounded up to whole blocks, and with grouped heads the same of keys and values.

    `flash_attn/cute/interface.py`, _flash_attn_bwd and _tile_size_bwd_sm90, in version 4.0.0b36.
    """
    _, query, key, _, _, _, starts, *_ = args
    total, heads, size = query.shape
    of_queries, of_keys, whole = _blocks(size, torch.cuda.get_device_capability(query.device)[0])
    wide, documents = -(-size // whole) * whole, starts.shape[0]

    def rounded(block: int) -> int:
        return int((total + documents * block - 1) // block * block)

    sizes = [heads * rounded(of_queries) * wide * 4, *2 * [heads * rounded(of_queries) * 4]]
    if key.shape[1] != heads:
        sizes += 2 * [key.shape[1] * rounded(of_keys) * wide * 4]
    return sizes


def _blocks(size: int, major: int) -> tuple[int, int, int]:
    """Queries and keys of a block on the way back, and what a head's size is rounded up to."""
    if major != 9:
        return 128, 256 if size >= 128 else 128, 32
    if size <= 128:
        return 128 if size <= 64 else 64, 128, 32
    return (64, 96, 64) if size <= 192 else (64, 48, 64)


@cache
def _interface() -> Any:
    """The package's own kernels, as PyTorch itself calls them (`torch/nn/attention/_fa4.py`)."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache_folder().parent / "flash4"))
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)  # of its own code
    from flash_attn.cute import interface

    return interface


def _about(starts: Tensor, longest: int, window: int | None, scale: float) -> dict[str, Any]:
    longest = max(longest, _LONGEST)
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scale,
        "causal": window is None,
        **sides,
    }


def _there(query: Tensor, key: Tensor, value: Tensor, *about: Any) -> tuple[Tensor, Tensor]:
    found = _interface()._flash_attn_fwd(query, key, value, **_about(*about), return_lse=True)
    return found[0], found[1]


def _back(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, *about: Any) -> Any:
    return _interface()._flash_attn_bwd(query, key, value, out, grad, log_sums, **_about(*about))


def _there_on_meta(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _back_on_meta(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_library = torch.library.Library("lora_cli", "DEF")
_WHERE = "Tensor starts, int longest, int? window, float scale"
_library.define(f"flash4(Tensor query, Tensor key, Tensor value, {_WHERE}) -> (Tensor, Tensor)")
_library.define(
    f"flash4_back(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sums, {_WHERE})"
    " -> (Tensor, Tensor, Tensor)"
)
for _name, _way, _key in (
    ("flash4", _there, "CUDA"),
    ("flash4", _there_on_meta, "Meta"),
    ("flash4_back", _back, "CUDA"),
    ("flash4_back", _back_on_meta, "Meta"),
):
    _library.impl(_name, _way, _key)
