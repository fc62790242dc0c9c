"""Small real tokenizers, trained here, and configs for data."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from lora_cli.config import DataConfig
from tests.unit.data.style import Style

# Examples share two cores with other tests: a slow one is no failure.
settings.register_profile("data", deadline=None)
settings.load_profile("data")

_PARAGRAPH = """
The assistant reads a question and answers it in a few words. A user asks what a date looks like in another
form, and the answer is a date. Where the question has no answer the assistant says so, plainly: I don't know.
Numbers such as 3.14 and 42, code such as `def add(a, b): return a + b`, names such as user, system, assistant,
model and tool, and words in other scripts all occur: Grüße, naïve, 東京, Привет, 🙂. Tasks have an input and an
answer.
"""


@lru_cache
def byte_level(specials: tuple[str, ...], plain_added: tuple[str, ...], bos: str | None, eos: str | None) -> str:
    """A byte-level BPE tokenizer, as JSON."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_PARAGRAPH], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain_added])
    return tokenizer.to_str()


@lru_cache
def metaspace(specials: tuple[str, ...]) -> str:
    """A SentencePiece-like BPE tokenizer with byte fallback, as Llama 2's and Gemma's, as JSON."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator([_PARAGRAPH], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]  # the bytes are ordinary pieces
    content["decoder"] = json.loads(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ).__getstate__()
    )
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer.to_str()


def wrapped(content: str, **options: Any) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), **options)


def tokenizer_of(style: Style, *, kind: str = "bytes") -> tuple[PreTrainedTokenizerFast, frozenset[int]]:
    """A tokenizer with a style's control tokens and template, and the ids its model stops at."""
    if kind == "bytes":
        content = byte_level(style.specials, style.plain_added, style.bos, style.eos)
    else:
        content = metaspace(style.specials)
    tokenizer = wrapped(content, bos_token=style.bos, eos_token=style.eos)
    tokenizer.chat_template = style.template
    return tokenizer, frozenset(tokenizer.convert_tokens_to_ids(list(style.stops)))


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level, one control token, no template, no BOS of its own."""
    return wrapped(byte_level(("<|endoftext|>",), (), None, None), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows as JSON Lines."""

    def write(*rows: object, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def config(train: Path | list[dict[str, Any]], **fields: Any) -> DataConfig:
    sources = [{"path": str(train)}] if isinstance(train, Path) else train
    return DataConfig.model_validate({"train": sources, "cache": False, **fields})
