"""How rows are laid out without a chat template.

    text                the text, EOS
    prompt, completion  the two as they are, end to end, EOS; the completion is trained
    instruction         as below, EOS; the answer is trained

A BOS comes first where the tokenizer puts one by itself. Knows nothing about templates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.data.formats import Completion, Text
from lora_cli.data.marked import MarkedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "### Task\n{instruction}\n\n### Answer\n"
INSTRUCTION_WITH_INPUT = "### Task\n{instruction}\n\n### Input\n{input}\n\n### Answer\n"


class PlainLayout:
    """The layouts, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._bos = tokenizer.bos_token
        self._eos = tokenizer.eos_token
        self._eos_id: int | None = tokenizer.eos_token_id
        self._before = (tokenizer.bos_token_id,) if _adds_bos(tokenizer) else ()

    def text(self, content: Text) -> MarkedText:
        """A BOS or EOS already spelled at the text's own ends is taken as that token, not doubled."""
        text = content.text
        if self._eos:
            text = text.removesuffix(self._eos)
        if self._bos and self._before:
            text = text.removeprefix(self._bos)
        whole = (0, len(text))
        return MarkedText(text, (whole,), data=(whole,), before=self._before, append=self._eos_id)

    def completion(self, content: Completion) -> MarkedText:
        prompt = instruction_prompt(content) if content.instruction else content.prompt
        completion = content.completion.removesuffix(self._eos) if self._eos else content.completion
        text = prompt + completion
        return MarkedText(
            text,
            trained=((len(prompt), len(text)),),
            others=((0, len(prompt)),),
            data=((0, len(prompt)), (len(prompt), len(text))),
            roles=("user", "assistant"),
            before=self._before,
            append=self._eos_id,
        )


def instruction_prompt(content: Completion) -> str:
    """The prompt of an instruction row: everything before its answer."""
    if content.input.strip():
        return INSTRUCTION_WITH_INPUT.format(instruction=content.prompt, input=content.input)
    return INSTRUCTION.format(instruction=content.prompt)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
