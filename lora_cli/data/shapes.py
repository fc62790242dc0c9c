"""Marked text of conversations, at the cost of one rendering for most.

Where a turn's words stand depends on a conversation's shape: its roles, tools and whatever else is not
content. So the spans are derived once per shape, on the conversation with stand-in words for its contents. A
row's own rendering is then held against that text: literal parts must be equal character by character and
each content must stand in its slot. A row whose rendering differs anywhere (its content means something to
the template) is derived by itself. Knows characters only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_cli.data.controls import Controls
from lora_cli.data.formats import Conversation, Message
from lora_cli.data.marked import MarkedText, Span
from lora_cli.data.template import ChatTemplate
from lora_cli.data.turns import PLAIN_KEYS, Rendering
from lora_cli.errors import DataError

_SLOT = re.compile(r"zqSlot(\d+)qz")
_MOST_SHAPES = 2048


@dataclass(frozen=True)
class Shape:
    """A rendering with stand-in words for the contents."""

    rendering: Rendering
    literals: tuple[str, ...]
    """The text before, between and after the slots."""
    slots: tuple[int, ...]
    """Which message's content stands in each slot."""
    ends: tuple[int, ...]
    """Where each slot ends in the stand-in text."""

    def fit(self, text: str, messages: Sequence[Message]) -> tuple[Span, ...] | None:
        """Where each slot is in the real text, or None unless the text is this shape filled in."""
        if not text.startswith(self.literals[0]):
            return None
        position = len(self.literals[0])
        found: list[Span] = []
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            for content in _trimmings(messages[slot]["content"] or ""):
                end = position + len(content)
                if text.startswith(content, position) and text.startswith(literal, end):
                    found.append((position, end))
                    position = end + len(literal)
                    break
            else:
                return None
        return tuple(found) if position == len(text) else None

    def marked(self, text: str, found: tuple[Span, ...], conversation: Conversation) -> MarkedText:
        """The real text, with the stand-in's spans moved to where they are in it."""
        shifts = [real - stand_in for (_, real), stand_in in zip(found, self.ends, strict=True)]

        def moved(position: int) -> int:
            # Spans begin and end at the edges of slots or in literals: only whole slots before it count.
            shift = 0
            for end, by in zip(self.ends, shifts, strict=True):
                if end > position:
                    break
                shift = by
            return position + shift

        placed = list(zip(found, self.slots, strict=True))
        others = tuple(span for span, slot in placed if slot not in conversation.trained)
        roles = tuple(str(conversation.messages[slot]["role"]) for _, slot in placed)
        spans = tuple((moved(start), moved(end)) for start, end in self.rendering.trained)
        return MarkedText(text, spans, others, found, roles, append=self.rendering.append)


class ConversationMarker:
    """Conversations in, marked text out, for one template."""

    def __init__(self, template: ChatTemplate, controls: Controls, *, everything: bool) -> None:
        self._template = template
        self._controls = controls
        self._everything = everything
        self._shapes: dict[str, tuple[Shape, ...]] = {}

    def mark(self, conversation: Conversation) -> list[MarkedText]:
        """The examples of a conversation.

        Raises:
            DataError: the template refuses the row or hides where the words are, or the row spells a control
                token where it can't be told from the template's own.
        """
        self._refuse_controls_outside_contents(conversation)
        messages = conversation.messages
        shapes = self._shapes_of(conversation)
        if not shapes:
            return self._by_itself(conversation)
        marked = []
        for shape in shapes:
            text = self._template.render(messages[: shape.rendering.messages], conversation.tools)
            found = shape.fit(text, messages)
            if found is None:
                return self._by_itself(conversation)
            marked.append(shape.marked(text, found, conversation))
        return [self._all(one) for one in marked] if self._everything else marked

    def _shapes_of(self, conversation: Conversation) -> tuple[Shape, ...]:
        key = _key(conversation)
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._derive(conversation)
        return self._shapes[key]

    def _derive(self, conversation: Conversation) -> tuple[Shape, ...]:
        stand_ins = [
            message if _is_blank(message) else {**message, "content": f"zqSlot{index}qz"}
            for index, message in enumerate(conversation.messages)
        ]
        try:
            renderings = self._renderings(replace(conversation, messages=tuple(stand_ins)))
        except DataError:  # the template wants something of the contents; the row itself will show
            return ()
        return tuple(_shape(rendering) for rendering in renderings)

    def _renderings(self, conversation: Conversation) -> list[Rendering]:
        messages, tools = conversation.messages, conversation.tools
        if not self._everything:
            return self._template.renderings(messages, conversation.trained, tools)
        text = self._template.render(messages, tools)
        append = None
        if messages[-1]["role"] == "assistant":
            append = self._template.turn(messages, tools).append
        return [Rendering(len(messages), text, ((0, len(text)),), append)]

    def _by_itself(self, conversation: Conversation) -> list[MarkedText]:
        for index, message in enumerate(conversation.messages):
            spelled = self._controls.first_in(message["content"] or "")
            if spelled is not None:
                raise _control_error(f"messages[{index}].content", spelled)
        # Between another role's content and the words there is always some of the template's own text in a
        # rendering derived this way, so no token can reach from one into the other.
        renderings = self._renderings(conversation)
        return [MarkedText(one.text, one.trained, append=one.append) for one in renderings]

    def _all(self, marked: MarkedText) -> MarkedText:
        return replace(marked, trained=((0, len(marked.text)),), others=())

    def _refuse_controls_outside_contents(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            if message.keys() - PLAIN_KEYS:
                extras = {key: value for key, value in message.items() if key not in PLAIN_KEYS}
                spelled = self._controls.first_in(json.dumps(extras, ensure_ascii=False, default=str))
                if spelled is not None:
                    raise _control_error(f"messages[{index}]", spelled)
        if conversation.tools:
            spelled = self._controls.first_in(json.dumps(conversation.tools, ensure_ascii=False, default=str))
            if spelled is not None:
                raise _control_error("tools", spelled)


def _control_error(field: str, spelled: str) -> DataError:
    return DataError(
        f"{field} spells {spelled!r}, a control token of this tokenizer, where it can't be kept as text",
        remedy="Take it out of the row, or spell it otherwise.",
    )


def _shape(rendering: Rendering) -> Shape:
    matches = list(_SLOT.finditer(rendering.text))
    edges = [0, *(edge for match in matches for edge in match.span()), len(rendering.text)]
    literals = tuple(rendering.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
    return Shape(
        rendering,
        literals,
        tuple(int(match.group(1)) for match in matches),
        tuple(match.end() for match in matches),
    )


def _key(conversation: Conversation) -> str:
    """Everything about a conversation but its contents; blank ones count, as templates leave out what is empty."""
    parts: list[object] = [conversation.tools]
    for index, message in enumerate(conversation.messages):
        blank = message["content"] if _is_blank(message) else True
        parts.append((message["role"], index in conversation.trained, blank))
        if message.keys() - PLAIN_KEYS:
            parts.append({key: value for key, value in message.items() if key not in PLAIN_KEYS})
    return json.dumps(parts, default=str)


def _is_blank(message: Message) -> bool:
    return not (message["content"] or "").strip()


def _trimmings(content: str) -> tuple[str, ...]:
    """The content as templates write it: as it is, or with white space cut from its ends."""
    bare = content.strip()
    if bare == content:
        return (content,)
    line = "\n"
    forms = (content, bare, content.lstrip(), content.rstrip(), content.strip(line))
    return (*forms, content.lstrip(line), content.rstrip(line))
