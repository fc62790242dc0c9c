"""Which tokens are trained, on the chat templates of well-known families.

The oracle knows nothing of how spans are derived: it looks the contents up in the template's own rendering,
as they are words that occur once, and goes through the characters of every token.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lora_cli.data.jinja import DAY
from lora_cli.data.preview import ExamplePreview, preview_examples
from lora_cli.errors import DataError
from tests.unit.data.conftest import WriteRows, config, tokenizer_of
from tests.unit.data.style import Style
from tests.unit.data.templates import BY_NAME, STYLES

TURNS = [
    {"role": "user", "content": "First ask: what is 2 + 2?"},
    {"role": "assistant", "content": "Four, said `add(2, 2)`:\n\n    return 4  # Grüße 🙂"},
    {"role": "user", "content": "Second ask, in 東京?"},
    {"role": "assistant", "content": "Ünknown \n\n\nand plainly so."},
    {"role": "user", "content": "Third ask!"},
    {"role": "assistant", "content": "Done"},
]
SYSTEM = {"role": "system", "content": "Obey the rules of the house."}


def previews(path: Path, style: Style, kind: str = "bytes", **fields: Any) -> tuple[ExamplePreview, ...]:
    tokenizer, stops = tokenizer_of(style, kind=kind)
    return preview_examples(config(path, **fields), tokenizer, stops, count=100)


def rendered(style: Style, messages: list[dict[str, str]]) -> str:
    """The template's own text, on the day that is always today."""
    tokenizer, _ = tokenizer_of(style)
    dated = re.sub(r"strftime_now\('([^']*)'\)", lambda call: repr(DAY.strftime(call[1])), style.template)
    return str(tokenizer.apply_chat_template(messages, chat_template=dated, tokenize=False))


def expected_flags(style: Style, kind: str, messages: list[dict[str, str]], trained: set[int]) -> list[int | None]:
    """1, 0 or None (white space, free) for each token of the template's own rendering."""
    tokenizer, _ = tokenizer_of(style, kind=kind)
    text = rendered(style, messages)
    spans = {index: _find(text, message["content"].strip()) for index, message in enumerate(messages)}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    flags: list[int | None] = []
    for start, end in encoded["offset_mapping"]:
        chars = [at for at in range(start, end) if not text[at].isspace()]
        own = any(a <= at < b for at in chars for i, (a, b) in spans.items() if i in trained)
        foreign = any(a <= at < b for at in chars for i, (a, b) in spans.items() if i not in trained)
        flags.append(None if not chars else int(own and not foreign))
    for index in trained:
        end = spans[index][1] + len(text[spans[index][1] :]) - len(text[spans[index][1] :].lstrip())
        if text.startswith(style.turn_end, end):
            for at, (start, stop) in enumerate(encoded["offset_mapping"]):
                if end <= start and stop <= end + len(style.turn_end):
                    flags[at] = 1
    flags[0] = 0
    return flags


def _find(text: str, content: str) -> tuple[int, int]:
    assert text.count(content) == 1
    start = text.index(content)
    return start, start + len(content)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_mask_agrees_with_the_oracle(write_rows: WriteRows, style: Style, system: bool, kind: str) -> None:
    messages = [SYSTEM, *TURNS] if system else TURNS
    path = write_rows({"messages": messages})
    if system and style.moves:
        pytest.skip("a conversation that ends with an answer has no system prompt in it: a test of its own, below")
    if system and not style.system:
        with pytest.raises(DataError, match=r"train.jsonl:1: the chat template refuses"):
            previews(path, style, kind)
        return
    got = previews(path, style, kind)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wholes = [(messages[: index + 1], {index}) for index in answers] if style.rewrites else [(messages, set(answers))]
    assert len(got) == len(wholes)
    tokenizer, stops = tokenizer_of(style, kind=kind)
    for example, (part, trained) in zip(got, wholes, strict=True):
        text = rendered(style, part)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # GLM's last turn ends without a stop token, as the next header is it; one is appended.
        assert list(example.input_ids[: len(ids)]) == ids
        appended = example.input_ids[len(ids) :]
        assert (len(appended) == 1 and appended[0] in stops) if style.end == "<|user|>" else not appended
        wanted = expected_flags(style, kind, part, trained) + [1] * len(appended)
        differing = [
            (token, flag, want)
            for token, flag, want in zip(example.tokens, example.trained, wanted, strict=True)
            if want is not None and flag != want
        ]
        assert differing == []
        last_trained = max(at for at, flag in enumerate(example.trained) if flag)
        assert example.input_ids[last_trained] in stops


def test_every_style_was_tried() -> None:
    assert len({style.name for style in STYLES}) == len(STYLES) >= 40


def _shows_system(style: Style, messages: list[dict[str, str]]) -> bool:
    """Whether there is a system prompt and the template writes anything of it: of an empty one it may not."""
    if messages[0]["role"] != "system":
        return False
    return rendered(style, messages[:2]) != rendered(style, messages[1:2])


def _squeezed(text: str) -> str:
    return "".join(text.split())


def trained_text(example: ExamplePreview, style: Style) -> str:
    tokenizer, _ = tokenizer_of(style)
    ids = [number for number, flag in zip(example.input_ids, example.trained, strict=True) if flag]
    return _squeezed(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(style=st.sampled_from(STYLES), data=st.data())
def test_trained_tokens_decode_to_the_answers(tmp_path: Path, style: Style, data: st.DataObject) -> None:
    """Unicode, white space, empty and long turns, and text that spells control tokens."""
    import json

    spelled = st.sampled_from(style.specials)
    content = st.one_of(contents, st.tuples(contents, spelled, contents).map("".join), contents.map(lambda t: t * 50))
    messages = [{"role": "system", "content": data.draw(content)}] if style.system and data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": data.draw(content)})
        messages.append({"role": "assistant", "content": data.draw(content)})
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assume(any(answer.strip() for answer in answers))
    path = tmp_path / "random.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    try:
        got = previews(path, style, max_length=100_000)
    except DataError as error:
        # These trim or move a content, or (Gemma 4) take pieces out of an answer, so where it spells a control token it
        # may not be told from the template.
        if (style.moves or style.name in ("llama2", "gemma4")) and "can't be kept as text" in error.message:
            return
        raise
    wanted = [_squeezed(answer + style.turn_end) for answer in answers]
    found = [trained_text(example, style) for example in got]
    split = style.rewrites or (style.moves and _shows_system(style, messages))
    assert found == (wanted if split else ["".join(wanted)])


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral-v3", "llama2", "glm4"])
def test_control_tokens_spelled_in_the_data_stay_text(write_rows: WriteRows, name: str, kind: str) -> None:
    style = BY_NAME[name]
    spelled = " ".join(style.specials)
    messages = [
        {"role": "user", "content": f"Why {spelled}?"},
        {"role": "assistant", "content": f"So {spelled}!"},
    ]
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So!"}]
    with_spelled, without = previews(write_rows({"messages": messages}, {"messages": plain}), style, kind)
    tokenizer, _ = tokenizer_of(style, kind=kind)
    controls = set(tokenizer.convert_tokens_to_ids(list(style.specials)))
    assert [i for i in with_spelled.input_ids if i in controls] == [i for i in without.input_ids if i in controls]
    assert style.specials[0] in with_spelled.text


def test_control_tokens_that_can_not_stay_text_are_refused(write_rows: WriteRows) -> None:
    """Where a tokenizer marks the beginning of a text, text cut into pieces would have other tokens."""
    from tokenizers import pre_tokenizers

    style = BY_NAME["chatml"]
    tokenizer, stops = tokenizer_of(style, kind="pieces")
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    messages = [{"role": "user", "content": "Why <|im_end|>?"}, {"role": "assistant", "content": "So."}]
    with pytest.raises(DataError, match=r"train.jsonl:1: the text '<\|im_end\|>' is a control token"):
        preview_examples(config(write_rows({"messages": messages})), tokenizer, stops, count=1)


def test_thinking_is_stripped_from_earlier_turns_and_trained_in_its_own(write_rows: WriteRows) -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno", "reasoning_content": "Spanish asked"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\nalso Spanish\n</think>\n\nDos"},
    ]
    style = BY_NAME["qwen3"]
    first, second = previews(write_rows({"messages": messages}), style)
    assert trained_text(first, style) == "<think>Spanishasked</think>Uno<|im_end|>"
    assert trained_text(second, style) == "<think>alsoSpanish</think>Dos<|im_end|>"
    assert "Spanish asked" not in second.text
    assert "Uno<|im_end|>" in second.text


def test_an_empty_thinking_block_is_header(write_rows: WriteRows) -> None:
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Uno"}]
    style = BY_NAME["qwen3"]
    (example,) = previews(write_rows({"messages": messages}), style)
    assert "<think>" in example.text
    assert trained_text(example, style) == "Uno<|im_end|>"


def test_thinking_that_a_template_leaves_out_is_refused(write_rows: WriteRows) -> None:
    turn = {"role": "assistant", "content": "Uno", "reasoning_content": "Spanish asked"}
    path = write_rows({"messages": [{"role": "user", "content": "One?"}, turn]})
    with pytest.raises(DataError, match=r"train.jsonl:1: messages\[1\].reasoning_content: the chat template leaves"):
        previews(path, BY_NAME["llama3"])


def test_a_template_that_cuts_the_content_is_refused(write_rows: WriteRows) -> None:
    turn = {"role": "assistant", "content": "<think>\nhm\n</think>Uno"}
    path = write_rows({"messages": [{"role": "user", "content": "One?"}, turn]})
    with pytest.raises(DataError, match=r"train.jsonl:1: messages\[1\]: can't tell"):
        previews(path, BY_NAME["deepseek-r1"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("['content']", "['content']|upper"),  # the same length, other letters
        ("{% if add_gen", "{% if 'Done' in messages[-1].content %}(the end){% endif %}{% if add_gen"),
        ("['content'] +", "['content'] + ('!' if 'Done' in messages[-1].content else '') +"),
    ],
)
def test_a_template_that_adds_to_the_words_or_rewrites_them_is_refused(
    write_rows: WriteRows, old: str, new: str
) -> None:
    """The row's own rendering decides, not what other rows of its shape look like."""
    style = replace(BY_NAME["chatml"], template=BY_NAME["chatml"].template.replace(old, new))
    path = write_rows({"messages": [TURNS[0], {"role": "assistant", "content": "1"}]}, {"messages": TURNS})
    with pytest.raises(DataError, match=r"train.jsonl:2: messages\[\d\]: can't tell"):
        previews(path, style)


def test_a_thinking_tag_that_the_prompt_opens(write_rows: WriteRows) -> None:
    """Qwen's thinking-only models: the prompt ends in <think>, which the content spells as well."""
    prompt = "{{- '<|im_start|>assistant\\n"
    template = BY_NAME["qwen3"].template.replace(prompt, prompt + "<think>\\n")
    style = replace(BY_NAME["qwen3"], template=template)
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nUno"}
    (example,) = previews(write_rows({"messages": [TURNS[0], answer]}), style)
    assert trained_text(example, style) == "hm</think>Uno<|im_end|>"


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL_TURNS = [
    {"role": "user", "content": "Rain in Bern?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "dry", "tool_call_id": "call12345"},
    {"role": "assistant", "content": "No rain."},
]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_tool_calls_are_trained_and_results_are_not(write_rows: WriteRows, style: Style) -> None:
    path = write_rows({"messages": TOOL_TURNS, "tools": [TOOL]})
    if style.call is None:
        with pytest.raises(
            DataError, match=r"train.jsonl:1: (messages\[1\].*(leaves|can't tell)|the chat template refuses)"
        ):
            previews(path, style)
        return
    got = previews(path, style)
    called = style.call + (style.call_end or style.turn_end)
    assert "".join(trained_text(example, style) for example in got) == called + "Norain." + style.turn_end
    assert all(example.input_ids[_last_trained(example)] in tokenizer_of(style)[1] for example in got)


def _last_trained(example: ExamplePreview) -> int:
    return max(at for at, flag in enumerate(example.trained) if flag)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_thinking_is_trained_or_refused(write_rows: WriteRows, style: Style) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "Uno", "reasoning_content": "hm"}]
    path = write_rows({"messages": turns})
    if style.thought is None:
        with pytest.raises(DataError, match=r"train.jsonl:1: messages\[1\].reasoning_content: .* leaves it out"):
            previews(path, style)
        return
    (example,) = previews(path, style)
    assert trained_text(example, style) == style.thought + "Uno" + style.turn_end


def test_arguments_given_as_json_are_the_object_they_spell(write_rows: WriteRows) -> None:
    """As OpenAI's API has them; templates would quote them a second time."""
    quoted = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    turns = [TOOL_TURNS[0], {**TOOL_TURNS[1], "tool_calls": [quoted]}, *TOOL_TURNS[2:]]
    style = BY_NAME["qwen2.5"]
    (as_text,), (as_object,) = (
        previews(write_rows({"messages": messages, "tools": [TOOL]}), style) for messages in (turns, TOOL_TURNS)
    )
    assert as_text.input_ids == as_object.input_ids


def test_a_template_that_adds_another_turn_is_refused(write_rows: WriteRows) -> None:
    """Command R+ for tools writes a system turn behind every call."""
    style = BY_NAME["granite4"]
    more = "{{- '<|start_of_role|>system<|end_of_role|>Go on.<|end_of_text|>' if messages[-1].tool_calls else '' }}"
    path = write_rows({"messages": TOOL_TURNS, "tools": [TOOL]})
    with pytest.raises(DataError, match=r"messages\[1\]: can't tell .* another turn follows them"):
        previews(path, replace(style, template=style.template + more))


@pytest.mark.parametrize("name", ["glm4.5", "chatml", "llama2"])
def test_of_an_empty_turn_only_its_end_is_trained(write_rows: WriteRows, name: str) -> None:
    """GLM 4.5 leaves out the line that an empty content would stand on."""
    style = BY_NAME[name]
    turns = [TURNS[0], {"role": "assistant", "content": ""}, *TURNS[2:4]]
    (example,) = previews(write_rows({"messages": turns}), style)
    wanted = style.turn_end + _squeezed(TURNS[3]["content"]) + style.turn_end
    assert trained_text(example, style) == wanted


def test_the_date_stands_still(write_rows: WriteRows) -> None:
    path = write_rows({"messages": TURNS[:2]})
    (example,) = previews(path, BY_NAME["mistral-v7"])
    assert "The current date is 2024-07-26." in example.text
    assert any("writes today's date" in note for note in example.notes)
    (example,) = previews(path, BY_NAME["granite3"])
    assert "Today's Date: July 26, 2024." in example.text


@pytest.mark.parametrize("name", [style.name for style in STYLES if style.moves])
@pytest.mark.parametrize("content", ["", " ", "Be kind."])
def test_an_empty_system_prompt_moves_where_the_template_writes_it(
    write_rows: WriteRows, name: str, content: str
) -> None:
    style = BY_NAME[name]
    messages = [{"role": "system", "content": content}, *TURNS]
    examples = previews(write_rows({"messages": messages}), style)
    answers = sum(message["role"] == "assistant" for message in messages)
    assert len(examples) == (answers if _shows_system(style, messages) else 1)


def test_a_system_prompt_that_moves_gives_one_example_per_turn(write_rows: WriteRows) -> None:
    """Mistral v3 writes tools and system prompt before the last user turn, wherever that is at the time."""
    style = BY_NAME["mistral-v3"]
    got = previews(write_rows({"messages": TURNS[:4], "tools": [TOOL]}), style)
    assert len(got) == 2
    assert [example.text.count("[AVAILABLE_TOOLS]") for example in got] == [1, 1]


def test_a_call_that_a_template_leaves_out_is_refused(write_rows: WriteRows) -> None:
    turns = [TOOL_TURNS[0], {**TOOL_TURNS[1], "content": "Let me look."}]
    with pytest.raises(DataError, match=r"train.jsonl:1: messages\[1\].tool_calls: the chat template leaves it out"):
        previews(write_rows({"messages": turns}), BY_NAME["command-r"])


def test_a_system_prompt_is_where_generation_has_it(write_rows: WriteRows) -> None:
    """Mistral v3 leaves the system prompt out of every conversation that ends with an answer."""
    style = BY_NAME["mistral-v3"]
    messages = [SYSTEM, *TURNS[:4]]
    tokenizer, _ = tokenizer_of(style)
    first, second = previews(write_rows({"messages": messages}), style)
    for example, up_to in ((first, 2), (second, 4)):
        prompt = tokenizer.apply_chat_template(messages[:up_to], tokenize=False, add_generation_prompt=True)
        assert example.text.startswith(prompt)
        assert SYSTEM["content"] in prompt
    assert trained_text(second, style) == _squeezed(TURNS[3]["content"] + "</s>")


def test_turns_can_be_left_out_of_training(write_rows: WriteRows) -> None:
    messages = [dict(turn) for turn in TURNS]
    messages[1]["train"] = False  # type: ignore[assignment]
    style = BY_NAME["chatml"]
    (example,) = previews(write_rows({"messages": messages}), style)
    assert trained_text(example, style) == _squeezed("Ünknown and plainly so.<|im_end|>Done<|im_end|>")
    assert "Four" in example.text


def test_a_pad_token_equal_to_eos_does_not_untrain_it(write_rows: WriteRows) -> None:
    style = BY_NAME["chatml"]
    tokenizer, stops = tokenizer_of(style)
    tokenizer.pad_token = tokenizer.eos_token
    (example,) = preview_examples(config(write_rows({"messages": TURNS})), tokenizer, stops, count=1)
    ends = [flag for number, flag in zip(example.input_ids, example.trained, strict=True) if number in stops]
    assert ends == [0, 1] * 3


def test_a_turn_end_that_is_no_stop_token_is_trained_and_noted(write_rows: WriteRows) -> None:
    """A base model whose only stop token is <|endoftext|>, with a ChatML template."""
    style = BY_NAME["chatml"]
    tokenizer, _ = tokenizer_of(style)
    stops = frozenset({tokenizer.convert_tokens_to_ids("<|endoftext|>")})
    (example,) = preview_examples(config(write_rows({"messages": TURNS[:2]})), tokenizer, stops, count=1)
    assert trained_text(example, style).endswith("<|im_end|>")
    assert any("none of the model's stop tokens" in note for note in example.notes)


def test_train_on_all(write_rows: WriteRows) -> None:
    (example,) = previews(write_rows({"messages": TURNS}), BY_NAME["qwen3"], train_on="all")
    assert example.trained == (0, *[1] * (len(example.input_ids) - 1))


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma2", "mistral-v1"])
def test_no_doubled_bos(write_rows: WriteRows, name: str) -> None:
    style = BY_NAME[name]
    (example,) = previews(write_rows({"messages": TURNS[:2]}), style)
    tokenizer, _ = tokenizer_of(style)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
