"""The first examples, token by token.

Goes the way that training goes, for a few rows and without the cache. Knows nothing about how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_cli.config import DataConfig
from lora_cli.data.account import SourceTally, Tally, refuse_nothing
from lora_cli.data.loading import open_sources, set_chat_template
from lora_cli.data.marked import MarkedText
from lora_cli.data.packing import pack
from lora_cli.data.tokenizing import Limits, Prepared, RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 16
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # in UTF-8


@dataclass(frozen=True)
class ExamplePreview:
    """An example as it is trained on."""

    place: str
    input_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """What each token adds to the text; empty for one that only begins a character."""
    trained: tuple[int, ...]
    """1 where the token's own prediction counts."""
    roles: tuple[str, ...]
    """Whose words each token belongs to; empty for what the template or layout writes."""
    text: str
    truncated: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Pack:
    """A micro-batch: whole examples end to end. No token sees across a boundary, and positions restart there."""

    places: tuple[str, ...]
    boundaries: tuple[int, ...]
    """Tokens before each example, and the micro-batch's length."""


@dataclass(frozen=True)
class Preview:
    """The first examples, and how they would lie in micro-batches if they made up a step."""

    examples: tuple[ExamplePreview, ...]
    packs: tuple[Pack, ...]
    micro_batch_tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def packed(examples: Sequence[ExamplePreview], micro_batch_tokens: int) -> Preview:
    lengths = [len(example.input_ids) for example in examples]
    packs = tuple(
        Pack(
            tuple(examples[index].place for index in one),
            tuple(np.cumsum([0, *(lengths[index] for index in one)]).tolist()),
        )
        for one in pack(lengths, micro_batch_tokens)
    )
    return Preview(tuple(examples), packs, micro_batch_tokens)


def preview_examples(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int], *, count: int
) -> tuple[ExamplePreview, ...]:
    """The first `count` examples of the train sources.

    Raises:
        DataError: a row up to there can't be used, or none is left.
    """
    set_chat_template(data, tokenizer)
    return tuple(islice(_previews(data, tokenizer, stop_token_ids), count))


def _previews(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]
) -> Iterator[ExamplePreview]:
    limits = Limits(data.max_length, data.overlong)
    rows_to_examples = RowTokenizer(tokenizer, stop_token_ids, limits=limits, everything=data.train_on == "all")
    tallies = []
    for source in open_sources(data.train):
        reader = source.reader(data)
        rows = source.placed_rows(None)
        tally = Tally()
        tallies.append(SourceTally(tally, source.rows.around_number))
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            for row in rows_to_examples.prepare(chunk, reader):
                tally.rows += 1
                tally.used += row.dropped is None
                if row.dropped is not None:
                    tally.dropped.setdefault(row.dropped, []).append(row.number)
                for one in row.examples:
                    if one.dropped is None:
                        yield _preview(source.place(row.number), one, tokenizer, stop_token_ids, rows_to_examples.notes)
    refuse_nothing("data.train", tallies)


def _preview(
    place: str,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    template_notes: dict[str, str],
) -> ExamplePreview:
    ids = prepared.example.input_ids.tolist()
    tokens = token_texts(tokenizer, ids)
    return ExamplePreview(
        place=place,
        input_ids=tuple(ids),
        tokens=tokens,
        trained=tuple(int(flag) for flag in prepared.example.trained),
        roles=token_roles(prepared.marked, tokens),
        text=_decoded(tokenizer, ids),
        truncated=prepared.truncated,
        notes=(*_notes(prepared, tokenizer, stop_token_ids), *template_notes.values()),
    )


def _notes(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> Iterator[str]:
    ids, trained = prepared.example.input_ids, prepared.example.trained
    bos = tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        yield "doubled BOS"
    if prepared.truncated:
        yield f"truncated: {prepared.length_seen - len(ids):,} of {prepared.length_seen:,} tokens are cut off"
        return
    last = int(ids[np.flatnonzero(trained)[-1]])
    if last in stop_token_ids:
        yield f"ends in a trained {_decoded(tokenizer, [last])}"
    else:
        yield "does not end in a trained stop token"


def token_roles(marked: MarkedText, tokens: Sequence[str]) -> tuple[str, ...]:
    """Whose words each token belongs to. A token that holds words of two is the later one's."""
    roles = [""] * len(marked.text)
    for start, end in marked.trained:
        roles[start:end] = ["assistant"] * (end - start)
    for (start, end), role in zip(marked.data, marked.roles, strict=False):
        roles[start:end] = [role] * (end - start)
    ends = np.cumsum([len(token) for token in tokens]) - sum(len(token) for token in tokens[: len(marked.before)])
    found = []
    for number, end in enumerate(ends):
        start = max(0, int(end) - len(tokens[number]))
        own = [role for role in roles[start : max(0, int(end))] if role]
        found.append(own[-1] if own else "")
    return tuple(found)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the decoded text.

    Decoded with the tokens before it, as some tokenizers drop the space that begins a lone token. A character
    that is spread over several tokens is shown at the last of them.
    """
    texts: list[str] = []
    known, fresh = 0, 0  # where the tokens begin that are decoded for context, and those that are new
    context = ""
    for position in range(len(ids)):
        decoded = _decoded(tokenizer, ids[known : position + 1])
        if decoded.endswith(_UNFINISHED) and position + 1 < len(ids) and position - fresh < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(decoded[len(context) :])
        context = _decoded(tokenizer, ids[fresh : position + 1])
        known, fresh = fresh, position + 1
    return tuple(texts)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
