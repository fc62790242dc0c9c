"""What a test needs to know of a model family's chat format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    name: str
    template: str
    specials: tuple[str, ...]
    stops: tuple[str, ...]
    bos: str | None = None
    eos: str = "<|im_end|>"
    system: bool = True
    plain_added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    rewrites: bool = False
    """Whether a conversation of several turns becomes several examples."""
    end: str = ""
    """How a turn ends, as the published definition says; the first of `stops` where empty."""
    tail: str = ""
    """What the template writes between the words and that token."""
    moves: bool = False
    """Whether the system prompt stands before the last question, wherever that is at the time."""
    call: str | None = None
    """What is trained of a turn that calls `weather` with {"city": "Bern"}, without white space; None where the
    format has no tool calls."""
    call_end: str = ""
    """How such a turn ends; `end` where empty."""
    thought: str | None = None
    """What is trained of the thinking `hm` in front of an answer, without white space; None where a row with
    reasoning_content is refused."""

    @property
    def turn_end(self) -> str:
        return self.tail + (self.end or self.stops[0])
