"""Rows to examples: rendered one by one, tokenized together.

Knows the whole way of a row; knows nothing about sources, processes or caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_cli.data.controls import Controls
from lora_cli.data.encoding import Encoder
from lora_cli.data.examples import Example
from lora_cli.data.files import Row
from lora_cli.data.formats import Completion, Content, Conversation, Message, RowReader, Text
from lora_cli.data.marked import MarkedText
from lora_cli.data.plain import PlainLayout
from lora_cli.data.shapes import ConversationMarker
from lora_cli.data.template import ChatTemplate
from lora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PlacedRow = tuple[int, str, Row]
"""A row with its number and its place."""


@dataclass(frozen=True)
class Limits:
    """What happens to rows that are too long."""

    max_length: int
    overlong: Literal["truncate", "drop", "error"]


@dataclass(frozen=True)
class Prepared:
    """One example as it is trained on, or why it isn't."""

    example: Example
    marked: MarkedText
    length_seen: int
    """Before truncation."""
    dropped: str | None

    @property
    def truncated(self) -> bool:
        return len(self.example.input_ids) < self.length_seen


@dataclass(frozen=True)
class PreparedRow:
    """A row's examples; `dropped` says why there is none to train on."""

    number: int
    examples: tuple[Prepared, ...]
    dropped: str | None
    spells_controls: bool = False


class RowTokenizer:
    """Rows in, examples out, for one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: frozenset[int],
        *,
        limits: Limits,
        everything: bool,
    ) -> None:
        controls = Controls(tokenizer, stop_token_ids)
        self._encoder = Encoder(tokenizer, controls)
        self._plain = PlainLayout(tokenizer)
        self._template = ChatTemplate(tokenizer, controls) if tokenizer.chat_template else None
        self._conversations = (
            ConversationMarker(self._template, controls, everything=everything) if self._template else None
        )
        self._everything = everything
        self._limits = limits

    @property
    def notes(self) -> dict[str, str]:
        """What was found out about the chat template so far."""
        return dict(self._template.notes) if self._template else {}

    def prepare(self, rows: Iterable[PlacedRow], reader: RowReader) -> list[PreparedRow]:
        """The examples of some rows, given with number and place.

        Raises:
            DataError: a row can't be used as it is.
        """
        read: list[tuple[int, str, list[MarkedText], str | None]] = []
        for number, place, row in rows:
            content = reader.read(place, row)
            empty = content.empty if not (self._everything and isinstance(content, Conversation)) else None
            read.append((number, place, [] if empty else self._mark(place, content), empty))
        encoded = iter(self._encoder.encode([text for _, _, texts, _ in read for text in texts]))
        return [
            self._row(number, place, [(text, next(encoded)) for text in texts], empty)
            for number, place, texts, empty in read
        ]

    def _mark(self, place: str, content: Content) -> list[MarkedText]:
        if isinstance(content, Text):
            return [self._plain.text(content)]
        if isinstance(content, Completion) and self._conversations is None:
            return [self._all(self._plain.completion(content))]
        conversation = _as_conversation(content)
        if self._conversations is None:
            raise DataError(
                f"{place}: a conversation, but the tokenizer has no chat template",
                remedy="Give one as data.chat_template: a file with a Jinja template, such as that of the\n"
                "model's chat version.",
            )
        try:
            return self._conversations.mark(conversation)
        except DataError as error:
            raise _placed(place, error) from error

    def _all(self, marked: MarkedText) -> MarkedText:
        if not self._everything:
            return marked
        return MarkedText(
            marked.text,
            ((0, len(marked.text)),),
            data=marked.data,
            roles=marked.roles,
            before=marked.before,
            append=marked.append,
        )

    def _row(
        self,
        number: int,
        place: str,
        encoded: list[tuple[MarkedText, Example | DataError]],
        empty: str | None,
    ) -> PreparedRow:
        prepared = []
        for marked, example in encoded:
            if isinstance(example, DataError):
                raise _placed(place, example)
            prepared.append(self._limited(place, marked, example))
        dropped = empty
        if prepared and all(one.dropped for one in prepared):
            dropped = prepared[0].dropped
        spells = any(self._encoder.spells_controls(marked) for marked, _ in encoded)
        return PreparedRow(number, tuple(prepared), dropped, spells)

    def _limited(self, place: str, marked: MarkedText, example: Example) -> Prepared:
        length, limit = len(example.input_ids), self._limits.max_length
        dropped = None
        if length > limit:
            if self._limits.overlong == "error":
                raise DataError(
                    f"{place}: {length:,} tokens, more than data.max_length {limit}",
                    remedy="Raise data.max_length, or set data.overlong to truncate or drop.",
                )
            if self._limits.overlong == "drop":
                dropped = f"longer than data.max_length {limit}"
            example = Example(example.input_ids[:limit], example.trained[:limit])
            if dropped is None and not example.trained.any():
                dropped = f"no trained token within data.max_length {limit}"
        elif not example.trained.any():
            dropped = "no trained token"
        return Prepared(example, marked, length, dropped)


def _as_conversation(content: Conversation | Completion) -> Conversation:
    """Instruction and prompt-completion rows as one turn each; an input follows the instruction."""
    if isinstance(content, Conversation):
        return content
    asked = f"{content.prompt}\n\n{content.input}" if content.input.strip() else content.prompt
    user: Message = {"role": "user", "content": asked}
    return Conversation((user, {"role": "assistant", "content": content.completion}), frozenset({1}))


def _placed(place: str, error: DataError) -> DataError:
    return DataError(f"{place}: {error.message}", remedy=error.remedy)
