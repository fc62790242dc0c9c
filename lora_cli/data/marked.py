"""Rendered text with the characters that count.

What templates and plain layouts produce and the encoder turns into tokens. Spans are half-open ranges of
characters. Knows nothing about tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class MarkedText:
    """One example, rendered."""

    text: str
    trained: tuple[Span, ...]
    """The assistant's words, each with what ends the turn."""
    others: tuple[Span, ...] = ()
    """Content of other roles: a token that reaches into it is never trained."""
    data: tuple[Span, ...] = ()
    """All text that comes from the row; control tokens spelled in it stay text."""
    roles: tuple[str, ...] = ()
    """Whose words each piece of `data` is."""
    before: tuple[int, ...] = ()
    """Ids that precede the text, not trained unless everything is."""
    append: int | None = None
    """A stop token to put after the text, trained."""
