"""Chat templates in Ollama's language: right for every style, or refused."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerFast

from lora_cli.data.jinja import JinjaTemplate
from lora_cli.errors import ModelError
from lora_cli.export.ollama import modelfile
from lora_cli.export.turns import Turns, take_apart
from tests.unit.data.conftest import byte_level, wrapped
from tests.unit.data.style import Style
from tests.unit.data.templates import STYLES

TALKS = [
    [("user", "Hello there")],
    [("user", "One"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "4"), ("user", "five\nsix")],
    [("system", "You are terse."), ("user", "Go on"), ("assistant", "No."), ("user", "Why")],
]


def run_go(template: str, messages: list[tuple[str, str]]) -> str:
    """The little of Go's template language that a Modelfile of ours uses, by its published rules."""
    unsaid_first = r"(.*?)(?:\{\{ if not \.System \}\}(.*?)\{\{ end \}\})?"
    found = re.fullmatch(
        unsaid_first + r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*?)", template, re.DOTALL
    )
    assert found is not None, template
    begin, unsaid, body, answer = found.groups()
    pieces = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)
    assert pieces[0] == ""
    branches = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    said = [branches[role].replace("{{ .Content }}", words) for role, words in messages if role in branches]
    opening = begin if any(role == "system" for role, _ in messages) else begin + (unsaid or "")
    return opening + "".join(said) + answer


def tokenizer_with(style: Style) -> PreTrainedTokenizerFast:
    """One tokenizer for all styles: what is rendered is text."""
    tokenizer = wrapped(byte_level(("<|endoftext|>",), (), None, None), bos_token=style.bos, eos_token=style.eos)
    tokenizer.chat_template = style.template
    return tokenizer


def test_every_style_is_said_right_or_refused() -> None:
    refused = []
    for style in STYLES:
        tokenizer = tokenizer_with(style)
        try:
            turns = take_apart(tokenizer, adds_bos=False)
        except ModelError:
            refused.append(style.name)
            continue
        for talk in TALKS:
            if talk[0][0] == "system" and turns.system is None:
                continue
            spelled = [{"role": role, "content": words} for role, words in talk]
            expected = JinjaTemplate(tokenizer).render(spelled, (), generation=True)  # with training's date
            assert run_go(turns.as_go(), talk) == expected, style.name
    assert len(STYLES) == 44
    assert sorted(refused) == ["falcon3", "gpt-oss", "olmo2", "phi3", "phi4-mini"]


def test_a_bos_that_the_tokenizer_puts_is_not_said_twice() -> None:
    tokenizer = tokenizer_with(next(style for style in STYLES if style.name == "llama3"))
    with_bos, without = (take_apart(tokenizer, adds_bos=adds).as_go() for adds in (False, True))
    assert with_bos == tokenizer.bos_token + without
    assert tokenizer.bos_token not in without


def test_a_modelfile() -> None:
    turns = Turns("", "<s>Be kind.</s>\n", ("<s>", "</s>\n"), ("<u>", "</u>\n"), ("<a>", "</a>\n"), "<a>")
    text = modelfile("model.gguf", turns, ["</a>", 'a "stop"'], {"do_sample": True, "top_p": 0.9}, 2048)
    assert text.startswith("FROM ./model.gguf\n")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template is not None
    assert run_go(template[1], [("user", "x")]) == "<s>Be kind.</s>\n<u>x</u>\n<a>"
    assert 'PARAMETER stop "</a>"' in text and 'PARAMETER stop "a \\"stop\\""' in text
    assert "PARAMETER top_p 0.9" in text and "PARAMETER num_ctx 2048" in text
    assert '"""{{ .Prompt }}"""' in modelfile("model.gguf", None, [], {}, 2048)
