"""A conversation with one voice at a time, on a base that stays loaded.

Knows nothing about the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lora_cli.data.loading import set_chat_template
from lora_cli.engine.generation import Generated, Sampling, generate_aloud
from lora_cli.engine.trained import find_target
from lora_cli.errors import UserError
from lora_cli.evaluate.models import read_target
from lora_cli.evaluate.prompts import Layout, Message, Prompt
from lora_cli.evaluate.voices import BASE, Voice, find_voices, load_voices
from lora_cli.report.events import Emit, ignore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Conversation:
    """What was said so far, and who answers."""

    def __init__(
        self,
        target: Path | str,
        *,
        adapters: Sequence[str] = (),
        sampling: Sampling,
        overrides: Sequence[str] = (),
        raw: bool = False,
        system: str | None = None,
        emit: Emit = ignore,
    ) -> None:
        """Loads the base. What was trained answers first.

        Raises:
            UserError: anything wrong with target and adapters.
        """
        found = find_target(target, overrides, whole_models=True)
        self._sampling = sampling
        self.voices = tuple(find_voices(found, adapters, base=True))
        """All that can answer, the base first."""
        reader = read_target(found)
        set_chat_template(found.config.data, reader.tokenizer)
        self._layout = Layout(found, reader, raw=raw, system=system)
        self._loaded = load_voices(found, reader, emit)
        self._messages: list[Message] = []
        self._worn = ExitStack()
        self.voice: Voice = BASE
        self._model: PreTrainedModel = self._loaded.loaded.base
        self.switch(min(1, len(self.voices) - 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worn.close()

    @property
    def remembers(self) -> bool:
        """Whether an answer takes what was said before into account: where there is a chat template."""
        return self._layout.templated

    @property
    def precision(self) -> str:
        return self._loaded.loaded.precision

    def switch(self, number: int) -> None:
        """Let another voice answer from now on; the base stays loaded.

        Raises:
            UserError: there is no such voice, or its adapter doesn't fit.
        """
        if not 0 <= number < len(self.voices):
            raise UserError(f"there is no voice {number}", remedy=f"They are 0 to {len(self.voices) - 1}.")
        self._worn.close()
        self.voice, self._model = BASE, self._loaded.loaded.base
        self._model = self._worn.enter_context(self._loaded.speaking(self.voices[number]))
        self.voice = self.voices[number]

    def forget(self) -> None:
        """Begin anew."""
        self._messages.clear()

    def ask(self, text: str, say: Callable[[str], None]) -> Generated:
        """The answer, which `say` hears as it comes. An answer that is interrupted was never asked for.

        Raises:
            UserError: the conversation has become too long.
        """
        asked: list[Message] = [*self._messages, {"role": "user", "content": text}]
        prompt = Prompt(text, tuple(asked)) if self.remembers else Prompt(text)
        tokens = self._layout.tokens(prompt)
        reader, loaded = self._loaded.reader, self._loaded.loaded
        answer = generate_aloud(
            self._model,
            loaded.computation,
            reader.tokenizer,
            tokens,
            reader.stop_token_ids,
            reader.fitting(self._sampling, len(tokens)),
            say,
        )
        if self.remembers:
            self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer
