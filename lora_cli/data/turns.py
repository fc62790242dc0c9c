"""What is known of a turn in a rendered conversation, and small questions about messages and prompts.

Values and text; knows nothing about templates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_cli.data.formats import Message
from lora_cli.data.marked import Span
from lora_cli.errors import DataError

PLAIN_KEYS = {"role", "content"}
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Turn:
    """The last message of a rendered conversation."""

    text: str
    start: int
    """Where its words begin."""
    stop: int
    """Where they end."""
    end: int
    """Where the control tokens that close it end; `stop` where the template closes it with none."""
    append: int | None
    """The stop token that the model is to produce where the template writes none."""

    @property
    def trained(self) -> Span:
        """The words and what ends them; a token to append follows the white space after the words."""
        return self.start, self.end if self.append is None else len(self.text)


@dataclass(frozen=True)
class Rendering:
    """One example of a conversation: its first `messages` messages, rendered."""

    messages: int
    text: str
    trained: tuple[Span, ...]
    append: int | None


def hidden_words(field: str, why: str) -> DataError:
    return DataError(
        f"{field}: can't tell which rendered characters are the assistant's words: {why}",
        remedy="Give the content without thinking tags (thinking has a key of its own, reasoning_content),\n"
        "or give a template that renders all of it as data.chat_template.",
    )


def message_parts(message: Message) -> list[tuple[str, str]]:
    """What the row says in a turn, piece by piece, as far as templates write it unchanged."""
    parts = [("content", message["content"] or "")]
    parts += [(key, message[key]) for key in _THINKING_KEYS if isinstance(message.get(key), str)]
    for call in message.get("tool_calls") or []:
        if isinstance(call, dict):
            function = call.get("function", call)
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                parts.append(("tool_calls", function["name"]))
    return parts


def squeezed(text: str) -> str:
    """Without white space, which templates trim and add."""
    return "".join(text.split())


def shown_end(prompt: str) -> str:
    """The end of a prompt as it is shown, without the stand-in words of whoever asked for it."""
    return re.split(r"zq\w+qz", prompt)[-1][-40:]
