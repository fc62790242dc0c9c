"""The tokenizer's control tokens, as they are spelled in text.

Knows which spellings turn into one control token, and which of those end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOTHING = r"(?!)"


class Controls:
    """The special tokens of a tokenizer and the model's stop tokens.

    Added tokens that are neither (`<think>` in Qwen 3) are words like any other: a row that spells one means
    it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> None:
        self.ids: dict[str, int] = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or number in stop_token_ids
        }
        self._stops = {name for name, number in self.ids.items() if number in stop_token_ids}
        # Longest first: one control token may begin with another.
        either = "|".join(re.escape(name) for name in sorted(self.ids, key=lambda name: (-len(name), name)))
        self._one = re.compile(either or _NOTHING)
        self._leading = re.compile(rf"(?:\s*(?:{either or _NOTHING}))+")
        self._trailing = re.compile(rf"(?:\s*(?:{either or _NOTHING}))*\s*\Z")

    def find(self, text: str) -> Iterator[re.Match[str]]:
        return self._one.finditer(text)

    def first_in(self, text: str) -> str | None:
        found = self._one.search(text)
        return found.group() if found else None

    def closing(self, text: str, position: int, limit: int) -> tuple[int, str | None]:
        """Where the turn whose words end at `position` is closed, and by which token.

        Up to the first stop token behind the words and before `limit`, whatever the template writes in front of
        it: the model has to write that too. Where there is none, the first of the control tokens that follow at
        once (white space aside); `position` itself where there are none.
        """
        for token in self._one.finditer(text, position, limit):
            if token.group() in self._stops:
                return token.end(), token.group()
        run = self._leading.match(text, position, limit)
        if run is None:
            return position, None
        first = next(self._one.finditer(text, position, run.end()))
        return first.end(), first.group()

    def stop_at(self, text: str, position: int) -> tuple[int, int] | None:
        """The end and the id of the stop token that stands at `position`, white space aside."""
        while position < len(text) and text[position].isspace():
            position += 1
        found = self._one.match(text, position)
        if found is None or found.group() not in self._stops:
            return None
        return found.end(), self.ids[found.group()]

    def is_stop(self, name: str) -> bool:
        return name in self._stops

    def words_end(self, text: str, start: int) -> int:
        """Where the control tokens and the white space at the very end of the text begin."""
        found = self._trailing.search(text, start)
        assert found is not None  # it matches the empty end
        return found.start()
