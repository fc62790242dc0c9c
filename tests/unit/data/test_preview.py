"""The first examples, token by token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.loading import load_examples
from lora_cli.data.preview import preview_examples, token_texts
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
    assert json.loads(json.dumps(shown[0].as_json()))["trained"] == list(shown[0].trained)


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
