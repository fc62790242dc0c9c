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
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.engine.attention import use_attention
from lora_cli.engine.computation import Computation
from lora_cli.engine.scoring import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_HALF = "\ufffd"
"""What tokenizers make of a character whose last bytes are still to come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, by transformers' names; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def as_transformers(self) -> dict[str, Any]:
        """The settings of a GenerationConfig that make this choice."""
        choice: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            choice |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            choice |= {"min_p": self.min_p} if self.min_p > 0 else {}
        if self.repetition_penalty != 1.0:
            choice["repetition_penalty"] = self.repetition_penalty
        return choice


@dataclass(frozen=True)
class Generated:
    """One answer."""

    token_ids: tuple[int, ...]
    """Without the prompt and without the stop token."""
    text: str
    stop_reason: str
    """`stop` when the model ended by itself, `length` when it was cut at max_new_tokens."""


def generate_aloud(
    model: PreTrainedModel,
    computation: Computation,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    stop_token_ids: frozenset[int],
    sampling: Sampling,
    say: Callable[[str], None],
) -> Generated:
    """An answer to one prompt, the same as in a batch of one; `say` is given its text while it comes, by words."""
    device = next(model.parameters()).device
    aloud = _Aloud(tokenizer, say, stop_token_ids)
    with generating(model, computation), computation.autocast(device):
        (ids,) = _run(model, [prompt], device, stop_token_ids, sampling, aloud)
    return _finish(tokenizer, ids, stop_token_ids)


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
    streamer: _Aloud | None = None,
) -> list[list[int]]:
    from transformers import GenerationConfig

    stops = sorted(stop_token_ids)
    filler = stops[0] if stops else 0
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[filler] * (longest - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    torch.manual_seed(sampling.seed)
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            eos_token_id=stops or None,
            pad_token_id=filler,
            use_cache=True,
            **sampling.as_transformers(),
        ),
        streamer=streamer,
    )
    new: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return new


def _finish(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_token_ids: frozenset[int]) -> Generated:
    end = next((i for i, token in enumerate(ids) if token in stop_token_ids), None)
    kept = ids if end is None else ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generated(tuple(kept), str(text), "length" if end is None else "stop")


class _Aloud:
    """transformers' streamer interface: token ids in, text out as soon as no later token can change it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None], stop_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._say = say
        self._stops = stop_token_ids
        self._ids: list[int] | None = None  # the prompt comes first
        self._said = 0

    def put(self, ids: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token for token in ids.flatten().tolist() if token not in self._stops]
        text = self._text()
        if text[-1:].isascii() and not text[-1:].isspace():  # a word may still grow
            self._speak(text.rfind(" ") + 1)
        elif not text.endswith(_HALF):
            self._speak(len(text))

    def end(self) -> None:
        self._speak(len(self._text()))

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))

    def _speak(self, until: int) -> None:
        if until > self._said:
            self._say(self._text()[self._said : until])
            self._said = until


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
