"""Text from a model, greedily or by sampling, with the model's own attention and a cache.

Prompts of one length run as one batch, so that there is no padding here either and a prompt's answer never depends
on its neighbours. For many prompts of many lengths that would leave hardly any batches: whoever asks so has prompts of
neighbouring lengths share a batch, padded on the left, which changes an answer by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from lora_cli.engine.attention import use_attention
from lora_cli.engine.computation import Computation
from lora_cli.engine.scoring import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, by transformers' names; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One answer."""

    token_ids: tuple[int, ...]
    """Without the prompt and without the stop token."""
    text: str
    stop_reason: str
    """`stop` when the model ended by itself, `length` when it was cut at max_new_tokens."""


def generate_batch(
    model: PreTrainedModel,
    computation: Computation,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: frozenset[int],
    sampling: Sampling,
    *,
    padded: bool = False,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """An answer for each prompt (token ids), in order.

    Args:
        padded: let prompts of different lengths share a batch; for models whose attention reads a mask and positions.
    """
    answers: dict[int, Generated] = {}
    device = next(model.parameters()).device
    with generating(model, computation), computation.autocast(device):
        for group in _batches([len(prompt) for prompt in prompts], batch_size, padded=padded):
            batch = [prompts[index] for index in group]
            for index, ids in zip(group, _fitting(model, batch, device, stop_token_ids, sampling), strict=True):
                answers[index] = _finish(tokenizer, ids, stop_token_ids)
            if progress is not None:
                progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def _batches(lengths: Sequence[int], batch_size: int, *, padded: bool) -> Iterator[list[int]]:
    """Indices of prompts that run together, shortest first: of one length, or of neighbouring ones."""
    ordered = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    runs = [ordered] if padded else [list(run) for _, run in groupby(ordered, key=lambda index: lengths[index])]
    for run in runs:
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]


def _fitting(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    stop_token_ids: frozenset[int],
    sampling: Sampling,
) -> list[list[int]]:
    """The batch's new tokens; in halves where the whole doesn't fit in memory."""
    try:
        return _run(model, prompts, device, stop_token_ids, sampling)
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(prompts) // 2
    halves = (prompts[:middle], prompts[middle:])
    return [ids for half in halves for ids in _fitting(model, half, device, stop_token_ids, sampling)]


def _run(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    stop_token_ids: frozenset[int],
    sampling: Sampling,
) -> list[list[int]]:
    from transformers import GenerationConfig

    stops = sorted(stop_token_ids)
    filler = stops[0] if stops else 0
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[filler] * (longest - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    sampled = sampling.temperature > 0
    choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k} if sampled else {}
    torch.manual_seed(sampling.seed)
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampled,
            eos_token_id=stops or None,
            pad_token_id=filler,
            use_cache=True,
            **choice,
        ),
    )
    new: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return new


def _finish(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_token_ids: frozenset[int]) -> Generated:
    end = next((i for i, token in enumerate(ids) if token in stop_token_ids), None)
    kept = ids if end is None else ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generated(tuple(kept), str(text), "length" if end is None else "stop")


@contextmanager
def generating(model: PreTrainedModel, computation: Computation) -> Iterator[None]:
    """Within it, the model has its own attention, a cache and no checkpointing; after it, what training needs."""
    use_attention(model, computation.attention)
    cached_before = model.config.use_cache
    model.config.use_cache = True
    try:
        with evaluating(model):
            yield
    finally:
        model.config.use_cache = cached_before
        computation.prepare(model)
