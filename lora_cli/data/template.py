"""The exact characters that each assistant's turn has in a rendered conversation.

Templates say nothing about spans, so they are derived, by rendering and comparing:

- A turn with plain content is rendered twice, once with its content replaced by a word that is nowhere else.
  What stands in its place is the content (but for white space at its ends), or the template changes it.
- A turn with thinking or tool calls, and one whose content the template rearranges, is what follows the
  generation prompt: all of it is what the model has to produce.
- The turn ends in the control token after its words: the model's stop token, if there is one (`Controls`).

A conversation is one example if each turn stands in the whole as it does when it is the last one. A template
that rewrites earlier turns (thinking stripped, tools moved) gives one example per trained turn, each rendered
as inference would see it. Where neither way finds the words, that is an error.

Knows characters; knows nothing about tokens beyond the spelling of control tokens. `shapes` makes this fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_cli.data.controls import Controls
from lora_cli.data.formats import Message
from lora_cli.data.jinja import DAY, JinjaTemplate, Tools
from lora_cli.data.marked import Span
from lora_cli.data.turns import PLAIN_KEYS, Rendering, Turn, hidden_words, message_parts, shown_end, squeezed
from lora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "zqStandInWordqz"
_ANSWER = "zqStandInAnswerqz"


class ChatTemplate:
    """A tokenizer's chat template, and how it lays out turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Controls) -> None:
        self._jinja = JinjaTemplate(tokenizer)
        self._controls = controls
        eos = tokenizer.eos_token
        self._eos: int | None = controls.ids.get(eos) if eos and controls.is_stop(eos) else None
        self.notes: dict[str, str] = {}
        """Things about the template that the user should know, by kind."""
        if self._jinja.tells_time:
            self.notes["date"] = (
                f"the chat template writes today's date: it is {DAY:%d %b %Y} in all rows, "
                "so that the run can be repeated"
            )

    def render(self, messages: Sequence[Message], tools: Tools, *, generation: bool = False) -> str:
        """The template's text.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._jinja.render(messages, tools, generation=generation)

    def renderings(self, messages: Sequence[Message], trained: frozenset[int], tools: Tools) -> list[Rendering]:
        """The examples of a conversation: one, or one per trained turn where earlier turns are rewritten.

        Raises:
            DataError: the template refuses the conversation, or hides where a turn's words are.
        """
        order = sorted(trained)
        turns = [self.turn(messages[: index + 1], tools) for index in order]
        last = len(messages) - 1
        text = turns[-1].text if order[-1] == last else self.render(messages, tools)
        spans = [self._within(text, turn) for turn in turns]
        if all(span is not None for span in spans):
            append = turns[-1].append if order[-1] == last else None
            return [Rendering(len(messages), text, tuple(span for span in spans if span is not None), append)]
        self.notes["rewrites"] = (
            "the chat template writes earlier turns otherwise than the last: such rows become several examples"
        )
        return [
            Rendering(index + 1, turn.text, (turn.trained,), turn.append)
            for index, turn in zip(order, turns, strict=True)
        ]

    def turn(self, messages: Sequence[Message], tools: Tools) -> Turn:
        """Where the last message's words are when the conversation ends with it."""
        text = self.render(messages, tools)
        message = messages[-1]
        prompt = self._prompt(messages, tools)
        words = None
        if not message.keys() - PLAIN_KEYS:
            words = self._around_stand_in(text, messages, tools)
        if words is None:
            words = self._after_prompt(text, prompt, messages, tools)
        start, stop = words
        limit = self._next_turn(text, start, prompt, messages, tools)
        if limit < stop:
            raise hidden_words(f"messages[{len(messages) - 1}]", "another turn follows them")
        end, closed_by = self._controls.closing(text, stop, limit)
        append = None
        if not (closed_by is not None and self._controls.is_stop(closed_by)) and not text[end:].strip():
            append = self._stop_to_append(messages, tools, text, end, closed_by)
        if append is None and closed_by is not None and not self._controls.is_stop(closed_by):
            self.notes["stop"] = (
                f"the chat template ends turns with {closed_by}, which is none of the model's stop tokens: "
                "generation may not end by itself"
            )
        turn = Turn(text, start, stop, end, append)
        if prompt is None or text.startswith(prompt):
            between = text[len(prompt or "") : start].strip()
            if prompt is not None and between:
                self.notes["between"] = (
                    f"the chat template writes {between!r} between the prompt that generation starts from and an "
                    "answer without thinking; it is not trained"
                )
            return turn
        return self._behind_prompt(turn, prompt, messages, tools)

    def _prompt(self, messages: Sequence[Message], tools: Tools) -> str | None:
        """What generation of the last message would start from, if the template can write that."""
        try:
            return self.render(messages[:-1], tools, generation=True)
        except DataError:
            return None

    def _next_turn(self, text: str, start: int, prompt: str | None, messages: Sequence[Message], tools: Tools) -> int:
        """Where another role's turn begins behind `start`, which some templates add; the text's end where none does.

        Turns begin with the control token that the generation prompt begins with; where the whole of that prompt
        stands, it is the assistant who goes on.
        """
        try:
            before = self.render(messages[:-1], tools)
        except DataError:
            return len(text)
        asks = (prompt or "").removeprefix(before).strip()
        opener = self._controls.first_in(asks)
        if prompt is None or not prompt.startswith(before) or opener is None or not asks.startswith(opener):
            return len(text)
        at = text.find(opener, start)
        while at >= 0 and text.startswith(asks, at):
            at = text.find(opener, at + 1)
        return at if at >= 0 else len(text)

    def _header(self, messages: Sequence[Message], tools: Tools) -> str | None:
        """What the template writes in front of the last message when that is a plain answer."""
        try:
            plain = self.render([*messages[:-1], {"role": "assistant", "content": _STAND_IN}], tools)
        except DataError:
            return None
        before, found, _ = plain.partition(_STAND_IN)
        return before if found else None

    def _behind_prompt(self, turn: Turn, prompt: str, messages: Sequence[Message], tools: Tools) -> Turn:
        """The turn behind the prompt that generation starts from, where the template put another there.

        Mistral's templates write the system prompt into the last message if that is the user's, so a
        conversation that ends with an answer has none. What follows the question in both tells where the
        prompt ends.
        """
        asked = [*messages[:-2], {**messages[-2], "content": _STAND_IN}]
        question_end = (self._prompt([*asked, messages[-1]], tools) or "").partition(_STAND_IN)[2]
        behind = self.render([*asked, messages[-1]], tools).partition(_STAND_IN)[2]
        answer = len(turn.text) - len(behind) + len(question_end)
        if not (turn.text.endswith(behind) and behind.startswith(question_end) and answer <= turn.start):
            self.notes["prompt"] = (
                f"generation starts from a prompt that ends in {shown_end(prompt)!r}, which is not what the "
                "chat template writes in front of answers"
            )
            return turn
        shift = len(prompt) - answer
        text = prompt + turn.text[answer:]
        return Turn(text, turn.start + shift, turn.stop + shift, turn.end + shift, turn.append)

    def _around_stand_in(self, text: str, messages: Sequence[Message], tools: Tools) -> Span | None:
        """The words of a plain turn, or None where the template does more than place them."""
        content = messages[-1]["content"] or ""
        replaced = self.render([*messages[:-1], {**messages[-1], "content": _STAND_IN}], tools)
        before, found, after = replaced.partition(_STAND_IN)
        stop = len(text) - len(after)
        if not found or _STAND_IN in after:
            return None
        if not content.strip():
            # Templates leave out the line that an empty content would stand on.
            bare = before.rstrip()
            empty = text.startswith(bare) and text[len(bare) :].strip() == after.strip()
            return (len(bare), len(bare)) if empty else None
        if not len(before) <= stop:
            return None
        if text[: len(before)] != before or text[stop:] != after or text[len(before) : stop].strip() != content.strip():
            return None
        return len(before), stop

    def _after_prompt(self, text: str, prompt: str | None, messages: Sequence[Message], tools: Tools) -> Span:
        """The words of a turn with more than plain content: all that follows the generation prompt."""
        field = f"messages[{len(messages) - 1}]"
        if prompt is None or not text.startswith(prompt):
            prompt = self._header(messages, tools)
        if prompt is None or not text.startswith(prompt):
            raise hidden_words(field, "the rendered turn doesn't begin with the generation prompt")
        start, stop = len(prompt), self._controls.words_end(text, len(prompt))
        message = messages[-1]
        if not message.keys() - PLAIN_KEYS:
            # A prompt may hold the content's beginning (an opening <think>); nothing else may be there.
            content, words = squeezed(message["content"]), squeezed(text[start:stop])
            if not (content.endswith(words) and squeezed(text[:stop]).endswith(content)):
                raise hidden_words(field, "the chat template changes the content")
            return start, stop
        written = squeezed(text[start:])
        for key, part in message_parts(message):
            if squeezed(part) not in written:
                raise DataError(
                    f"{field}.{key}: the chat template leaves it out",
                    remedy="Remove it from the row, or give a template that writes it as data.chat_template.",
                )
        return start, stop

    def _within(self, text: str, turn: Turn) -> Span | None:
        """The turn's span in the whole conversation, or None where the whole has it otherwise."""
        if text[: turn.end] != turn.text[: turn.end]:
            return None
        if len(text) == len(turn.text) or turn.append is None:
            return turn.trained
        # The template leaves the end of a turn to the header of the next one (GLM's <|user|>).
        stop = self._controls.stop_at(text, turn.end)
        return turn.start, turn.end if stop is None else stop[0]

    def _stop_to_append(
        self, messages: Sequence[Message], tools: Tools, text: str, end: int, closed_by: str | None
    ) -> int | None:
        """What the model is to end this turn with: the stop token that a next turn begins with, or EOS.

        No EOS where the template closes the turn with another control token: that is how it ends.
        """
        otherwise = self._eos if closed_by is None else None
        following: Message = {"role": "user", "content": _STAND_IN}
        for call in messages[-1].get("tool_calls") or []:
            following = {"role": "tool", "content": _STAND_IN, "tool_call_id": call.get("id")}
        try:
            longer = self.render([*messages, following], tools)
            if longer.startswith(text[:end]):
                behind = longer[end:]
            else:  # the turn is written otherwise once another follows: without its thinking
                answer: Message = {"role": "assistant", "content": _ANSWER}
                behind = self.render([*messages[:-1], answer, following], tools).partition(_ANSWER)[2]
        except DataError:
            return otherwise
        found = self._controls.stop_at(behind, 0)
        return otherwise if found is None else found[1]
