"""The first examples, token by token."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lora_cli.data.loading import load_examples
from lora_cli.data.preview import packed, preview_examples, token_texts
from lora_cli.errors import DataError
from tests.unit.data.conftest import WriteRows, config, tokenizer_of
from tests.unit.data.templates import BY_NAME

CHATML = BY_NAME["chatml"]


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_what_is_shown_is_what_is_trained_on(write_rows: WriteRows) -> None:
    tokenizer, stops = tokenizer_of(CHATML)
    path = write_rows(chat("Grüße 🙂?", "yes, 東京"), chat("b", ""), chat("c", "d " * 50), chat("e", "f"))
    data = config(path, max_length=60)
    shown = preview_examples(data, tokenizer, stops, count=2)
    examples, _ = load_examples(data, tokenizer, stops, seed=1)
    assert [example.place for example in shown] == ["train.jsonl:1", "train.jsonl:3"]  # row 2 is dropped
    for index, example in enumerate(shown):
        assert list(example.input_ids) == examples.example(index).input_ids.tolist()
        assert list(example.trained) == examples.example(index).trained.astype(int).tolist()
        assert "".join(example.tokens) == example.text
    assert [example.truncated for example in shown] == [False, True]
    assert shown[0].notes == ("ends in a trained <|im_end|>",)
    assert shown[1].notes[0].startswith("truncated: ")
    assert json.loads(json.dumps(asdict(shown[0])))["trained"] == list(shown[0].trained)


def test_rows_past_the_last_one_shown_are_not_read(write_rows: WriteRows) -> None:
    tokenizer, stops = tokenizer_of(CHATML)
    path = write_rows(*(chat("a", "b") for _ in range(40)), {"messages": "broken"})
    assert len(preview_examples(config(path), tokenizer, stops, count=3)) == 3
    with pytest.raises(DataError, match=r"train\.jsonl:41"):
        preview_examples(config(path), tokenizer, stops, count=41)


def test_no_rows_left_is_an_error(write_rows: WriteRows) -> None:
    tokenizer, stops = tokenizer_of(CHATML)
    with pytest.raises(DataError, match="none of the 1 rows"):
        preview_examples(config(write_rows(chat("a", ""))), tokenizer, stops, count=3)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_token_texts_join_to_the_text(text: str) -> None:
    for kind in ("bytes", "pieces"):
        tokenizer, _ = tokenizer_of(CHATML, kind=kind)
        ids = tokenizer("x" + text, add_special_tokens=False)["input_ids"]
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_every_token_has_its_speaker(write_rows: WriteRows) -> None:
    tokenizer, stops = tokenizer_of(CHATML)
    messages = [
        {"role": "system", "content": "Rules, Grüße"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So 東京"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Done", "train": False},
    ]
    (example,) = preview_examples(config(write_rows({"messages": messages})), tokenizer, stops, count=1)

    def said(role: str) -> str:
        return "".join(token for token, one in zip(example.tokens, example.roles, strict=True) if one == role)

    assert said("system") == "Rules, Grüße"
    assert said("user") == "Why?And?"
    assert said("assistant") == "So 東京<|im_end|>Done"
    assert "<|im_start|>" in said("")


def test_prompts_and_completions_have_speakers_behind_a_bos(write_rows: WriteRows) -> None:
    tokenizer, stops = tokenizer_of(BY_NAME["llama2"], kind="bytes")
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (example,) = preview_examples(
        config(write_rows({"prompt": "ask: ", "completion": "answer"})), tokenizer, stops, count=1
    )
    assert (example.tokens[0], example.roles[0]) == ("<s>", "")
    spoken = list(zip(example.tokens, example.roles, strict=True))
    assert "".join(token for token, role in spoken if role == "user").strip() == "ask:"
    assert "".join(token for token, role in spoken if role == "assistant").strip() == "answer"


def test_packs_have_boundaries_between_whole_examples(write_rows: WriteRows) -> None:
    tokenizer, stops = tokenizer_of(CHATML)
    rows = [chat("a", "b " * size) for size in (5, 30, 8, 2)]
    shown = preview_examples(config(write_rows(*rows)), tokenizer, stops, count=4)
    lengths = {example.place: len(example.input_ids) for example in shown}
    found = packed(shown, 64)
    assert sorted(place for one in found.packs for place in one.places) == sorted(lengths)
    for one in found.packs:
        assert np.diff(one.boundaries).tolist() == [lengths[place] for place in one.places]
        assert one.boundaries[-1] <= 64 or len(one.places) == 1
    assert json.loads(json.dumps(found.as_json()))["micro_batch_tokens"] == 64
