"""A chat template taken apart into what stands around each role's words, and put together in Ollama's language.

The parts come from renderings of the template itself, and count only if they, laid end to end, give what the template
gives for every conversation tried. Knows nothing about any one template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_cli.data.jinja import JinjaTemplate
from lora_cli.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[tuple[str, str]]
"""Role and words."""

_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "Sigma", "Alpha", "Beta", "Gamma"
_TRIED: tuple[Messages, ...] = (
    (("user", "What is it?"),),
    (("user", "One, two"), ("assistant", "Three."), ("user", "And\nthen?")),
    (("system", "Be brief."), ("user", "Why?")),
    (("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
)


@dataclass(frozen=True)
class Turns:
    """What stands before and after each role's words."""

    begin: str
    """Before everything: a BOS that the tokenizer doesn't put there by itself."""
    unsaid: str
    """After that, where the system says nothing: a system prompt that comes by itself, say."""
    system: tuple[str, str] | None
    """None where the template has no system turn of its own."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """What makes the model answer."""

    @property
    def literals(self) -> list[str]:
        """All that stands in the template word for word."""
        return [self.begin, self.unsaid, *(self.system or ()), *self.user, *self.assistant, self.answer]

    def render(self, messages: Messages) -> str:
        """The conversation as Ollama will lay it out, up to the answer."""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        opening = self.begin + ("" if messages[0][0] == "system" else self.unsaid)
        return opening + "".join(around[role][0] + words + around[role][1] for role, words in messages) + self.answer

    def as_go(self) -> str:
        """As a Go template. One line: line breaks in it are those of the turns."""
        branches = [("system", self.system), ("user", self.user), ("assistant", self.assistant)]
        unsaid = f"{{{{ if not .System }}}}{self.unsaid}{{{{ end }}}}" if self.unsaid else ""
        parts = [self.begin, unsaid, "{{ range .Messages }}"]
        said = "if"
        for role, around in branches:
            if around is not None:
                parts.append(f'{{{{ {said} eq .Role "{role}" }}}}{around[0]}{{{{ .Content }}}}{around[1]}')
                said = "else if"
        return "".join([*parts, "{{ end }}{{ end }}", self.answer])


def take_apart(tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool) -> Turns:
    """The turns of a tokenizer's chat template; `adds_bos`: whether a BOS comes by itself.

    Raises:
        ModelError: the template does more than put something around each turn.
    """
    turns = _derive(tokenizer, adds_bos)
    for messages in _TRIED:
        if messages[0][0] == "system" and turns.system is None:
            continue
        if turns.render(messages) != _without_bos(_rendered(tokenizer, messages), tokenizer, adds_bos):
            raise _more_than_turns()
    if any("{{" in literal or '"""' in literal for literal in turns.literals):
        raise _more_than_turns()
    return turns


def _derive(tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> Turns:
    def plain(messages: Messages, *, answer: bool = False) -> str:
        return _without_bos(_rendered(tokenizer, messages, answer=answer), tokenizer, adds_bos)

    asked = plain([("user", _ASKED)])
    first, after_user = _split(asked, _ASKED)
    with_answer = plain([("user", _ASKED)], answer=True)
    answer = _behind(with_answer, asked)
    talk = plain([("user", _ASKED), ("assistant", _ANSWERED), ("user", _AGAIN)])
    between, rest = _split(_split(talk, _ASKED)[1], _ANSWERED)
    done = plain([("user", _ASKED), ("assistant", _ANSWERED)])
    after_assistant = _split(done, _ANSWERED)[1]
    before_user = _behind(_split(rest, _AGAIN)[0], after_assistant)
    before_assistant = _behind(between, after_user)
    if not first.endswith(before_user):
        raise _more_than_turns()
    unsaid = first.removesuffix(before_user)
    system = _system(plain, before_user)
    begin = ""
    if system is None or system[0].startswith(unsaid):
        begin, unsaid = unsaid, ""
    if system is not None:
        system = (system[0].removeprefix(begin), system[1])
    return Turns(begin, unsaid, system, (before_user, after_user), (before_assistant, after_assistant), answer)


def _system(plain: Callable[[Messages], str], before_user: str) -> tuple[str, str] | None:
    """What stands around the system's words; None where they are refused, or go into the user's turn."""
    try:
        before, rest = _split(plain([("system", _SYSTEM), ("user", _ASKED)]), _SYSTEM)
        between = _split(rest, _ASKED)[0]
    except ModelError:
        return None
    return (before, between.removesuffix(before_user)) if between.endswith(before_user) else None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, answer: bool = True) -> str:
    spelled = [{"role": role, "content": words} for role, words in messages]
    try:
        return JinjaTemplate(tokenizer).render(spelled, (), generation=answer)
    except DataError as error:
        raise ModelError(error.message, remedy=error.remedy) from error


def _without_bos(text: str, tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> str:
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos else text


def _split(text: str, word: str) -> tuple[str, str]:
    if text.count(word) != 1:
        raise _more_than_turns()
    before, _, after = text.partition(word)
    return before, after


def _behind(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise _more_than_turns()
    return text.removeprefix(beginning)


def _more_than_turns() -> ModelError:
    return ModelError(
        "its chat template does more than put something around each turn: it can't be said in Ollama's language here",
        remedy="Export it with --to gguf: llama.cpp runs the template itself (llama-server --jinja).",
    )
