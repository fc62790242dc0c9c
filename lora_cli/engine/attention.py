"""Attention that never crosses a document's boundary.

One call of PyTorch's scaled-dot-product attention for each document on a CPU, one variable-length kernel call for
all of them on CUDA. Sliding windows, soft caps and attention sinks are honoured; a model that asks for anything
else is told so by `UnsupportedAttention`, and runs another way. Boundaries arrive as keyword arguments through the
model, because checkpointed layers are recomputed in another thread, where a global would be stale.

Dimension names: T tokens, L tokens of one document, H query heads, K key heads, E head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli.engine.fused.documents import Attention, Documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_cli.engine.batch import FlatBatch

# transformers takes a name with "flash" in it for FlashAttention, and then builds other masks.
NAME = "lora_documents"

# What models hand to any attention and what a causal attention by document doesn't need.
_IRRELEVANT = frozenset(
    {"position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "output_attentions", "output_hidden_states"}
    | {
        "cache_position",
        "num_items_in_batch",
        "position_embeddings",
        "return_dict",
        "output_router_logits",
        "labels",
        "logits_to_keep",
    }
)


class UnsupportedAttention(Exception):
    """The model asks for something that attention by document doesn't do; the message says what."""


def boundaries(batch: FlatBatch, *, flash4: bool = False) -> dict[str, Any]:
    """The keyword arguments that carry a batch's document boundaries through a model, and which kernels to take."""
    return {"document_lengths": batch.document_lengths, "cu_seq_lens_q": batch.cu_seqlens, "flash4": flash4}


def document_attention(
    module: torch.nn.Module,
    query_1HTE: Tensor,
    key_1KTE: Tensor,
    value_1KTE: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    document_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    flash4: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; the signature is that of transformers' `AttentionInterface`.

    Returns:
        [1, T, H, E] in the dtype of `query`, and None for the weights.
    """
    surplus = sorted(name for name, value in others.items() if value is not None and name not in _IRRELEVANT)
    if surplus:
        raise UnsupportedAttention(f"its attention takes {', '.join(surplus)}")
    if document_lengths is None or cu_seq_lens_q is None:
        raise UnsupportedAttention("it doesn't hand document boundaries to its attention")
    if attention_mask is not None:
        raise UnsupportedAttention("it builds an attention mask of its own")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedAttention("its attention isn't causal")
    if query_1HTE.shape[2] != key_1KTE.shape[2]:
        raise UnsupportedAttention("queries and keys differ in length")
    plain = softcap is None and s_aux is None
    if plain and query_1HTE.is_cuda and torch.is_autocast_enabled("cuda"):  # as for PyTorch's own attention
        wanted = torch.get_autocast_dtype("cuda")
        query_1HTE, key_1KTE, value_1KTE = (t.to(wanted) for t in (query_1HTE, key_1KTE, value_1KTE))
    if plain and query_1HTE.is_cuda and _varlen_takes(query_1HTE, value_1KTE) and not dropout:
        where = Documents(document_lengths, cu_seq_lens_q, sliding_window, flash4)
        return _varlen(query_1HTE, key_1KTE, value_1KTE, where, scaling), None
    rounds = _rounds(document_lengths)
    query_1HTE, key_1KTE, value_1KTE = (_folded(each, rounds) for each in (query_1HTE, key_1KTE, value_1KTE))
    lengths = list(document_lengths[: len(document_lengths) // rounds])
    pieces = zip(
        query_1HTE.split(lengths, dim=2), key_1KTE.split(lengths, dim=2), value_1KTE.split(lengths, dim=2), strict=True
    )
    if plain:
        outputs = [_sdpa(q, k, v, dropout, scaling, sliding_window) for q, k, v in pieces]
    else:
        outputs = [_explicit(q, k, v, dropout, scaling, sliding_window, softcap, s_aux) for q, k, v in pieces]
    output_RTHE = torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
    return output_RTHE.flatten(0, 1).unsqueeze(0), None


@lru_cache(maxsize=64)
def _rounds(lengths: tuple[int, ...]) -> int:
    """How often the documents' lengths repeat from the first to the last: (5, 3, 5, 3) twice, (5, 3, 4) once."""
    count = len(lengths)
    for period in range(1, count // 2 + 1):
        if count % period == 0 and lengths[:period] * (count // period) == lengths:
            return count // period
    return 1


def _folded(states_1HTE: Tensor, rounds: int) -> Tensor:
    """[1, H, R x T, E] as a view [R, H, T, E]: documents of equal length, a round apart, take one call together."""
    if rounds == 1:
        return states_1HTE
    by_round: Tensor = states_1HTE[0].unflatten(1, (rounds, -1))
    return by_round.transpose(0, 1)


def _sdpa(
    query_1HLE: Tensor, key_1KLE: Tensor, value_1KLE: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    length = query_1HLE.shape[2]
    banded = window is not None and window < length
    return F.scaled_dot_product_attention(
        query_1HLE,
        key_1KLE,
        value_1KLE,
        attn_mask=_visible(length, window, query_1HLE.device) if banded else None,
        dropout_p=dropout,
        is_causal=not banded,
        scale=scaling,
        enable_gqa=query_1HLE.shape[1] != key_1KLE.shape[1],
    )


def _explicit(
    query_1HLE: Tensor,
    key_1KLE: Tensor,
    value_1KLE: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Scores written out, for what no fused kernel does: the soft cap of Gemma 2, the sinks of gpt-oss."""
    groups = query_1HLE.shape[1] // key_1KLE.shape[1]
    key_1HLE, value_1HLE = key_1KLE.repeat_interleave(groups, 1), value_1KLE.repeat_interleave(groups, 1)
    scale = query_1HLE.shape[-1] ** -0.5 if scaling is None else scaling
    scores_1HLL = torch.matmul(query_1HLE, key_1HLE.transpose(2, 3)) * scale
    if softcap is not None:
        scores_1HLL = torch.tanh(scores_1HLL / softcap) * softcap
    length = query_1HLE.shape[2]
    hidden = ~_visible(length, window, query_1HLE.device)
    scores_1HLL = scores_1HLL.float().masked_fill(hidden, float("-inf"))
    if sinks_H is not None:  # one more column that takes weight and gives no value
        sink = sinks_H.float().reshape(1, -1, 1, 1).expand(len(scores_1HLL), -1, length, 1)
        scores_1HLL = torch.cat([scores_1HLL, sink], dim=-1)
    weights_1HLL = torch.softmax(scores_1HLL, dim=-1)[..., :length].to(query_1HLE.dtype)
    return torch.matmul(F.dropout(weights_1HLL, dropout, training=dropout > 0), value_1HLE)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L], True where row sees column: itself and what came before, back to the window's edge."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def _varlen_takes(query_1HTE: Tensor, value_1KTE: Tensor) -> bool:
    """Whether the variable-length kernel takes these tensors: 16 bits, one head size, at most 256."""
    size = query_1HTE.shape[-1]
    half = query_1HTE.dtype in (torch.bfloat16, torch.float16)
    ampere = torch.cuda.get_device_capability(query_1HTE.device) >= (8, 0)
    return half and ampere and size == value_1KTE.shape[-1] and size <= 256 and size % 8 == 0


def _varlen(
    query_1HTE: Tensor,
    key_1KTE: Tensor,
    value_1KTE: Tensor,
    documents: Documents,
    scaling: float | None,
) -> Tensor:
    scale = query_1HTE.shape[-1] ** -0.5 if scaling is None else scaling
    given = (t.squeeze(0).transpose(0, 1).contiguous() for t in (query_1HTE, key_1KTE, value_1KTE))
    output_THE: Tensor = Attention.apply(*given, documents, scale)  # type: ignore[no-untyped-call]
    return output_THE.unsqueeze(0)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch a model to the attention of this name; `NAME` is ours.

    Raises:
        UnsupportedAttention: its code doesn't take attention from transformers' interface, or not this one.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise UnsupportedAttention(str(error).splitlines()[0]) from error
    if model.config._attn_implementation != name:  # transformers is content with a warning
        raise UnsupportedAttention("its attention can't be exchanged")
