"""From what a user typed, or a line of a file holds, to the token ids that a model is given.

A prompt is laid out as the rows were in training: through the chat template where there is one, as a task where the
run was trained on instructions, as it is otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.data.formats import Completion
from lora_cli.data.jinja import JinjaTemplate
from lora_cli.data.loading import open_sources
from lora_cli.data.plain import PlainLayout
from lora_cli.engine.trained import Target
from lora_cli.errors import DataError, UserError
from lora_cli.evaluate.models import Reader

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    text: str
    """As it is shown; the last thing said, in a conversation."""
    messages: tuple[Message, ...] = ()
    """The conversation up to here, `text` included; empty where there is none."""


class Layout:
    """How prompts are laid out for a target."""

    def __init__(self, target: Target, reader: Reader, *, raw: bool = False, system: str | None = None) -> None:
        self._reader = reader
        self._templated = bool(reader.tokenizer.chat_template) and not raw
        self._instruction = not raw and _trained_on_instructions(target)
        self._system = system
        if system is not None and not self._templated:
            raise UserError("--system: there is no chat template that would give it a place")

    @property
    def templated(self) -> bool:
        """Whether a conversation can be held: there is a chat template."""
        return self._templated

    def tokens(self, prompt: Prompt) -> list[int]:
        """The token ids that a model is given for a prompt.

        Raises:
            UserError: it is empty, leaves no room to answer in, or is a conversation that can't be laid out.
        """
        ids = self._chat(prompt) if self._templated else self._plain(prompt)
        if not ids:
            raise UserError("an empty prompt", remedy="Give at least one word.")
        limit = self._reader.position_limit
        if limit is not None and len(ids) >= limit:
            begins = f"{prompt.text[:40]!r}..."
            raise UserError(f"a prompt of {len(ids):,} tokens fills the model's {limit:,} positions: {begins}")
        return ids

    def _chat(self, prompt: Prompt) -> list[int]:
        messages = list(prompt.messages or [{"role": "user", "content": prompt.text}])
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        tokenizer = self._reader.tokenizer
        try:
            text = JinjaTemplate(tokenizer).render(messages, (), generation=True)
        except DataError as error:
            raise UserError(f"the prompt {prompt.text[:40]!r}: {error.message}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain(self, prompt: Prompt) -> list[int]:
        if len(prompt.messages) > 1:
            raise UserError(
                f"a conversation of {len(prompt.messages)} messages needs a chat template, and there is none",
                remedy="Give single prompts, or a template: --set data.chat_template=FILE.",
            )
        tokenizer = self._reader.tokenizer
        laid_out = PlainLayout(tokenizer).completion(Completion(prompt.text, "", instruction=self._instruction))
        return [*laid_out.before, *tokenizer(laid_out.text, add_special_tokens=False)["input_ids"]]


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Prompts as given, then those of a file: one in each line that isn't blank; in a .jsonl file each line holds a
    string, a `prompt`, or the `messages` of a conversation.

    Raises:
        UserError: the file can't be read.
    """
    given = [Prompt(prompt) for prompt in prompts]
    if file is None:
        return given
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {file.absolute()} can't be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if file.suffix == ".jsonl":
        return [*given, *(_of_line(line, f"{file.absolute()}:{number}") for number, line in numbered)]
    return [*given, *(Prompt(line) for _, line in numbered)]


def _of_line(line: str, place: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    if isinstance(value, dict) and "messages" in value:
        messages = value["messages"]
        whole = isinstance(messages, list) and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in messages
        )
        if not whole or not messages:
            raise UserError(f"{place}: messages is no list of {{role, content}}")
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # the answer that the row gives
        kept = tuple({"role": one["role"], "content": one["content"]} for one in messages)
        if not kept:
            raise UserError(f"{place}: nothing is asked before the answer")
        return Prompt(kept[-1]["content"], kept)
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"{place} has neither a prompt nor messages")
    return Prompt(text)


def _trained_on_instructions(target: Target) -> bool:
    if target.bare:
        return False
    data = target.config.data
    try:
        return open_sources(data.train)[0].reader(data).format == "instruction"
    except DataError:  # the rows are no longer there
        return data.format == "instruction"
