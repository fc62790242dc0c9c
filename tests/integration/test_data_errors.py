"""Data that can't be trained on, through the real command line: exit 2, no traceback, the file and the row named."""

# ruff: noqa: E501 - a case is a line

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]
Lora = Callable[..., tuple[int, str, str]]

ASK, SAY = {"role": "user", "content": "due?"}, {"role": "assistant", "content": "the first of may"}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


GOOD = chat(ASK, SAY)

# name of the file, its content, further `data` settings, and what must be said
FILES: list[tuple[str, bytes, dict[str, Any], tuple[str, ...]]] = [
    ("empty.jsonl", b"", {}, ("empty.jsonl", "is empty")),
    ("blank.jsonl", b"\n\n", {}, ("blank.jsonl", "no rows")),
    ("half.jsonl", lines(GOOD) + b'{"messages": [{"ro', {}, ("half.jsonl:2", "half-written")),
    ("broken.jsonl", lines(GOOD, GOOD) + b'{"messages": ]}\n' + lines(GOOD), {}, ("broken.jsonl:3", "broken JSON", "column 14")),
    ("latin.jsonl", lines(GOOD) + '{"messages": "größe"}\n'.encode("latin-1"), {}, ("latin.jsonl:2", "not UTF-8", "iconv")),
    ("zipped.jsonl", gzip.compress(lines(GOOD), mtime=0), {}, ("zipped.jsonl", "compressed with gzip", "zipped.jsonl.gz")),
    ("cut.jsonl.gz", gzip.compress(lines(*[GOOD] * 500), mtime=0)[:-30], {}, ("cut.jsonl.gz", "past line")),
    ("list.json", b'[{"messages": 1},', {}, ("list.json:1",)),
    ("open.csv", b'prompt,completion\na,"b\n', {}, ("open.csv:2", "broken CSV")),
    ("fake.parquet", b"no parquet", {}, ("fake.parquet", "not a readable Parquet file")),
    ("notes.txt", b"hello", {}, ("notes.txt", "no reader for .txt")),
    ("columns.jsonl", lines({"question": "a", "answer": "b"}), {}, ("columns.jsonl:1", "question, answer", "data.columns")),
    ("later.jsonl", lines(GOOD, {"dialog": []}), {}, ("later.jsonl:2", "'messages'", "The row has: dialog")),
    ("mapped.jsonl", lines({"q": "a", "a": "b"}), {"format": "prompt_completion", "columns": {"prompt": "ask"}},
     ("mapped.jsonl:1", "'ask'", "The row has: q, a")),
    ("role.jsonl", lines(GOOD, chat({"role": "robot", "content": "x"}, SAY)), {}, ("role.jsonl:2", "messages[0].role", '"robot"', "user")),
    ("speaker.jsonl", lines({"conversations": [{"from": "alien", "value": "x"}]}), {}, ("speaker.jsonl:1", '"alien"', "human")),
    ("number.jsonl", lines(chat({"role": "user", "content": 3}, SAY)), {}, ("number.jsonl:1", "messages[0].content is 3", "string")),
    ("null.jsonl", lines(chat(ASK, {"role": "assistant", "content": None})), {}, ("null.jsonl:1", "messages[1].content is null")),
    ("first.jsonl", lines(chat(SAY, ASK, SAY)), {}, ("first.jsonl:1", "begins with the assistant")),
    ("nobody.jsonl", lines(GOOD, chat(ASK, ASK)), {}, ("nobody.jsonl:2", "no assistant message")),
    ("silent.jsonl", lines(chat(ASK, {"role": "assistant", "content": " "})), {}, ("none of the 1 rows", "answer empty", "silent.jsonl:1")),
    ("long.jsonl", lines(GOOD, GOOD), {"max_length": 4, "overlong": "drop"}, ("none of the 2 rows", "longer than data.max_length 4", "long.jsonl:1, long.jsonl:2")),
    ("cut.jsonl", lines(GOOD), {"max_length": 4}, ("none of the 1 rows", "no trained token within data.max_length 4", "cut.jsonl:1")),
    ("strict.jsonl", lines(GOOD), {"max_length": 4, "overlong": "error"}, ("strict.jsonl:1", "more than data.max_length 4")),
    ("texts.jsonl", lines({"text": 3}), {}, ("texts.jsonl:1", "text is 3")),
    ("train.jsonl", lines(chat(ASK, {**SAY, "train": "no"})), {}, ("train.jsonl:1", "messages[1].train", "true or false")),
    ("tools.jsonl", lines({**GOOD, "tools": "hammer"}), {}, ("tools.jsonl:1", 'tools is "hammer"')),
]  # fmt: skip


def refused(lora: Lora, *arguments: str | Path) -> str:
    code, out, err = lora(*arguments)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(("name", "content", "data", "said"), FILES, ids=[name for name, *_ in FILES])
def test_a_bad_file_is_named_with_its_row(
    lora: Lora,
    write_config: Write,
    tmp_path: Path,
    name: str,
    content: bytes,
    data: dict[str, Any],
    said: tuple[str, ...],
) -> None:
    (tmp_path / name).write_bytes(content)
    config = write_config(tmp_path, data={"train": str(tmp_path / name), **data})
    for arguments in (["check", config], ["preview", config, "-n", "1000"], ["check", config, "--json"]):
        err = refused(lora, *arguments)
        for word in said:
            assert word in err, err
    assert not (tmp_path / "run").exists()


def test_every_bad_file_was_tried() -> None:
    assert len({name for name, *_ in FILES}) == len(FILES) >= 25


def test_training_says_the_same_before_anything_is_written(lora: Lora, write_config: Write, tmp_path: Path) -> None:
    (tmp_path / "role.jsonl").write_bytes(lines(GOOD, chat({"role": "robot", "content": "x"}, SAY)))
    err = refused(lora, "train", write_config(tmp_path, data={"train": str(tmp_path / "role.jsonl")}))
    assert "role.jsonl:2" in err
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_named_in_full(lora: Lora, write_config: Write, tmp_path: Path) -> None:
    err = refused(lora, "check", write_config(tmp_path, data={"train": str(tmp_path / "gone.jsonl")}))
    assert f"{tmp_path / 'gone.jsonl'}: no such file or folder" in err


def test_a_file_that_may_not_be_read(lora: Lora, write_config: Write, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    err = refused(lora, "check", write_config(tmp_path, data={"train": str(tmp_path / "folder.jsonl")}))
    assert "folder.jsonl: a folder without" in err


def test_chat_rows_without_a_chat_template(lora: Lora, write_config: Write, tiny: Path, tmp_path: Path) -> None:
    import shutil

    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    err = refused(lora, "check", write_config(tmp_path, model={"name_or_path": str(model)}))
    assert "train.jsonl:1: a conversation, but the tokenizer has no chat template" in err
    assert "data.chat_template" in err


@pytest.mark.parametrize("weight", [-1, 0, "much"])
def test_a_weight_that_is_none(lora: Lora, write_config: Write, tmp_path: Path, rows: Path, weight: object) -> None:
    sources = [{"path": str(rows / "train.jsonl"), "weight": weight}]
    err = refused(lora, "check", write_config(tmp_path, data={"train": sources}))
    assert "data.train[0].weight" in err.replace(".0.", "[0].")


def test_a_split_that_is_not_there(lora: Lora, write_config: Write, tmp_path: Path, rows: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([GOOD]), "test": Dataset.from_list([GOOD])}).save_to_disk(
        tmp_path / "saved"
    )
    source = {"path": str(tmp_path / "saved"), "split": "dev"}
    err = refused(lora, "check", write_config(tmp_path, data={"train": [source]}))
    assert "no split 'dev'" in err
    assert "It has: train, test." in err
    source = {"path": str(rows / "train.jsonl"), "split": "train"}
    err = refused(lora, "check", write_config(tmp_path, data={"train": [source]}))
    assert "a file has no splits" in err


def test_a_chat_template_that_is_broken(lora: Lora, write_config: Write, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    err = refused(lora, "check", write_config(tmp_path, data={"chat_template": str(tmp_path / "template.jinja")}))
    assert "train.jsonl:1: the chat template is broken" in err


def test_some_weights_and_some_not(lora: Lora, write_config: Write, tmp_path: Path, rows: Path) -> None:
    sources = [{"path": str(rows / "train.jsonl"), "weight": 1}, {"path": str(rows / "heldout.jsonl")}]
    err = refused(lora, "check", write_config(tmp_path, data={"train": sources}))
    assert "give every source a weight, or none" in err


def test_the_account_of_a_mixed_file(lora: Lora, write_config: Write, tmp_path: Path) -> None:
    """Rows that are dropped, cut, repeated and held out, in check's JSON and on its screen."""
    long = chat(ASK, {"role": "assistant", "content": "may " * 200})
    blank = chat(ASK, {"role": "assistant", "content": ""})
    (tmp_path / "mixed.jsonl").write_bytes(lines(GOOD, blank, long, GOOD, chat({**ASK, "content": "when?"}, SAY)))
    (tmp_path / "held.jsonl").write_bytes(lines(GOOD, chat({**ASK, "content": "and noon?"}, SAY)))
    data = {"train": str(tmp_path / "mixed.jsonl"), "validation": str(tmp_path / "held.jsonl"), "max_length": 64}
    config = write_config(tmp_path, data=data)
    code, out, _ = lora("check", config, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["rows"], found["used"], found["truncated"], found["dropped"]) == (5, 4, 1, 1)
    assert found["reasons"] == {"answer empty": ["mixed.jsonl:2"]}
    assert found["truncated_places"] == [found["longest_place"]] == ["mixed.jsonl:3"]
    assert (found["duplicates"], found["duplicate_places"]) == (1, ["mixed.jsonl:4"])
    assert found["longest"] == 64 < found["longest_seen"]
    assert sum(count for _, count in found["lengths"]) == 4
    assert 0 < found["num_supervised_tokens"] < found["num_tokens"]
    assert found["steps"] == 8
    assert found["validation"]["rows"] == 2
    warnings = " ".join(found["warnings"])
    assert "1 validation example is also in train; the first is held.jsonl:1" in warnings
    assert "1 row loses the end at data.max_length 64" in warnings
    _, screen, _ = lora("check", config)
    for part in ("1 dropped, answer empty: mixed.jsonl:2", "mixed.jsonl:3", "1 exact duplicate: mixed.jsonl:4", "█"):
        assert part in screen
    (tmp_path / "cut.jsonl").write_bytes(lines(long, long))
    _, screen, _ = lora("check", config, "--set", f"data.train={tmp_path / 'cut.jsonl'}")
    assert "all 2 rows lose the end" in screen


def test_the_cache_is_shown_left_alone_and_cleared(lora: Lora, config_file: Path) -> None:
    def cache(*options: str) -> dict[str, int]:
        code, out, err = lora("check", config_file, "--json", "--set", "data.cache=true", *options)
        assert code == 0, err
        found: dict[str, int] = json.loads(out)["cache"]
        return found

    assert cache("--no-cache") == {"entries": 0, "size_bytes": 0}
    kept = cache()
    assert kept["entries"] == 1 and kept["size_bytes"] > 0
    assert cache("--set", "data.max_length=100")["entries"] == 2
    assert cache("--clear-cache") == kept  # the two are gone, and this one is made anew
    _, screen, _ = lora("check", config_file, "--clear-cache", "--no-cache")
    assert "0 KiB of tokenized data, 0 sources" in screen
    assert "KiB deleted before" in screen
