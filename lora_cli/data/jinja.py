"""A tokenizer's chat template as a function from messages to text.

A template comes with a model from others: it runs in transformers' sandbox, within bounds of time and size. The same
text on every day: a template that writes the date is given a fixed one, so that a run can be repeated and a cache be
trusted. Knows nothing about spans or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_cli.bounds import OutOfBounds, bounded
from lora_cli.data.formats import Message
from lora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[dict[str, Any]]

DAY = datetime(2024, 7, 26)
"""What templates are told that today is. Llama 3's own templates fall back to this day where they know none."""

_LONGEST, _GROWTH = 1 << 20, 16
"""A rendered conversation may have that many characters, or that many times its own."""
_OTHER_TEMPLATE = "Give another template as data.chat_template."

_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBdfHIjmMpSUwWxXyYcGuV"


class JinjaTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._out_of_bounds: DataError | None = None
        """Once is enough: whoever asks for another rendering is not to wait again."""

    @property
    def tells_time(self) -> bool:
        """Whether the template may write today's date."""
        return _CLOCK in str(self._tokenizer.chat_template)

    def render(self, messages: Sequence[Message], tools: Tools, *, generation: bool = False) -> str:
        """The template's text.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self._render(messages, tools, generation)
        except DataError:
            # An assistant that only calls tools says nothing. transformers leaves such a content out of the
            # message, and some templates can't do without one.
            if all(message["content"] is not None for message in messages):
                raise
        return self._render(
            [{**message, "content": message["content"] or ""} for message in messages], tools, generation
        )

    def _render(self, messages: Sequence[Message], tools: Tools, generation: bool) -> str:
        import jinja2

        if self._out_of_bounds is not None:
            raise self._out_of_bounds
        given: list[Any] | None = list(tools) or None
        try:
            with bounded():
                text = str(
                    self._tokenizer.apply_chat_template(
                        list(messages),
                        tools=given,
                        chat_template=_timeless(self._tokenizer.get_chat_template(tools=given)),
                        tokenize=False,
                        add_generation_prompt=generation,
                    )
                )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is broken: line {error.lineno}: {error.message}") from error
        except OutOfBounds as error:
            self._out_of_bounds = DataError(f"the chat template {error}", remedy=_OTHER_TEMPLATE)
            raise self._out_of_bounds from error
        except Exception as error:  # a template is a program: it may raise whatever Python can
            raise DataError(
                f"the chat template refuses the conversation: {str(error).strip() or type(error).__name__}",
                remedy="Change the row, or give a template that takes it as data.chat_template.",
            ) from error
        if len(text) > _LONGEST and len(text) > _GROWTH * len(str([messages, given])):
            raise DataError(
                f"the chat template makes {len(text):,} characters of a conversation of {len(str(messages)):,}",
                remedy=_OTHER_TEMPLATE,
            )
        return text


@lru_cache(maxsize=4)
def _timeless(template: str) -> str:
    """The template, with a clock that stands still."""
    if _CLOCK not in template:
        return template
    filled = "format"
    for directive in _DIRECTIVES:
        filled += f" | replace('%{directive}', '{DAY.strftime(f'%{directive}')}')"
    # On the template's own first line, so that messages about its lines stay true; the empty expression keeps
    # what follows from losing a newline to the end of the block.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ {filled} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"
