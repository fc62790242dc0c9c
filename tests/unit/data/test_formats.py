"""What rows mean, and what is said about rows that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest

from lora_cli.data.formats import Completion, Conversation, RowReader, Text, find_format
from lora_cli.errors import DataError

ASK = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def meaning(row: dict[str, Any], columns: dict[str, str] | None = None) -> Conversation | Completion | Text:
    found = find_format("t:1", row, columns or {})
    return RowReader(found, columns or {}).read("t:1", row)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "a"}, Text("a")),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"instruction": "a", "output": "b"}, Completion("a", "b", True)),
        ({"instruction": "a", "input": "c", "output": "b"}, Completion("a", "b", True, "c")),
        ({"instruction": "a", "input": None, "output": "b"}, Completion("a", "b", True)),
        # The published alpaca file has a text column too.
        ({"instruction": "a", "input": "", "output": "b", "text": "Below is"}, Completion("a", "b", True)),
        ({"messages": [ASK, ANSWER]}, Conversation((ASK, ANSWER), frozenset({1}))),
        ({"messages": [ASK, ANSWER], "prompt": "hi"}, Conversation((ASK, ANSWER), frozenset({1}))),
        ({"prompt": [ASK], "completion": [ANSWER]}, Conversation((ASK, ANSWER), frozenset({1}))),
        ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, Conversation((ASK, ANSWER) * 2, frozenset({3}))),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            Conversation((ASK, ANSWER), frozenset({1})),
        ),
        # A CSV can hold a conversation as JSON only.
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'},
         Conversation((ASK, ANSWER), frozenset({1}))),
        ({"messages": [{**ASK, "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
         Conversation((ASK, ANSWER), frozenset({1}))),
        # Arrow fills in the keys of other rows' messages.
        ({"messages": [{**ASK, "tool_calls": None}, ANSWER]}, Conversation((ASK, ANSWER), frozenset({1}))),
        ({"messages": [ASK, {**ANSWER, "train": False}, ASK, ANSWER]},
         Conversation((ASK, ANSWER) * 2, frozenset({3}))),
    ],
)  # fmt: skip
def test_formats_are_found_by_columns(row: dict[str, Any], wanted: object) -> None:
    assert meaning(row) == wanted


def test_columns_can_have_other_names() -> None:
    columns = {"prompt": "question", "completion": "reply"}
    assert meaning({"question": "a", "reply": "b"}, columns) == Completion("a", "b")
    with pytest.raises(DataError, match=r"t:1: no column 'reply'.*\nThe row has: question, prompt"):
        RowReader("prompt_completion", columns).read("t:1", {"question": "a", "prompt": "c"})


def test_thinking_tools_and_calls_are_kept() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    found = meaning({"messages": [ASK, answer], "tools": '[{"type": "function"}]'})
    assert isinstance(found, Conversation)
    assert found.messages[1] == answer
    assert found.tools == ({"type": "function"},)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"t:1: the columns fit no format: question\nFormats need these columns: chat: messages or"),
        ({"text": None}, r"t:1: text is null"),
        ({"text": 7}, r"t:1: text is 7\nIt must be a string"),
        ({"prompt": "a", "completion": 3.5}, r"t:1: completion is 3.5"),
        ({"prompt": [ASK], "completion": "b"}, r't:1: completion is "b"'),
        ({"instruction": "a", "input": 3, "output": "b"}, r"t:1: input is 3"),
        ({"messages": []}, r"t:1: messages is \[\]"),
        ({"messages": "hi"}, r't:1: messages is "hi"'),
        ({"messages": ["hi"]}, r't:1: messages\[0\] is "hi"'),
        (
            {"messages": [{"role": "narrator", "content": "a"}]},
            r't:1: messages\[0\].role is "narrator", an unknown',
        ),
        ({"messages": [{"content": "a"}]}, r"t:1: messages\[0\].role is null"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, r"t:1: messages\[1\].content is null"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, r"t:1: messages\[0\].content is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, r"messages\[0\].content is \[\{"),
        ({"messages": [ASK]}, r"t:1: messages has no assistant message"),
        ({"messages": [ANSWER, ASK]}, r"t:1: messages begins with the assistant"),
        ({"messages": [ASK, {**ANSWER, "train": "no"}]}, r't:1: messages\[1\].train is "no"'),
        ({"messages": [ASK, ANSWER], "tools": "f"}, r't:1: tools is "f"'),
        ({"conversations": [{"from": "alien", "value": "a"}]}, r't:1: conversations\[0\].from is "alien"'),
        ({"conversations": [{"from": "human"}]}, r"t:1: conversations\[0\].value is null"),
    ],
)
def test_bad_rows_name_place_and_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        meaning(row)


def test_rows_are_left_as_they_were() -> None:
    """Reading takes `train` off the messages that go to the template: never off the caller's."""
    row = {"messages": [dict(ASK), {**ANSWER, "train": True}]}
    meaning(row)
    assert row == {"messages": [ASK, {**ANSWER, "train": True}]}
