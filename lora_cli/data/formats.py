"""What a row means: a conversation, a prompt with its completion, an instruction, or a text.

The format is found by the columns of a source's first row, or said in the config. Everything that can be
wrong with a row's columns is an error here, with the row's place and the field. Knows nothing about
tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_cli.data.files import Row
from lora_cli.errors import DataError

Message = dict[str, Any]
"""A message as chat templates take it: role, content, and whatever else the row gives."""

RowFormat = Literal["text", "instruction", "prompt_completion", "chat"]

# A source is of the first format whose columns its first row has; the order settles rows that fit several
# (alpaca's own files also have a `text` column with the whole thing in one layout).
FORMATS: dict[RowFormat, tuple[frozenset[str], ...]] = {
    "chat": (frozenset({"messages"}), frozenset({"conversations"})),
    "prompt_completion": (frozenset({"prompt", "completion"}),),
    "instruction": (frozenset({"instruction", "output"}),),
    "text": (frozenset({"text"}),),
}

ROLES = ("system", "developer", "user", "assistant", "tool")

# ShareGPT's names for the speakers.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template."""

    messages: tuple[Message, ...]
    trained: frozenset[int]
    """Which messages are answers to train on; all are the assistant's."""
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def empty(self) -> str | None:
        """Why there is nothing to train on, if so."""
        if not self.trained:
            return "no turn is trained"
        if all(self._is_blank(self.messages[index]) for index in self.trained):
            return "answer empty"
        return None

    def _is_blank(self, message: Message) -> bool:
        return not message.keys() - {"role", "content"} and not (message["content"] or "").strip()


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it; with `instruction`, a task in words, to be laid out as one."""

    prompt: str
    completion: str
    instruction: bool = False
    input: str = ""

    @property
    def empty(self) -> str | None:
        return None if self.completion.strip() else "answer empty"


@dataclass(frozen=True)
class Text:
    """A text to be trained on whole."""

    text: str

    @property
    def empty(self) -> str | None:
        return None if self.text.strip() else "text empty"


Content = Conversation | Completion | Text


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source."""

    format: RowFormat
    columns: Mapping[str, str]
    """Our names for columns to the source's, where they differ."""
    answers_needed: bool = True
    """A conversation without an assistant is a mistake; where every token is trained it isn't."""

    def read(self, place: str, row: Row) -> Content:
        """What the row means.

        Raises:
            DataError: a column is missing, or holds something else than it should.
        """
        match self.format:
            case "text":
                return Text(self._string(place, row, "text"))
            case "instruction":
                instruction, output = (self._string(place, row, name) for name in ("instruction", "output"))
                extra = self._value(row, "input")
                return Completion(instruction, output, True, "" if extra is None else self._string(place, row, "input"))
            case "prompt_completion":
                return self._prompt_completion(place, row)
            case "chat":
                sharegpt = self._theirs("conversations") in row and self._theirs("messages") not in row
                field = "conversations" if sharegpt else "messages"
                messages = self._messages(place, row, field)
                return self._conversation(place, row, field, messages, 0)

    def _prompt_completion(self, place: str, row: Row) -> Content:
        prompt, completion = (self._value(row, name) for name in ("prompt", "completion"))
        if not isinstance(prompt, list) and not isinstance(completion, list):
            return Completion(self._string(place, row, "prompt"), self._string(place, row, "completion"))
        asked = self._messages(place, row, "prompt")
        answered = self._messages(place, row, "completion")
        return self._conversation(place, row, "completion", asked + answered, len(asked))

    def _conversation(
        self, place: str, row: Row, field: str, messages: list[Message], first_answer: int
    ) -> Conversation:
        trained = set()
        answers = 0
        for index, message in enumerate(messages):
            wanted = message.pop("train", True)
            if not isinstance(wanted, bool):
                raise DataError(
                    f"{place}: {field}[{index}].train is {_shown(wanted)}", remedy="It must be true or false."
                )
            if message["role"] == "assistant":
                answers += 1
                if wanted and index >= first_answer:
                    trained.add(index)
        if self.answers_needed and answers == 0:
            raise DataError(
                f"{place}: {field} has no assistant message, so there is nothing to train on",
                remedy="Remove the row, or add the answer.",
            )
        if messages[0]["role"] == "assistant":
            raise DataError(
                f"{place}: {field} begins with the assistant, who has nothing to answer yet",
                remedy="Begin with a user (or system) message.",
            )
        return Conversation(tuple(messages), frozenset(trained), self._tools(place, row))

    def _messages(self, place: str, row: Row, field: str) -> list[Message]:
        value = self._parsed(self._present(place, row, field))
        if not isinstance(value, list) or not value:
            raise DataError(f"{place}: {field} is {_shown(value)}", remedy="It must be a list of messages.")
        return [self._message(place, f"{field}[{index}]", one) for index, one in enumerate(value)]

    def _message(self, place: str, field: str, value: object) -> Message:
        if not isinstance(value, dict):
            raise DataError(
                f"{place}: {field} is {_shown(value)}", remedy="It must be an object with role and content."
            )
        # Arrow fills the keys that other messages have with nulls.
        message: Message = {key: item for key, item in value.items() if item is not None}
        if "role" not in message and "from" in message:
            speaker = message.pop("from")
            content = message.pop("value", None)
            role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
            if role is None:
                raise DataError(
                    f"{place}: {field}.from is {_shown(speaker)}, an unknown speaker",
                    remedy=f"Known are {', '.join(_SHAREGPT_ROLES)}.",
                )
            message = {"role": role, **message} if content is None else {"role": role, "content": content, **message}
            content_name = "value"
        else:
            content_name = "content"
        if message.get("role") not in ROLES:
            raise DataError(
                f"{place}: {field}.role is {_shown(message.get('role'))}, an unknown role",
                remedy=f"Known are {', '.join(ROLES)}.",
            )
        message["content"] = _content(place, f"{field}.{content_name}", message)
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
        return message

    def _tools(self, place: str, row: Row) -> tuple[dict[str, Any], ...]:
        value = self._parsed(self._value(row, "tools"))
        if value is None or value == "":
            return ()
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise DataError(f"{place}: tools is {_shown(value)}", remedy="It must be a list of JSON schemas.")
        return tuple(value)

    def _parsed(self, value: object) -> object:
        """CSV and some Parquet files hold lists as JSON."""
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except json.JSONDecodeError:
                return value
        return value

    def _string(self, place: str, row: Row, column: str) -> str:
        value = self._present(place, row, column)
        if not isinstance(value, str):
            raise DataError(f"{place}: {self._theirs(column)} is {_shown(value)}", remedy="It must be a string.")
        return value

    def _present(self, place: str, row: Row, column: str) -> object:
        if self._theirs(column) not in row:
            raise DataError(
                f"{place}: no column {self._theirs(column)!r}, which {self.format} rows need",
                remedy=f"The row has: {', '.join(row) or 'no columns'}. Set data.columns or data.format.",
            )
        return row[self._theirs(column)]

    def _value(self, row: Row, column: str) -> object:
        return row.get(self._theirs(column))

    def _theirs(self, column: str) -> str:
        return self.columns.get(column, column)


def find_format(place: str, row: Row, columns: Mapping[str, str]) -> RowFormat:
    """The format whose columns a row has.

    Raises:
        DataError: it has those of none.
    """
    present = {ours for names in FORMATS.values() for one in names for ours in one if columns.get(ours, ours) in row}
    for found, choices in FORMATS.items():
        if any(needed <= present for needed in choices):
            return found
    needs = "; ".join(f"{name}: {' or '.join(', '.join(sorted(c)) for c in cs)}" for name, cs in FORMATS.items())
    raise DataError(
        f"{place}: the columns fit no format: {', '.join(row) or 'there are none'}",
        remedy=f"Formats need these columns: {needs}.\nOther names: data.columns, as {{text: body}}.",
    )


def _content(place: str, field: str, message: Message) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and message.keys() - {"role", "content", "train"}:
        return None  # an assistant that only calls tools
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise DataError(f"{place}: {field} is {_shown(content)}", remedy="It must be a string.")


def _with_parsed_arguments(call: object) -> object:
    """A tool call whose arguments are an object; OpenAI's API gives them as JSON, which templates would quote."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_parsed_arguments(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, json.JSONDecodeError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
